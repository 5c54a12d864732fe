"""Products of (N, D) matrices that BarlowTwins and VICReg share on the CPU.

Both losses are sums of squares of a D x D matrix, but neither needs to store it: its squared norm
equals that of an N x N matrix (Garrido et al. 2022, arXiv:2206.02574, theorem 3.3), and its tiles
can be consumed as they are produced.

The Gram forms exist in two precisions, and their losses choose one. In float32, what lies between
two products is one compiled pass (products.cpp), and x, the centred or standardised z, lies in the
memory of the gradient, which overwrites it. In float64, which is rare, it is plain PyTorch on small
blocks, and x is computed again for the gradient: memory matters more than time. Only the functions
that distinguish the two (`blocks`, `standardised`, `again`, and each loss's gradient of a block)
ask for the dtype. Gradients are float32 either way.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslus.kernels import _cpu
from sslus.kernels.ranks import Ranks

TILE = 512  # columns: wide enough for BLAS at full rate, narrow enough that no tile is D x D
# Elements of a block of columns: few enough that its results are used while they are in a cache.
# Smaller blocks would fit smaller caches, but mean many short parallel loops, whose threads wait
# for each other on a busy machine.
BLOCK = 1 << 18

# The Gram form computes an off-diagonal sum as total minus diagonal. If less than this share of the
# total is left, float32 rounding would show, and everything is repeated in float64.
# gram_gpu.py uses LEFT for both losses.
LEFT = 1 / 16  # Barlow Twins: the diagonal, and thus its rounding, is spread over all columns
LEFT_OF_ONE = 1 / 4  # VICReg: one column may hold all of it, and the difference is its gradient


SHORTEST = 1e-12  # a row's length in `unit`


def work(z: Tensor) -> Tensor:
    """z in the dtype to compute in: half precision becomes float32, others stay."""
    return z if z.dtype == torch.float64 else z.float()


def fresh(z: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of z's shape, in huge pages if the system offers them.

    The allocator returns large tensors to the system, which clears them anew at each call: with
    one page fault for every 4 KiB, that takes a seventh of a loss at (256, 8192).
    """
    empty = torch.empty_like(z, dtype=dtype, memory_format=torch.contiguous_format)
    _cpu.prefer_huge_pages(empty)
    return empty


def blocks(n: int, d: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the D columns, with N x width about BLOCK.

    At least 256 columns, for BLAS. At most 2048, since BLAS sums a row in float32 from one end to
    the other, which is less accurate than summing blocks. At most half of D, as several blocks are
    held at a time. For float64, where the N x N matrices take twice the memory, BLOCK is divided by
    8: it is rare, and memory matters more than time.
    """
    least, entries = (64, BLOCK // 8) if dtype == torch.float64 else (256, BLOCK)
    width = min(max(least, entries // n), max(least, -(-d // 2)), 2048)
    return (slice(s, min(s + width, d)) for s in range(0, d, width))


def standardised(
    z: Tensor, dtype: torch.dtype, eps: float | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z minus its column means, and the (biased) variances of its columns.

    With eps, the columns are also divided by sqrt(variance + eps), and variance + eps is returned.
    out: where to write in float32; float64 ignores it.
    """
    if dtype == torch.float32:
        v = z.new_empty(z.shape[1], dtype=dtype)
        x = z.new_empty(z.shape, dtype=dtype) if out is None else out
        _cpu.centre_columns(z, x, v, -1.0 if eps is None else eps, torch.get_num_threads())
        v /= len(z)
        return x, v if eps is None else v.add_(eps)
    z = z.to(dtype)
    x = z - z.mean(0)
    v = x.square().mean(0)
    if eps is not None:
        x /= v.add_(eps).sqrt()
    return x, v


def again(z: Tensor, out: Tensor, dtype: torch.dtype, eps: float | None = None) -> Tensor:
    """The x that `standardised` has made of the same arguments: `out`, unless it is float64."""
    return out if dtype == torch.float32 else standardised(z, dtype, eps)[0]


def centred_rows(z: Tensor, n: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """z minus its column means over the n rows of all ranks, and the column sums of squares of
    that, both float32."""
    d, dtype = z.shape[1], torch.float32
    shift = ranks.sum_(z[:1].to(dtype, copy=True)).div_(ranks.world)
    x, mean = z.new_empty(z.shape, dtype=dtype), z.new_empty(d, dtype=dtype)
    for cols in blocks(len(z), d, dtype):
        mean[cols] = (z[:, cols] - shift[:, cols]).sum(0)
    ranks.sum_(mean).div_(n)
    squares = torch.empty_like(mean)
    for cols in blocks(len(z), d, dtype):
        block = (z[:, cols] - shift[:, cols]).sub_(mean[cols])
        squares[cols] = block.square().sum(0)
        x[:, cols] = block
    return x, ranks.sum_(squares)


def add_gram(k: Tensor, x: Tensor) -> None:
    """k += x x^T in blocks on and below the diagonal; `mirror` fills the rest at the end."""
    for s, e in _bands(len(k)):
        k[s:e, :e].addmm_(x[s:e], x[:e].T)


def mirror(k: Tensor) -> None:
    for s, e in _bands(len(k)):
        k[:s, s:e] = k[s:e, :s].T


def _bands(n: int) -> list[tuple[int, int]]:
    """Four bands of rows: 5/8 of the square is computed. Thinner bands would slow down BLAS."""
    step = max(64, -(-n // 4))
    return [(s, min(s + step, n)) for s in range(0, n, step)]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """sum_ij x_ij y_ij, float64, shape ()."""
    rows = max(1, BLOCK // (4 * x.shape[1]))  # the sum makes a copy of the product in float64
    total = torch.zeros((), dtype=torch.float64)
    for s in range(0, len(x), rows):
        total += (x[s : s + rows] * y[s : s + rows]).sum(dtype=torch.float64)
    return total


def unit(z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and the lengths (N, 1), like F.normalize: lengths are at least SHORTEST."""
    length = z.norm(dim=1, keepdim=True).clamp_(min=SHORTEST)
    return z / length, length


def unit_gradient(g: Tensor, u: Tensor, length: Tensor) -> Tensor:
    """dL/dz for u = z / |z|, from g = dL/du: the component of g orthogonal to u, over |z|. Where
    `unit` has limited the length, u grows with z, and all of g counts."""
    along = (g * u).sum(1, keepdim=True).mul_(length > SHORTEST)
    return torch.addcmul(g, u, along, value=-1).div_(length)
