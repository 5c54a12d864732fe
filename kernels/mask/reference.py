"""Masks in plain PyTorch: the definition that every kernel is measured against.

The image is cut into square cells; those at the right and lower edges may be smaller. Both kinds of
mask select cells by the same rule:

1. A cell is lit if at least `share` of its pixels, and at least one, are above `background`. It
   belongs to the sector if it is lit or has lit cells on all four sides, in its row and its column:
   blood is as black as the outside of the sector, but lies inside it. If no cell is lit, all
   cells belong to the sector.
2. Cell c of the sample `id` draws the four words of Philox4x32-10 with counter
   (c, id >> 32, 0, 0) and key (id mod 2^32, 0). The cells of the sector are ranked by the first
   21 bits of their first word, then by c.
3. `patches` hides the first cells in this order: ratio x (cells of the sector), rounded, and at
   least one. `rectangles` draws a rectangle at each of the first `num`: its height and width are
   uniform integers from min_side to max_side times those of the image; its centre is a uniform
   pixel of the cell, and it is shifted to lie inside the image. A pixel is hidden if it is both in
   a rectangle and in a cell of the sector.

All arithmetic is in integers, so the same pixels are hidden on every machine.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sslus.kernels.philox import philox

MAX_CELLS = 1024  # a cell's number is the last 10 bits of its rank
MAX_RECTANGLES = 32  # one bit each
ONE = 1 << 16  # shares are stored as integers, in units of 1 / ONE


@dataclass(frozen=True)
class Plan:
    """A mask's scalars for images of H x W, as integers, the same for all kernels."""

    height: int
    width: int
    patch: int
    rows: int  # of cells
    columns: int
    num: int  # rectangles; 0: patches
    ratio: int  # in units of 1 / ONE
    share: int  # in units of 1 / ONE
    low_height: int  # of a rectangle
    high_height: int
    low_width: int
    high_width: int
    sector: int  # 0: every cell belongs to it, whatever the image shows

    @property
    def numbers(self) -> tuple[int, ...]:
        """All fields, in this order."""
        return tuple(vars(self).values())

    @property
    def cells(self) -> int:
        return self.rows * self.columns


@lru_cache
def plan(
    height: int,
    width: int,
    *,
    kind: str,
    patch: int,
    ratio: float,
    num: int,
    min_side: float,
    max_side: float,
    background: float,
    share: float,
) -> Plan:
    """Raises ValueError if the image has more than MAX_CELLS cells."""
    patch = min(patch, max(height, width))  # the same cell; the reference pads images to whole ones
    rows, columns = -(-height // patch), -(-width // patch)
    if not 1 <= rows * columns <= MAX_CELLS:
        raise ValueError(
            f"mask: want 1 to {MAX_CELLS} cells, got {rows} x {columns} of {patch} px in"
            f" {height} x {width}: take a larger patch"
        )

    def side(part: float, whole: int) -> int:
        return min(max(round(part * whole), 1), whole)

    return Plan(
        height, width, patch, rows, columns, num if kind == "rectangles" else 0,
        round(ratio * ONE), round(share * ONE), side(min_side, height), side(max_side, height),
        side(min_side, width), side(max_side, width), int(background > -torch.inf),
    )  # fmt: skip


def sector(target: Tensor, p: Plan, background: float) -> Tensor:
    """The cells of the sector: (B, H, W) -> (B, rows, columns) bool."""
    cells = (len(target), p.rows, p.columns)
    if not p.sector:
        return torch.ones(cells, dtype=torch.bool, device=target.device)

    def total(x: Tensor) -> Tensor:  # over each cell
        x = F.pad(x.int(), (0, -p.width % p.patch, 0, -p.height % p.patch))
        return x.view(-1, p.rows, p.patch, p.columns, p.patch).sum((2, 4))

    # In float32, because a grey value may be exactly the threshold.
    above = target.float() > torch.tensor(background, dtype=torch.float32, device=target.device)
    pixels, bright = total(torch.ones_like(above[:1])), total(above)
    lit = (bright > 0) & (bright * ONE >= pixels * p.share)

    def seen(dim: int) -> Tensor:  # whether there are lit cells on both sides along dim
        before, after = lit.cumsum(dim), lit.flip(dim).cumsum(dim).flip(dim)
        return (before > 0) & (after > 0)

    found = lit | (seen(1) & seen(2))
    return found | ~lit.any(2).any(1).view(-1, 1, 1)


def draw(target: Tensor, ids: Tensor, p: Plan, background: float) -> tuple[Tensor, Tensor | None]:
    """The parts of a mask: for patches, the hidden cells (B, rows, columns) bool and None; for
    rectangles, the cells of the sector and the corners (B, num, 4) int64 as top, left, bottom,
    right."""
    inside = sector(target, p, background)
    cell = torch.arange(p.cells, device=target.device)
    ids = ids.long().view(-1, 1)
    words = philox(cell.view(1, -1), (ids >> 32) & 0xFFFFFFFF, ids & 0xFFFFFFFF)
    rank = (words[0] >> 11) * MAX_CELLS + cell
    candidates = inside.flatten(1)
    last = torch.iinfo(torch.int64).max
    order, at = rank.masked_fill(~candidates, last).sort(1)
    count = candidates.sum(1, keepdim=True)
    if not p.num:
        hidden = ((count * p.ratio + ONE // 2) // ONE).clamp(min=1)
        chosen = candidates & (rank <= order.gather(1, hidden - 1))
        return chosen.view_as(inside), None
    # With fewer cells than rectangles, the last rectangle is repeated.
    first = torch.arange(p.num, device=target.device).expand(len(ids), -1)
    at = at.gather(1, first.minimum(count - 1))
    _, tall, wide, place = (w.expand(len(ids), -1).gather(1, at) for w in words)
    height = p.low_height + (tall * (p.high_height - p.low_height + 1) >> 32)
    width = p.low_width + (wide * (p.high_width - p.low_width + 1) >> 32)
    y, x = at // p.columns * p.patch, at % p.columns * p.patch
    y = y + ((place >> 16) * (p.height - y).clamp(max=p.patch) >> 16)
    x = x + ((place & 0xFFFF) * (p.width - x).clamp(max=p.patch) >> 16)
    top = (y - height // 2).clamp(min=0).minimum(p.height - height)
    left = (x - width // 2).clamp(min=0).minimum(p.width - width)
    return inside, torch.stack([top, left, top + height, left + width], 2)


def mask(target: Tensor, ids: Tensor, *, background: float, **scalars) -> Tensor:
    """The hidden pixels: (B, H, W) bool, for target (B, 1, H, W) and ids (B,)."""
    height, width = target.shape[-2:]
    p = plan(height, width, background=background, **scalars)
    cells, boxes = draw(target.detach()[:, 0], ids, p, background)
    cells = cells.repeat_interleave(p.patch, 1).repeat_interleave(p.patch, 2)
    hidden = cells[:, :height, :width]
    if boxes is None:
        return hidden
    top, left, bottom, right = (edge.view(-1, p.num, 1, 1) for edge in boxes.unbind(2))
    y = torch.arange(height, device=target.device).view(-1, 1)
    x = torch.arange(width, device=target.device)
    return hidden & ((y >= top) & (y < bottom) & (x >= left) & (x < right)).any(1)


def masked_mse(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor,
    *,
    kind: str,
    patch: int,
    ratio: float,
    num: int,
    min_side: float,
    max_side: float,
    background: float,
    share: float,
    hole: float,
    rest: float,
) -> Tensor:
    """sum w (prediction - target)^2 / sum w, w = hole where hidden and rest elsewhere: ()."""
    check(prediction, target, ids)
    check_weights(hole, rest)
    hidden = mask(
        target, ids, kind=kind, patch=patch, ratio=ratio, num=num, min_side=min_side,
        max_side=max_side, background=background, share=share,
    ).unsqueeze(1)  # fmt: skip
    p, t = (x if x.dtype == torch.float64 else x.float() for x in (prediction, target.detach()))
    weight = torch.where(hidden, hole, rest).to(p.dtype)
    count = hidden.sum().double()
    total = hole * count + rest * (hidden.numel() - count)
    return (weight * (p - t).square()).sum() / total.to(p.dtype)


def check(prediction: Tensor, target: Tensor, ids: Tensor) -> None:
    """Raises ValueError unless the shapes match."""
    shape = tuple(prediction.shape)
    if len(shape) != 4 or shape[1] != 1 or tuple(target.shape) != shape:
        raise ValueError(
            f"mask: want two tensors (B, 1, H, W), got {shape} and {tuple(target.shape)}"
        )
    if 0 in shape:
        raise ValueError(f"mask: the batch is empty: {shape}")
    if tuple(ids.shape) != shape[:1]:
        raise ValueError(f"mask: want {shape[0]} ids, got {tuple(ids.shape)}, for {shape}")


def check_weights(hole: float, rest: float) -> None:
    """hole must be positive: if all pixels are hidden, the weights would otherwise sum to 0."""
    if not (0 < hole < torch.inf and 0 <= rest < torch.inf):
        raise ValueError(f"masked_mse: want finite hole > 0 and rest >= 0, got {hole} and {rest}")
