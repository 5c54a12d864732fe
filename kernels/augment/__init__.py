"""Views: crop, flip, blur and change the grey values of frames, in one pass.

    view = normalise(speckle(gain(solarize(blur(gamma(contrast(brightness(flip(crop(frame))))))))))

in torchvision's order, each step in [0, 1]; reference.py defines every step. No random numbers are
drawn here: a row of the table `params` describes one view, and reference.PARAMS its columns. There
is no hue, saturation or grayscale, which would not change a grey frame.
"""

import math

import numpy as np
import torch
from torch import Tensor

from sslus.kernels.augment import reference
from sslus.kernels.augment.reference import COLUMNS, PARAMS, TOLERANCE, identity
from sslus.kernels.op import Map

__all__ = ["COLUMNS", "PARAMS", "check_params", "identity", "views"]

LOWEST, HIGHEST = np.float32([[low, high] for _, _, low, high, _ in PARAMS]).T
SMALLEST_STD = 1e-6  # 1 / 4000 of a grey level
WHOLE = [COLUMNS.index(name) for name in ("flip", "seed")]


def views(
    frames: Tensor,
    index: Tensor,
    params: Tensor,
    *,
    size: int | tuple[int, int],
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Make view v from frames[index[v]] according to params[v]: (V, 1, h, w).

    >>> params = identity(2, frames.shape[-1])
    >>> params[1, COLUMNS.index("flip")] = 1
    >>> views(frames, torch.tensor([7, 7]), params, size=224, mean=store.mean, std=store.std)

    frames: (B, S, S) uint8, contiguous, typically memory-mapped: only the boxes are read. index:
    (V,) int64. params: (V, len(COLUMNS)) float32, see PARAMS. size: (h, w), or one number for both.
    mean, std: of grey values in 0..1; a view is (value - mean) / std. dtype: float32 or bfloat16.
    out: a contiguous (V, 1, h, w) tensor of `dtype` to write to; allocated if None. A view depends
    neither on other views nor on `threads` (default: torch.get_num_threads()).

    Compiled kernels are usually within 0.2 grey levels of the float64 reference. They are within
    1.2 before gain and speckle, which multiply the error, with two exceptions: a value at the
    threshold of solarize may be inverted or not, and gamma below 1 is steep at black, where the
    error may reach 2 grey levels at gamma 0.6 and 50 at 0.2.

    Raises ValueError for wrong dtypes or shapes, indices or boxes out of bounds, and values that
    are NaN or outside the range in PARAMS. Tables on a GPU are not checked, which would wait for
    the GPU: call check_params before sending them there.
    """
    if not all(isinstance(t, Tensor) for t in (frames, index, params)):
        kinds = ", ".join(type(t).__name__ for t in (frames, index, params))
        raise TypeError(f"views: want the tensors frames, index and params, got {kinds}")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"views: want a size of at least 1 x 1, got {height} x {width}")
    shape = (len(index), 1, height, width)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=frames.device)
    _check(frames, index, params, out, shape, dtype)
    if not (SMALLEST_STD <= std < math.inf and math.isfinite(mean)):
        raise ValueError(f"views: want a finite mean and std >= {SMALLEST_STD}, got {mean}, {std}")
    _views(
        frames, index, params, out, mean=float(mean), std=float(std),
        threads=torch.get_num_threads() if threads is None else threads,
    )  # fmt: skip
    torch.autograd.graph.increment_version(out)  # autograd may have saved what was there before
    return out


def _check(frames, index, params, out, shape, dtype) -> None:
    def want(ok: bool, what: str, got: Tensor) -> None:
        if not ok:
            layout = "" if got.is_contiguous() else ", not contiguous"
            raise ValueError(f"views: want {what}, got {tuple(got.shape)} {got.dtype}{layout}")

    square = frames.ndim == 3 and frames.shape[1] == frames.shape[2] > 0
    want(square and frames.dtype == torch.uint8 and frames.is_contiguous(),
         "frames (B, S, S) torch.uint8, contiguous", frames)  # fmt: skip
    want(index.ndim == 1 and index.dtype == torch.int64, "index (V,) torch.int64", index)
    want(tuple(params.shape) == (len(index), len(COLUMNS)) and params.dtype == torch.float32,
         f"params ({len(index)}, {len(COLUMNS)}) torch.float32", params)  # fmt: skip
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"views: want dtype torch.float32 or torch.bfloat16, got {dtype}")
    want(tuple(out.shape) == shape and out.dtype == dtype and out.is_contiguous(),
         f"out {shape} {dtype}, contiguous", out)  # fmt: skip
    if {t.device for t in (index, params, out)} != {frames.device}:
        raise ValueError("views: want frames, index, params and out on one device")


def check_params(index: Tensor, params: Tensor, *, num_frames: int, store: int) -> None:
    """Raise ValueError naming the first view whose frame, box or other column is out of range.

    For tensors on the CPU. Uses numpy: torch takes six times as long on such small tables.
    """
    i, p = index.numpy(), params.numpy()
    wrong = (i < 0) | (i >= num_frames)
    if wrong.any():
        v = wrong.argmax()
        raise ValueError(
            f"views: want frame indices in 0..{num_frames - 1}, got {i[v]} at view {v}"
        )
    right = (p >= LOWEST) & (p <= HIGHEST)  # false for NaN
    right[:, WHOLE] &= p[:, WHOLE] == np.rint(p[:, WHOLE])
    if not right.all():
        v, c = np.argwhere(~right)[0]
        name, _, low, high, meaning = PARAMS[c]
        raise ValueError(
            f"views: want {name} ({meaning}) in {low}..{high}, got {p[v, c]:g} at view {v}"
        )
    wrong = (p[:, :2].astype(np.float64) + p[:, 2:4] > store + TOLERANCE).any(axis=1)
    if wrong.any():
        v = wrong.argmax()
        top, left, height, width = p[v, :4].tolist()
        raise ValueError(
            f"views: want boxes inside the {store} x {store} frame, got rows {top:g} to "
            f"{top + height:g} and columns {left:g} to {left + width:g} at view {v}"
        )


def _by_reference(frames, index, params, out, *, mean, std, threads) -> None:
    _check_params_on_cpu(frames, index, params)
    out.copy_(
        reference.views(
            frames, index, params, size=out.shape[2:], mean=mean, std=std, dtype=out.dtype
        )
    )


def _check_params_on_cpu(frames, index, params) -> None:
    if params.device.type == "cpu":
        check_params(index, params, num_frames=len(frames), store=frames.shape[-1])


def _by_cpu(frames, index, params, out, *, mean, std, threads) -> None:
    from sslus.kernels import _cpu

    # numpy's arrays are passed in a third of the time; it has no bfloat16.
    place = out.numpy() if out.dtype == torch.float32 else out
    inputs = (frames.numpy(), index.numpy(), params.numpy())
    try:  # refuses whatever check_params does, which is slower but gives the reason
        _cpu.views(*map(np.ascontiguousarray, inputs), place, mean, std, threads)
    except ValueError:
        _check_params_on_cpu(frames, index, params)
        raise


def _by_gpu(frames, index, params, out, *, mean, std, threads) -> None:
    from sslus.kernels.augment import gpu

    _check_params_on_cpu(frames, index, params)  # in Triton's interpreter
    gpu.augment_gpu(frames, index.contiguous(), params.contiguous(), out, mean=mean, std=std)


_views = Map("views", reference=_by_reference, cpu=_by_cpu, gpu=_by_gpu)
