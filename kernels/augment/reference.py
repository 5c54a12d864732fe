"""Views of stored frames in plain PyTorch: the definition, step by step.

Every step takes and returns views (V, 1, h, w) with values 0 (black) to 1 (white), in float32
or float64, the dtype of the parameters. The steps are those of torchvision.transforms.v2 (crop and
antialiased resize, flip, brightness, contrast, gamma, blur, solarize, in this order), followed by
two specific to ultrasound: a gain ramp and speckle.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslus.kernels.philox import philox

# Columns of the table: name, neutral value (None: that of the whole frame), lowest and highest
# allowed value, meaning. One row is one view.
PARAMS = (
    ("top", None, 0, math.inf, "the crop's upper edge in pixels of the frame; need not be whole"),
    ("left", None, 0, math.inf, "its left edge"),
    ("height", None, 1, math.inf, "its height; top + height is at most the frame's side"),
    ("width", None, 1, math.inf, "its width"),
    ("flip", 0, 0, 1, "1: left and right are exchanged; 0 or 1"),
    ("brightness", 1, 0, 3, "factor"),
    ("contrast", 1, 0, 3, "factor about the view's mean"),
    ("gamma", 1, 0.2, 5, "exponent of the values 0..1"),
    ("sigma", 0, 0, 16, "of the Gaussian blur, in pixels of the view; 0: none"),
    ("solarize", 2, 0, 2, "values from here up are inverted; above 1: none are"),
    ("gain_near", 1, 0, 3, "factor at the view's upper edge, where the probe is"),
    ("gain_far", 1, 0, 3, "factor at its lower edge; linear in between"),
    ("speckle", 0, 0, 1, "standard deviation of a random factor with mean 1 for each pixel"),
    ("seed", 0, 0, 2**24 - 1, "of the speckle; a whole number, exact in float32"),
)
COLUMNS = tuple(name for name, *_ in PARAMS)
TOLERANCE = 1e-3  # pixels: top + height is a sum of rounded float32 numbers


def identity(num_views: int, store: int) -> Tensor:
    """The table that changes only the size: (V, P) float32, for frames of side `store`."""
    whole = {"top": 0, "left": 0, "height": store, "width": store}
    row = [whole.get(name, neutral) for name, neutral, *_ in PARAMS]
    return torch.tensor(row, dtype=torch.float32).repeat(num_views, 1)


def views(
    frames: Tensor,
    index: Tensor,
    params: Tensor,
    *,
    size: tuple[int, int],
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(B, S, S) uint8, (V,) int64, (V, P) float32 or float64 -> (V, 1, h, w) of `dtype`.

    Computed in the dtype of `params`: float64 gives the truth to measure kernels against.
    """
    names = {name: params[:, i].view(-1, 1, 1, 1) for i, name in enumerate(COLUMNS)}
    x = resized_crop(frames, index, params, size)
    x = torch.where(names["flip"] > 0, x.flip(-1), x)
    x = (x * names["brightness"]).clamp(0, 1)
    x = contrast(x, names["contrast"])
    x = x ** names["gamma"]
    x = blur(x, params[:, COLUMNS.index("sigma")])
    x = torch.where(x >= names["solarize"], 1 - x, x)
    x = gain(x, names["gain_near"], names["gain_far"])
    x = (x * (1 + names["speckle"] * noise(names["seed"], size))).clamp(0, 1)
    return ((x - mean) / std).to(dtype)


def resized_crop(frames: Tensor, index: Tensor, params: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop boxes from frames and resize them: antialiased bilinear, one matrix per axis."""
    store = frames.shape[-1]
    top, left, height, width = params[:, :4].unbind(1)
    rows = triangle(top, height, store, size[0])
    columns = triangle(left, width, store, size[1])
    x = frames[index].to(params.dtype) / 255
    return (rows @ x @ columns.mT).unsqueeze(1)


def triangle(start: Tensor, length: Tensor, store: int, count: int) -> Tensor:
    """(V,) boxes start..start+length -> (V, count, store): the weight of each frame pixel.

        weight(o, j) ~ max(0, 1 - |j + 1/2 - centre(o)| / max(1, scale))    scale = length / count
        centre(o) = start + (o + 1/2) scale

    Only pixels that the box touches count, and each row sums to 1: for whole boxes this is
    torchvision's crop followed by its resize with antialias=True.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / count
    o = torch.arange(count, dtype=start.dtype, device=start.device).view(1, -1, 1)
    j = torch.arange(store, dtype=start.dtype, device=start.device).view(1, 1, -1)
    distance = (j + 0.5 - start - (o + 0.5) * scale).abs()
    weight = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    first, last = (start + TOLERANCE).floor(), (start + length - TOLERANCE).ceil()
    weight = weight * ((j >= first) & (j < last))
    return weight / weight.sum(-1, keepdim=True)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend each view with its mean (factor above 1: away from it), clamped to 0..1."""
    return (factor * x + (1 - factor) * x.mean((1, 2, 3), keepdim=True)).clamp(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with mirrored borders that do not repeat the edge pixel, as in torchvision.

    The kernel is truncated 3 sigma (rounded up) from its centre and sums to 1. It loses less than
    0.27 % of a Gaussian, so no pixel differs by more than 0.69 grey levels from a full one.
    """
    out = []
    for view, s in zip(x, sigma.tolist(), strict=True):
        rows, columns = (gaussian(s, n).to(view) for n in view.shape[-2:])
        pad = (len(columns) // 2,) * 2 + (len(rows) // 2,) * 2
        y = F.pad(view, pad, mode="reflect")[None]
        y = F.conv2d(y, rows.view(1, 1, -1, 1))
        out.append(F.conv2d(y, columns.view(1, 1, 1, -1))[0])
    return torch.stack(out) if out else x


def gaussian(sigma: float, count: int) -> Tensor:
    """(2 radius + 1,) float64 weights; radius < `count`, so that borders can be mirrored."""
    radius = min(math.ceil(3 * sigma), count - 1)
    if radius <= 0:
        return torch.ones(1, dtype=torch.float64)
    k = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (k / sigma) ** 2)
    return weight / weight.sum()


def gain(x: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Time gain compensation: a factor that is linear in depth (from top to bottom)."""
    h = x.shape[-2]
    depth = (torch.arange(h, dtype=x.dtype, device=x.device).view(1, 1, -1, 1) + 0.5) / h
    return (x * (near + (far - near) * depth)).clamp(0, 1)


def noise(seed: Tensor, size: tuple[int, int]) -> Tensor:
    """(V, 1, 1, 1) seeds -> (V, 1, h, w): nearly normal, mean 0, variance 1, magnitude <= 3.45.

    Pixel (y, x) takes word x % 4 of Philox4x32-10 with counter (x // 4, y, 0, 0) and key
    (seed, 0), and sums the word's four bytes: integers, the same on every machine. The sum of four
    uniform bytes has mean 510 and variance 21845.
    """
    h, w = size
    y = torch.arange(h, device=seed.device).view(1, -1, 1)
    x = torch.arange((w + 3) // 4, device=seed.device).view(1, 1, -1)
    key = seed.view(-1, 1, 1).long()
    words = torch.stack(philox(x, y, key), -1).flatten(2)[..., :w]
    total = sum((words >> shift) & 0xFF for shift in (0, 8, 16, 24))
    return ((total - 510).to(seed.dtype) / math.sqrt(21845)).unsqueeze(1)
