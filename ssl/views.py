"""What a view is: presets of random crops and grey-value changes, drawn into a table.

The random numbers are drawn first, into the table `params` of the op `sslus.kernels.augment`,
one row a view. A row is a function of (seed, epoch, frame, view) alone, so a view does not change
with the batch it is in, the number of threads or of processes, or the implementation of the op.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslus.engine.errors import InputError
from sslus.kernels.augment import COLUMNS, identity, views

BLOCKS = 5  # of four random words a view: 18 are used


@dataclass(frozen=True)
class ViewConfig:
    """How far one view may be from its frame. Probabilities are p_..., the rest are ranges.

    Hue, saturation and grayscale are not here: they do nothing to a grey frame. Nor is a vertical
    flip: near and far field have a meaning.
    """

    min_area: float = 0.08  # of the frame; the crop's share is uniform from here to max_area
    max_area: float = 1.0
    max_aspect: float = 4 / 3  # log-uniform from its inverse
    p_flip: float = 0.5  # left and right
    p_jitter: float = 0.8  # of brightness, contrast and gamma together
    brightness: float = 0.4  # factor 1 +- this
    contrast: float = 0.4  # factor 1 +- this, about the view's mean
    gamma: float = 0.0  # exponent exp(+- this)
    p_blur: float = 0.5
    max_sigma: float = 2 / 224  # of the view's side (2 px at 224); uniform from a 20th of it
    p_solarize: float = 0.0
    solarize: float = 0.5  # values from here up are inverted
    p_gain: float = 0.0
    gain: float = 0.0  # factors 1 +- this at the near and at the far edge, linear between
    p_speckle: float = 0.0
    speckle: float = 0.0  # largest standard deviation of the multiplicative noise

    def __post_init__(self):
        for name, value in vars(self).items():
            low, high = (1e-4, 1.0) if name.endswith("area") else (0.0, 1.0)
            if name in ("max_aspect", "gamma"):
                low, high = (1.0, 4.0) if name == "max_aspect" else (0.0, math.log(5))
            if not low <= value <= high:
                raise InputError(f"views: want {name} in {low:g}..{high:g}, got {value}")
        if self.min_area > self.max_area:
            raise InputError(
                f"views: want min_area <= max_area, got {self.min_area} > {self.max_area}"
            )


_WHOLE = ViewConfig(min_area=1, max_aspect=1, p_flip=0, p_jitter=0, p_blur=0)
_TWIN = ViewConfig(p_blur=1.0)
_ULTRASOUND = ViewConfig(
    # Stretching by up to 1.2 is a change of depth or of probe; gain and its ramp are what a
    # sonographer's hand does between two clips, gamma the machine's dynamic range.
    min_area=0.4, max_aspect=1.2, brightness=0.25, contrast=0.25, gamma=0.2, p_blur=0.3,
    max_sigma=1 / 224, p_gain=0.5, gain=0.3, p_speckle=0.5, speckle=0.15,
)  # fmt: skip

# (first view, second view)
PRESETS: dict[str, tuple[ViewConfig, ViewConfig]] = {
    # Global features of ultrasound: keeps what the image shows, changes what the machine does.
    "ultrasound": (_ULTRASOUND, _ULTRASOUND),
    # SimCLR and MoCo v2 (arXiv:2002.05709, 2003.04297), without their colour.
    "simclr": (ViewConfig(brightness=0.8, contrast=0.8),) * 2,
    # BYOL, Barlow Twins and VICReg (2006.07733 table 6): the second view is solarised instead.
    "barlowtwins": (_TWIN, dataclasses.replace(_TWIN, p_blur=0.1, p_solarize=0.2)),
    # A denoising autoencoder: the first view is the target, the second the input.
    "autoencoder": (
        _WHOLE,
        dataclasses.replace(
            _WHOLE, p_jitter=0.8, brightness=0.2, contrast=0.2, p_blur=0.5, p_speckle=0.8,
            speckle=0.3,
        ),
    ),
    # Inpainting: the mask is the task, so the views are plain crops.
    "inpainting": (ViewConfig(min_area=0.5, p_jitter=0, p_blur=0),) * 2,
}  # fmt: skip


def parse(text: str) -> tuple[ViewConfig, ViewConfig]:
    """`PRESET` or `PRESET,field=value,...`, the fields being those of ViewConfig in both views.

    >>> parse("ultrasound,min_area=0.2,p_blur=0")
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in PRESETS:
        raise InputError(f"--views {name!r}: want one of {', '.join(PRESETS)}")
    fields = {f.name for f in dataclasses.fields(ViewConfig)}
    values = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in fields:
            raise InputError(f"--views: no field {field!r}; there are {', '.join(sorted(fields))}")
        try:
            values[field] = float(value)
        except ValueError as e:
            raise InputError(f"--views: {field} wants a number, got {value!r}") from e
    first, second = (dataclasses.replace(c, **values) for c in PRESETS[name])
    return first, second


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10: (N, 4) uint32 counters -> (N, 4) uint32 random words.

    A counter-based generator: word i needs no word before it. Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"; the generator of Triton's `tl.rand` and of cuRAND.
    """
    a, b, c, d = (counter[:, i].astype(np.uint64) for i in range(4))
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (q >> np.uint64(32)) ^ b ^ np.uint64(k0),
            q & low,
            (p >> np.uint64(32)) ^ d ^ np.uint64(k1),
            p & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def draw(
    config: ViewConfig,
    frames: np.ndarray,
    view: int,
    epoch: int | np.ndarray,
    seed: int,
    store: int,
    size: int,
) -> np.ndarray:
    """The table of one view of each frame: (B, len(COLUMNS)) float32.

    frames: (B,) indices into the frame store. view: 0 or 1. epoch: one, or (B,), that of each.
    store, size: side of a stored frame and of a view, in pixels.
    """
    counter = np.empty((BLOCKS, len(frames), 4), np.uint32)
    counter[..., 0] = frames
    counter[..., 1] = view
    counter[..., 2] = epoch
    counter[..., 3] = np.arange(BLOCKS)[:, None]
    words = philox(counter.reshape(-1, 4), seed).reshape(BLOCKS, len(frames), 4)
    words = words.transpose(0, 2, 1).reshape(4 * BLOCKS, len(frames)) >> 8
    # 24 bits fill a float32's mantissa: uniform in [0, 1) and never rounded up to 1.
    u = iter(words * 2.0**-24)
    c = config
    table = np.empty((len(frames), len(COLUMNS)), np.float32)
    column = dict(zip(COLUMNS, table.T, strict=True))

    def either(p: float) -> np.ndarray:
        return next(u) < p

    def about_one(reach: float) -> np.ndarray:
        return 1 + reach * (2 * next(u) - 1)

    def side(length: np.ndarray) -> np.ndarray:  # np.clip takes three times as long
        return np.minimum(np.maximum(np.rint(length * store), 1), store)

    area = c.min_area + (c.max_area - c.min_area) * next(u)
    aspect = np.exp(math.log(c.max_aspect) * (2 * next(u) - 1))
    height = column["height"][:] = side(np.sqrt(area / aspect))
    width = column["width"][:] = side(np.sqrt(area * aspect))
    column["top"][:] = np.floor(next(u) * (store - height + 1))
    column["left"][:] = np.floor(next(u) * (store - width + 1))
    column["flip"][:] = either(c.p_flip)
    jitter = either(c.p_jitter)
    column["brightness"][:] = np.where(jitter, about_one(c.brightness), 1)
    column["contrast"][:] = np.where(jitter, about_one(c.contrast), 1)
    column["gamma"][:] = np.where(jitter, np.exp(c.gamma * (2 * next(u) - 1)), 1)
    sigma = c.max_sigma * size * (0.05 + 0.95 * next(u))
    column["sigma"][:] = np.where(either(c.p_blur), sigma, 0)
    column["solarize"][:] = np.where(either(c.p_solarize), c.solarize, 2)
    ramp = either(c.p_gain)
    column["gain_near"][:] = np.where(ramp, about_one(c.gain), 1)
    column["gain_far"][:] = np.where(ramp, about_one(c.gain), 1)
    column["speckle"][:] = np.where(either(c.p_speckle), c.speckle * next(u), 0)
    column["seed"][:] = words[-1]  # which nothing else has used
    return table


def picture(store, text: str, out, *, num: int, size: int, seed: int, max_seconds=None) -> None:
    """Write a PNG with `num` columns: a frame, its first view, its second view.

    store: a FrameStore. text: as `parse` takes it. max_seconds: of a nearby second frame.
    """
    from PIL import Image

    from sslus.engine.atomic import atomic_file
    from sslus.engine.plan import Plan, nearby

    presets = parse(text)
    first = Plan(len(store), min(len(store), max(num, 2)), seed).order(0)[:num]
    second = first
    if max_seconds is not None:
        second, _ = nearby(store.video, store.time_seconds, first, max_seconds, seed, 0)
    rows = [whole(store.frames[first], size, 0.0, 1.0)]
    for view, (config, chosen) in enumerate(zip(presets, (first, second), strict=True)):
        frames = torch.from_numpy(np.ascontiguousarray(store.frames[chosen]))
        table = torch.from_numpy(draw(config, chosen, view, 0, seed, store.size, size))
        rows.append(views(frames, torch.arange(len(chosen)), table, size=size))
    gap = max(2, size // 56)
    sheet = np.zeros((3 * (size + gap) - gap, len(first) * (size + gap) - gap), np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row[:, 0].mul(255).round().byte().numpy()):
            y, x = r * (size + gap), c * (size + gap)
            sheet[y : y + size, x : x + size] = image
    with atomic_file(out) as f:
        Image.fromarray(sheet).save(f, "PNG")


@torch.inference_mode()
def whole(frames: np.ndarray, size: int, mean: float, std: float) -> Tensor:
    """Whole frames as a backbone wants them: (B, S, S) uint8 -> (B, 1, size, size) float32.

    Resized and normalised like a view, nothing else: what the evaluation looks at.
    """
    frames = torch.from_numpy(np.ascontiguousarray(frames))
    num, store = len(frames), frames.shape[-1]
    out = views(frames, torch.arange(num), identity(num, store), size=size, mean=mean, std=std)
    return out.contiguous(memory_format=torch.channels_last)
