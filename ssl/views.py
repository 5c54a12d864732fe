"""View presets: random crops and grey-value changes, drawn into a table of parameters.

The random numbers are drawn first, into the table `params` of the op `sslus.kernels.augment`, one
row per view. A row depends only on (seed, epoch, frame, view), so a view does not depend on its
batch, the number of threads or processes, or the implementation of the op.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sslus.engine.errors import InputError
from sslus.kernels.augment import COLUMNS, PARAMS, identity, views

MAX_SIGMA = PARAMS[COLUMNS.index("sigma")][3]  # pixels


@dataclass(frozen=True)
class ViewConfig:
    """How much one view may differ from its frame. p_... are probabilities, the others ranges.

    There is no hue, saturation or grayscale, which would not change a grey frame, and no vertical
    flip, since near and far field differ in meaning. Raises InputError for values out of range.
    """

    min_area: float = 0.08  # share of the frame; the crop's is uniform from here to max_area
    max_area: float = 1.0
    # width / height is log-uniform between 1 / this and this; large crops are rounder, as a long
    # one would not fit into the frame
    max_aspect: float = 4 / 3
    p_flip: float = 0.5  # horizontal
    p_jitter: float = 0.8  # of brightness, contrast and gamma together
    brightness: float = 0.4  # factor 1 +- this
    contrast: float = 0.4  # factor 1 +- this, about the view's mean
    gamma: float = 0.0  # exponent exp(+- this)
    p_blur: float = 0.5
    max_sigma: float = 2 / 224  # of the view's side (2 px at 224); uniform from a 20th of it
    p_solarize: float = 0.0
    solarize: float = 0.5  # values from here up are inverted
    p_gain: float = 0.0
    gain: float = 0.0  # factors 1 +- this at the near and the far edge, linear in between
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
    # Stretching by up to 1.2 mimics a change of depth or probe; gain and its ramp, what a
    # sonographer adjusts between two clips; gamma, the dynamic range of the machine.
    min_area=0.4, max_aspect=1.2, brightness=0.25, contrast=0.25, gamma=0.2, p_blur=0.3,
    max_sigma=1 / 224, p_gain=0.5, gain=0.3, p_speckle=0.5, speckle=0.15,
)  # fmt: skip

# (first view, second view)
PRESETS: dict[str, tuple[ViewConfig, ViewConfig]] = {
    # For global features of ultrasound: keeps the anatomy, changes the machine's settings.
    "ultrasound": (_ULTRASOUND, _ULTRASOUND),
    # SimCLR and MoCo v2 (arXiv:2002.05709, 2003.04297), without their colour changes.
    "simclr": (ViewConfig(brightness=0.8, contrast=0.8),) * 2,
    # BYOL, Barlow Twins, VICReg (2006.07733, table 6): the second view is rarely blurred but may be
    # solarised.
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


def parse(text: str, size: int | None = None) -> tuple[ViewConfig, ViewConfig]:
    """`PRESET` or `PRESET,field=value,...`, where fields of ViewConfig change in both views.

    size: of the views, in pixels; if given, InputError is also raised for a blur too wide for it.

    >>> parse("ultrasound,min_area=0.2,p_blur=0")
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in PRESETS:
        raise InputError(f"views {name!r}: want one of {', '.join(PRESETS)}")
    fields = {f.name for f in dataclasses.fields(ViewConfig)}
    values = {}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in fields:
            raise InputError(f"views: no field {field!r}; there are {', '.join(sorted(fields))}")
        try:
            values[field] = float(value)
        except ValueError as e:
            raise InputError(f"views: {field} wants a number, got {value!r}") from e
    first, second = (dataclasses.replace(c, **values) for c in PRESETS[name])
    widest = max(c.max_sigma * (c.p_blur > 0) for c in (first, second))
    if size and widest * size > MAX_SIGMA:  # else the op refuses the step that happens to draw it
        raise InputError(
            f"views: want max_sigma of at most {MAX_SIGMA / size:.3g} for views of {size} px, got"
            f" {widest:g}"
        )
    return first, second


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

    frames: (B,) indices into the frame store. view: 0 or 1. epoch: one number, or (B,). store,
    size: side of a stored frame and of a view, in pixels.

    The random words of a row are those of Philox4x32-10 with counter (frame, view, epoch, block)
    and the seed as key: a counter-based generator, which gives any word without the ones before it
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; also used in cuRAND).
    """
    from sslus.kernels import _cpu

    frames = np.ascontiguousarray(frames, np.int64)
    epochs = np.ascontiguousarray(np.broadcast_to(epoch, frames.shape), np.int64)
    ranges = np.array(dataclasses.astuple(config), np.float64)
    table = np.empty((len(frames), len(COLUMNS)), np.float32)
    _cpu.draw_views(ranges, frames, epochs, view, seed, store, size, table)
    return table


def picture(store, text: str, out, *, num: int, size: int, seed: int, max_seconds=None) -> None:
    """Write a PNG with `num` columns: a frame, its first view, its second view, as the rows say.

    store: a FrameStore. text: see `parse`. max_seconds: if given, the second view is of a nearby
    frame, at most this far away.
    """
    from PIL import Image, ImageDraw, ImageFont

    from sslus.engine.atomic import atomic_file
    from sslus.engine.plan import Plan, nearby

    presets = parse(text, size)
    first = Plan(max(len(store), 2), 2, seed).order(0)  # a plan wants two frames
    first = first[first < len(store)][:num]
    second = first
    if max_seconds is not None:
        second, _ = nearby(store.video, store.time_seconds, first, max_seconds, seed, 0)
    rows = [whole(store.frames[first], size, 0.0, 1.0)]
    for view, (config, chosen) in enumerate(zip(presets, (first, second), strict=True)):
        frames = torch.from_numpy(np.ascontiguousarray(store.frames[chosen]))
        table = torch.from_numpy(draw(config, first, view, 0, seed, store.size, size))
        rows.append(views(frames, torch.arange(len(chosen)), table, size=size))
    gap = max(2, size // 56)
    font = ImageFont.load_default(size=max(8, size // 14))
    names = ("frame", "view 1", "view 2" if max_seconds is None else "nearby")
    margin = 2 * gap + int(max(map(font.getlength, names)))
    # White: black gaps cannot be seen between pictures that are black at the edge.
    sheet = Image.new("L", (margin + len(first) * (size + gap) - gap, 3 * (size + gap) - gap), 255)
    pen = ImageDraw.Draw(sheet)
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = r * (size + gap)
        pen.text((gap, y + size // 2), name, fill=0, font=font, anchor="lm")
        for c, image in enumerate(row[:, 0].mul(255).round().byte().numpy()):
            sheet.paste(Image.fromarray(image), (margin + c * (size + gap), y))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as f:
        sheet.save(f, "PNG")


@torch.inference_mode()
def whole(frames: np.ndarray, size: int, mean: float, std: float) -> Tensor:
    """Whole frames as input for a backbone: (B, S, S) uint8 -> (B, 1, size, size) float32.

    They are only resized and normalised, like a view. Used for evaluation.
    """
    frames = torch.from_numpy(np.ascontiguousarray(frames))
    num, store = len(frames), frames.shape[-1]
    out = views(frames, torch.arange(num), identity(num, store), size=size, mean=mean, std=std)
    return out.contiguous(memory_format=torch.channels_last)
