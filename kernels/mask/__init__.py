"""Masks for reconstruction: hide a part of each image, and weight the error accordingly.

    filled = where(m, fill, x)
    L = sum w (prediction - target)^2 / sum w        w = hole where m, rest elsewhere

over all pixels of the joint batch of all ranks. m depends only on the sample's id and on where the
target shows the ultrasound sector. It is never stored as a tensor: for one batch only a number per
cell (by default 16 x 16 pixels) and the corners of the rectangles are kept. reference.py defines
which pixels are hidden; `draw_mask` returns them.

hole=1, rest=0 is the loss of the masked part alone, as in MAE (He et al. 2022, arXiv:2111.06377,
section 3: "we compute the loss only on masked patches"); 1, 1 is the mean squared error of the
whole image; values in between weight the two parts. The gradient with respect to the prediction is
computed with the loss, in one pass over prediction and target. This needs sum w over all ranks
first, so the mask is drawn before; that reads only the target, and only if the mask depends on the
sector.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor

from sslus.kernels.mask import cpu, reference
from sslus.kernels.op import Map, Op, check_number

__all__ = ["Mask", "draw_mask", "mask_fill", "masked_mse", "sample_ids"]


@dataclass(frozen=True)
class Mask:
    """Which pixels of an image are hidden.

    background is the largest value outside the sector, in the target's units. For frames in which
    black is 0 and noise reaches 8 of 255, it is (8.5 / 255 - mean) / std, between two grey levels.
    Without it, the whole image is the sector. Black inside the sector, such as a chamber, belongs
    to it; black that reaches its edge cannot be distinguished from the outside. Raises ValueError
    for values out of range, TypeError for those that are no numbers.
    """

    kind: str = "patches"  # or "rectangles"
    patch: int = 16  # side of a cell in pixels; at most 1024 cells per image
    ratio: float = 0.75  # patches: share of the sector's cells to hide
    num: int = 4  # rectangles: how many, overlaps allowed
    min_side: float = 0.1  # of a rectangle, as a share of the image's height or width
    max_side: float = 0.4
    background: float = -math.inf
    share: float = 0.5  # share of a cell's pixels that must be above it; text has fewer

    def __post_init__(self):
        def want(ok: bool, what: str, got: object) -> None:
            if not ok:
                raise ValueError(f"mask: want {what}, got {got}")

        for f in dataclasses.fields(self):
            x = getattr(self, f.name)
            if f.type is float:
                check_number("mask", f.name, x)
            elif f.type is int and not isinstance(x, Integral):
                raise TypeError(f"mask: want a whole number as {f.name}, got {x!r}")
        want(self.kind in ("patches", "rectangles"), "kind patches or rectangles", self.kind)
        want(1 <= self.patch <= 1 << 15, "a patch of 1 to 32768 px", self.patch)
        want(0 < self.ratio <= 1, "ratio above 0 and at most 1", self.ratio)
        want(1 <= self.num <= reference.MAX_RECTANGLES, "1 to 32 rectangles", self.num)
        want(0 < self.min_side <= self.max_side <= 1, "0 < min_side <= max_side <= 1",
             f"{self.min_side} and {self.max_side}")  # fmt: skip
        want(0 <= self.share <= 1, "share in 0..1", self.share)
        want(self.background < math.inf, "a finite background, or -inf for none", self.background)


FIELDS = tuple(f.name for f in dataclasses.fields(Mask))


def _constants(mask: Mask) -> dict[str, object]:
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: want a Mask, got {type(mask).__name__}")
    return {name: getattr(mask, name) for name in FIELDS}  # torch 2.11 does not compile vars(mask)


def sample_ids(samples: Tensor, *, seed: int, epoch: int | Tensor) -> Tensor:
    """The ids (B,) int64 of samples (B,), whole numbers below 2^40, in an epoch: a number, or (B,).

    They are distinct for each (epoch, sample). What is drawn for an id does not depend on batch
    size, rank or resuming. It is epoch * 2^40 + sample (2^40 frames of 256 x 256 would be 72 PB),
    XORed with the seed, which the finaliser of splitmix64 has spread over all bits.
    """
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    samples = torch.as_tensor(samples).long()
    return (samples + epoch * 2**40) ^ (z - (z >> 63 << 64))  # as a signed number


def draw_mask(target: Tensor, ids: Tensor, mask: Mask) -> Tensor:
    """The pixels that `mask_fill` and `masked_mse` hide: (B, H, W) bool. For visualisation."""
    _check(target, target, ids, exact_too=True)
    return reference.mask(target, ids, **_constants(mask))


def mask_fill(
    x: Tensor, ids: Tensor, mask: Mask, *, fill: float = 0.0, target: Tensor | None = None
) -> Tensor:
    """A copy of x (B, 1, H, W) in which the hidden pixels are `fill`.

    >>> ids = sample_ids(frames, seed=0, epoch=epoch)
    >>> hidden = Mask("patches", background=(8.5 / 255 - store.mean) / store.std)
    >>> loss = masked_mse(model(mask_fill(x, ids, hidden)), x, ids, hidden)

    x: float32 or bfloat16. ids: (B,) int64; what is hidden depends only on the id and the sector,
    not on the position in the batch. fill: in x's units, where 0 is the mean of normalised frames.
    target: the same images before corruption, (B, 1, H, W), default x; the sector is located in
    it, so pass the same target to `masked_mse`.

    Raises ValueError for wrong dtypes or shapes, for more than 1024 cells, and for an x that wants
    a gradient, which this does not have.
    """
    target = x if target is None else target
    _check(x, target, ids)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("mask: mask_fill has no gradient; detach() the images")
    if not torch.compiler.is_compiling():
        check_number("mask", "fill", fill)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    # Compiled kernels refuse strided input, so it is copied explicitly, here.
    _fill(x.contiguous(), target.contiguous(), ids.contiguous(), out, **_constants(mask), fill=fill)
    return out


def masked_mse(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor,
    mask: Mask,
    *,
    hole: float = 1.0,
    rest: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The mean squared error with weight `hole` where `mask_fill` hides and `rest` elsewhere: ().

    prediction, target: (B, 1, H, W), each float32 or bfloat16, or both float64, which runs the
    reference. The gradient goes to prediction, in its dtype; it is exactly 0 where the weight is 0.
    An image that is not finite makes the loss NaN or infinite, even where its weight is 0. With
    several ranks (`group`, by default all), it is the loss of the joint batch, as for every Op.

    Raises ValueError for wrong dtypes or shapes, hole <= 0, rest < 0, or either not finite.
    """
    _check(prediction, target, ids, exact_too=True)
    return _loss(prediction, target, ids, group=group, **_constants(mask), hole=hole, rest=rest)


def _check(x: Tensor, target: Tensor, ids: Tensor, *, exact_too: bool = False) -> None:
    if not all(isinstance(t, Tensor) for t in (x, target, ids)):
        kinds = ", ".join(type(t).__name__ for t in (x, target, ids))
        raise TypeError(f"mask: want tensors of images, targets and ids, got {kinds}")
    reference.check(x, target, ids)
    exact = exact_too and torch.float64 in (x.dtype, target.dtype)
    types = (torch.float64,) if exact else (torch.float32, torch.bfloat16)
    # Not float16, in which a gradient of 1 / (B H W) would underflow.
    if x.dtype not in types or target.dtype not in types:
        names = ", ".join(str(t) for t in types)
        raise ValueError(f"mask: want images of {names}, got {x.dtype} and {target.dtype}")
    if ids.dtype != torch.int64:
        raise ValueError(f"mask: want ids of torch.int64, got {ids.dtype}")
    if not x.device == target.device == ids.device:
        raise ValueError(
            f"mask: want all tensors on one device, got {x.device}, {target.device}, {ids.device}"
        )


def _by_reference(x, target, ids, out, *, fill, **scalars) -> None:
    hidden = reference.mask(target, ids, **scalars).unsqueeze(1)
    out.copy_(torch.where(hidden, fill, x))


def _by_gpu(x, target, ids, out, **scalars) -> None:
    from sslus.kernels.mask import gpu

    gpu.mask_fill(x, target, ids, out, **scalars)


def _loss_by_gpu(*tensors, **scalars) -> tuple[Tensor, Tensor]:
    from sslus.kernels.mask import gpu

    return gpu.masked_mse(*tensors, **scalars)


def _traced(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel as a torch custom op, which torch.compile treats as opaque."""

    def run(
        x: Tensor, target: Tensor, ids: Tensor, out: Tensor, *, kind: str, patch: int,
        ratio: float, num: int, min_side: float, max_side: float, background: float,
        share: float, fill: float,
    ) -> None:  # fmt: skip
        kernel(
            x, target, ids, out, kind=kind, patch=patch, ratio=ratio, num=num,
            min_side=min_side, max_side=max_side, background=background, share=share, fill=fill,
        )  # fmt: skip

    return torch.library.custom_op(f"sslus::{name}", run, mutates_args={"out"})


_fill = Map(
    "mask_fill",
    reference=_by_reference,
    cpu=_traced("mask_fill_cpu", cpu.mask_fill),
    gpu=_traced("mask_fill_gpu", _by_gpu),
)

_PATCHES = vars(Mask(patch=4, ratio=0.6)) | {"hole": 1.0, "rest": 0.0}
_RECTANGLES = vars(Mask("rectangles", patch=5, num=3)) | {"hole": 1.0, "rest": 0.25}
# About half of the values that the parity test draws are above this background.
_SECTOR = {"background": 0.3, "share": 0.5}

# The tests and benchmarks of all losses use one dtype for all tensors of a case, so the
# implementations accept ids of any dtype, while `masked_mse` accepts only int64.
_loss = Op(
    "masked_mse",
    reference=reference.masked_mse,
    cpu=cpu.masked_mse,
    gpu=_loss_by_gpu,
    num_gradients=1,
    cases=tuple(
        {"tensors": [(b, 1, h, w), (b, 1, h, w), (b,)], "scalars": scalars}
        for b, h, w, scalars in [
            (1, 1, 1, _PATCHES),
            (2, 4, 6, _PATCHES | {"patch": 2}),
            (3, 17, 33, _PATCHES | _SECTOR),
            (5, 31, 16, _RECTANGLES),
            (4, 65, 37, _RECTANGLES | _SECTOR),
            (2, 64, 64, _PATCHES | {"hole": 1.0, "rest": 1.0}),
        ]
    ),
)
