"""Masks on a GPU: one launch fills; the loss takes one launch that counts and one that weights.

A program draws a sample's mask and stores it in a row of a small table: the rectangles, then a
number for each cell. Pixels look up their cell there, in the L1 cache. `mask_fill` does both in one
program. The loss needs the table first, because every gradient depends on the number of hidden
pixels of the whole batch; then each program handles a tile of pixels and stores a partial sum.
These are added in a fixed order, without atomics, so results are bitwise reproducible.

The rank of the last hidden patch is found by bisection: 31 sums over the cells, which is shorter
than sorting up to 1024 of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslus.kernels.aot import Build
from sslus.kernels.mask.reference import MAX_CELLS, ONE, Plan, check, check_weights, plan
from sslus.kernels.ranks import Ranks
from sslus.kernels.tiles import cdiv, power_of_2

TILE = 4096  # pixels: 16 per thread, so that several 16-byte loads are in flight
COUNT_TILE = 2048  # pixels, for counting; with 16 per thread, ptxas spills a predicate
NUM_WARPS = 8
_MAX_CELLS = tl.constexpr(MAX_CELLS)
_ONE = tl.constexpr(ONE)
_LAST = tl.constexpr(2**31 - 1)  # no rank is larger


@triton.jit
def _all(x):
    return tl.sum(tl.sum(x.to(tl.int32), 1), 0)


@triton.jit
def _sector(
    target, background, share, inside, row, column,
    H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """(BR, BC): which of the cells `inside` the image belong to the sector."""
    j = tl.arange(0, BX)
    x = tl.arange(0, BC)[:, None] * PATCH + j[None, :]
    own = (j < PATCH)[None, :] & (x < W)
    bright = tl.zeros((BR, BC), tl.int32)
    for r in range(ROWS):
        count = tl.zeros((BC,), tl.int32)
        for y0 in range(0, PATCH, BY):
            i = y0 + tl.arange(0, BY)
            y = r * PATCH + i
            there = ((i < PATCH) & (y < H))[:, None, None] & own[None, :, :]
            pixel = tl.load(target + y[:, None, None] * W + x[None, :, :], mask=there, other=0.0)
            above = there & (pixel.to(tl.float32) > background)
            count += tl.sum(tl.sum(above.to(tl.int32), 2), 0)
        bright += tl.where(row == r, count[None, :], 0)
    height = tl.minimum(H - row * PATCH, PATCH)
    width = tl.minimum(W - column * PATCH, PATCH)
    # 64 bits, since a cell may have 2^30 pixels.
    enough = bright.to(tl.int64) * _ONE >= (height * width).to(tl.int64) * share
    lit = inside & (bright > 0) & enough
    left = tl.min(tl.where(lit, column, BC), 1)[:, None]
    right = tl.max(tl.where(lit, column, -1), 1)[:, None]
    top = tl.min(tl.where(lit, row, BR), 0)[None, :]
    bottom = tl.max(tl.where(lit, row, -1), 0)[None, :]
    found = (left <= column) & (column <= right) & (top <= row) & (row <= bottom)
    return tl.where(_all(lit) == 0, inside, inside & found)


@triton.jit
def _scaled(word, count):
    """Uniform in 0..count - 1."""
    return tl.umulhi(word, tl.cast(count, tl.uint32)).to(tl.int32)


@triton.jit
def _draw(
    target, sample_id, table, background, share, ratio,
    low_height, high_height, low_width, high_width,
    H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, NUM: tl.constexpr, SECTOR: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """Writes a row of the table. Returns the number of hidden pixels; 0 for rectangles."""
    row, column = tl.arange(0, BR)[:, None], tl.arange(0, BC)[None, :]
    inside = (row < ROWS) & (column < COLUMNS)
    if SECTOR:
        inside = _sector(
            target, background, share, inside, row, column, H, W, PATCH, ROWS, BR, BC, BX, BY,
        )  # fmt: skip
    cell = row * COLUMNS + column
    zero = tl.zeros_like(cell)
    high = zero + (sample_id >> 32).to(tl.int32)
    first, tall, wide, place = tl.philox(sample_id & 0xFFFFFFFF, cell, high, zero, zero)
    rank = (first >> 11).to(tl.int32) * _MAX_CELLS + cell
    candidates = _all(inside)
    height = tl.minimum(H - row * PATCH, PATCH)
    width = tl.minimum(W - column * PATCH, PATCH)
    there = (row < ROWS) & (column < COLUMNS)
    pixels = 0
    if NUM == 0:
        wanted = tl.maximum((candidates * ratio + _ONE // 2) // _ONE, 1)
        low, last = 0, _LAST
        for _ in range(31):  # the smallest rank up to which there are `wanted` candidates
            middle = low + (last - low) // 2
            enough = _all(inside & (rank <= middle)) >= wanted
            last = tl.where(enough, middle, last)
            low = tl.where(enough, low, middle + 1)
        inside = inside & (rank <= last)
        pixels = _all(tl.where(inside, height * width, 0))
    else:
        y = row * PATCH + _scaled(place & 0xFFFF0000, height)
        x = column * PATCH + _scaled(place << 16, width)
        tall = low_height + _scaled(tall, high_height - low_height + 1)
        wide = low_width + _scaled(wide, high_width - low_width + 1)
        top = tl.minimum(tl.maximum(y - tall // 2, 0), H - tall)
        left = tl.minimum(tl.maximum(x - wide // 2, 0), W - wide)
        before = -1
        for r in range(NUM):
            after = _all(inside & (rank > before)) > 0
            smallest = tl.min(tl.min(tl.where(inside & (rank > before), rank, _LAST), 1), 0)
            before = tl.where(after, smallest, before)  # too few cells: repeat the last one
            one = inside & (rank == before)
            box = table + 4 * r + zero
            tl.store(box, top, mask=one)
            tl.store(box + 1, left, mask=one)
            tl.store(box + 2, top + tall, mask=one)
            tl.store(box + 3, left + wide, mask=one)
    tl.store(table + 4 * NUM + cell, inside.to(tl.int32), mask=there)
    tl.debug_barrier()  # other threads of this program read the row
    return pixels


@triton.jit
def _hidden(
    table, pixel, there, W: tl.constexpr, PATCH: tl.constexpr, COLUMNS: tl.constexpr,
    NUM: tl.constexpr,
):  # fmt: skip
    y = pixel // W
    x = pixel - y * W
    cell = y // PATCH * COLUMNS + x // PATCH
    hidden = tl.load(table + 4 * NUM + cell, mask=there, other=0) != 0
    if NUM > 0:
        covered = pixel < 0
        for r in range(NUM):
            box = table + 4 * r
            top, left, bottom, right = (
                tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3),
            )  # fmt: skip
            covered |= (y >= top) & (y < bottom) & (x >= left) & (x < right)
        hidden = hidden & covered
    return hidden


@triton.jit
def fill_kernel(
    x, target, ids, out, table, background, share, ratio,
    low_height, high_height, low_width, high_width, fill,
    H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, NUM: tl.constexpr, SECTOR: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (samples, parts): each program draws the mask anew and fills its part of the pixels."""
    sample = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    own = table + (sample * tl.num_programs(1) + part) * (4 * NUM + ROWS * COLUMNS)
    at = sample * (H * W)
    _draw(
        target + at, tl.load(ids + sample), own, background, share, ratio,
        low_height, high_height, low_width, high_width,
        H, W, PATCH, ROWS, COLUMNS, NUM, SECTOR, BR, BC, BX, BY,
    )  # fmt: skip
    for start in range(part * TILE, H * W, tl.num_programs(1) * TILE):
        pixel = start + tl.arange(0, TILE)
        there = pixel < H * W
        value = tl.load(x + at + pixel, mask=there, other=0.0).to(tl.float32)
        hidden = _hidden(own, pixel, there, W, PATCH, COLUMNS, NUM)
        value = tl.where(hidden, fill, value)
        tl.store(out + at + pixel, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def count_kernel(
    target, ids, table, counts, background, share, ratio,
    low_height, high_height, low_width, high_width,
    H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, NUM: tl.constexpr, SECTOR: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, COUNT_TILE: tl.constexpr,
):  # fmt: skip
    """Grid (samples,): the rows of the table and the number of pixels hidden in each sample."""
    sample = tl.program_id(0).to(tl.int64)
    own = table + sample * (4 * NUM + ROWS * COLUMNS)
    pixels = _draw(
        target + sample * (H * W), tl.load(ids + sample), own, background, share, ratio,
        low_height, high_height, low_width, high_width,
        H, W, PATCH, ROWS, COLUMNS, NUM, SECTOR, BR, BC, BX, BY,
    )  # fmt: skip
    if NUM > 0:  # rectangles overlap, so pixels are counted one by one
        for start in range(0, H * W, COUNT_TILE):
            pixel = start + tl.arange(0, COUNT_TILE)
            there = pixel < H * W
            hidden = there & _hidden(own, pixel, there, W, PATCH, COLUMNS, NUM)
            pixels += tl.sum(hidden.to(tl.int32), 0)
    tl.store(counts + sample, pixels.to(tl.int64))


@triton.jit(do_not_specialize=["num_counts"])
def loss_kernel(
    prediction, target, table, counts, gradient, losses, num_counts, pixels, hole, rest,
    H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, COLUMNS: tl.constexpr,
    CELLS: tl.constexpr, NUM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (samples, tiles): the gradient, and a partial sum of the loss from each program.

    counts (num_counts,): hidden pixels; their sum is that of all `pixels` of the joint batch.
    """
    hidden_pixels = tl.zeros((256,), tl.int64)
    for start in range(0, num_counts, 256):
        i = start + tl.arange(0, 256)
        hidden_pixels += tl.load(counts + i, mask=i < num_counts, other=0)
    count = tl.sum(hidden_pixels, 0)
    total = hole * count.to(tl.float64) + rest * (pixels - count).to(tl.float64)
    # Twice the weights of the loss, for the gradient.
    inside, outside = (2 * hole / total).to(tl.float32), (2 * rest / total).to(tl.float32)

    sample = tl.program_id(0).to(tl.int64)
    at = sample * (H * W)
    pixel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = pixel < H * W
    p = tl.load(prediction + at + pixel, mask=there, other=0.0).to(tl.float32)
    t = tl.load(target + at + pixel, mask=there, other=0.0).to(tl.float32)
    hidden = _hidden(table + sample * (4 * NUM + CELLS), pixel, there, W, PATCH, COLUMNS, NUM)
    weighted = tl.where(hidden, inside, outside) * (p - t)
    tl.store(gradient + at + pixel, weighted.to(gradient.dtype.element_ty), mask=there)
    share = tl.sum(weighted * (p - t), 0) * 0.5
    tl.store(losses + sample * tl.num_programs(1) + tl.program_id(1), share)


def _constants(p: Plan) -> dict[str, int]:
    """Compile-time constants of _draw."""
    br, bc, bx = power_of_2(p.rows), power_of_2(p.columns), power_of_2(p.patch)
    by = max(1, min(power_of_2(p.patch), COUNT_TILE // (bc * bx)))
    return {
        "H": p.height, "W": p.width, "PATCH": p.patch, "ROWS": p.rows, "COLUMNS": p.columns,
        "NUM": p.num, "SECTOR": bool(p.sector), "BR": br, "BC": bc, "BX": bx, "BY": by,
    }  # fmt: skip


def _sides(p: Plan) -> tuple[int, int, int, int]:
    return p.low_height, p.high_height, p.low_width, p.high_width


def _parts(num_samples: int, p: Plan, device: torch.device) -> int:
    """Programs per sample: enough for two per multiprocessor, but at most 8, since each of them
    reads the whole target to find the sector."""
    if device.type != "cuda":
        return 2  # the interpreter: tests should cover several parts
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return min(cdiv(2 * cores, num_samples), cdiv(p.height * p.width, TILE), 8)


def mask_fill(
    x: Tensor,
    target: Tensor,
    ids: Tensor,
    out: Tensor,
    *,
    background: float,
    fill: float,
    **scalars,
) -> None:
    """Writes x into out, both (B, 1, H, W), with `fill` where hidden. One launch; does not wait."""
    p = plan(*x.shape[-2:], background=background, **scalars)
    parts = _parts(len(x), p, x.device)
    table = torch.empty((len(x) * parts, 4 * p.num + p.cells), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        fill_kernel[(len(x), parts)](
            x, target, ids, out, table, background, p.share, p.ratio, *_sides(p), fill,
            **_constants(p), TILE=TILE, num_warps=NUM_WARPS,
        )  # fmt: skip


def masked_mse(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor,
    *,
    background: float,
    hole: float,
    rest: float,
    ranks: Ranks,
    **scalars,
) -> tuple[Tensor, Tensor]:
    """The loss () float32 and the gradient of the prediction. The host does not wait."""
    check(prediction, target, ids)
    check_weights(hole, rest)
    p = plan(*prediction.shape[-2:], background=background, **scalars)
    num, tiles = len(prediction), cdiv(p.height * p.width, TILE)
    new = {"device": prediction.device}
    table = torch.empty((num, 4 * p.num + p.cells), dtype=torch.int32, **new)
    counts = torch.empty(num, dtype=torch.int64, **new)
    count_kernel[(num,)](
        target, ids.long(), table, counts, background, p.share, p.ratio, *_sides(p),
        **_constants(p), COUNT_TILE=COUNT_TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    if ranks.world > 1:
        counts = ranks.sum_(counts.sum().view(1))
    gradient = torch.empty_like(prediction)
    losses = torch.empty((num, tiles), dtype=torch.float32, **new)
    loss_kernel[(num, tiles)](
        prediction, target, table, counts, gradient, losses, len(counts),
        prediction.numel() * ranks.world, hole, rest,
        p.height, p.width, p.patch, p.columns, p.cells, p.num, TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return ranks.sum_(losses.sum()), gradient


def builds() -> Iterator[Build]:
    """All kernels for images of 224 x 224: both kinds of mask, with and without a sector."""
    numbers = dict.fromkeys(
        ["share", "ratio", "low_height", "high_height", "low_width", "high_width"], "i32"
    ) | {"background": "fp32"}
    for kind in ("patches", "rectangles"):
        for sector in (False, True):
            p = plan(
                224, 224, kind=kind, patch=16, ratio=0.75, num=4, min_side=0.1, max_side=0.4,
                background=0.0 if sector else -torch.inf, share=0.25,
            )  # fmt: skip
            for dtype in ("fp32", "bf16"):
                label = f"224 px, {kind}, {'sector' if sector else 'whole'}, {dtype}"
                images = f"*{dtype}:16"
                ids, table = "*i64:16", "*i32:16"
                yield Build(
                    f"fill {label}", fill_kernel,
                    {"x": images, "target": images, "ids": ids, "out": images, "table": table,
                     "fill": "fp32", **numbers},
                    _constants(p) | {"TILE": TILE}, NUM_WARPS,
                )  # fmt: skip
                yield Build(
                    f"count {label}", count_kernel,
                    {"target": images, "ids": ids, "table": table, "counts": ids, **numbers},
                    _constants(p) | {"COUNT_TILE": COUNT_TILE}, NUM_WARPS,
                )  # fmt: skip
                if not sector:
                    yield Build(
                        f"loss {label}", loss_kernel,
                        {"prediction": images, "target": images, "table": table, "counts": ids,
                         "gradient": images, "losses": "*fp32:16", "num_counts": "i32",
                         "pixels": "i64", "hole": "fp32", "rest": "fp32"},
                        {"H": 224, "W": 224, "PATCH": 16, "COLUMNS": p.columns,
                         "CELLS": p.cells, "NUM": p.num, "TILE": TILE},
                        NUM_WARPS,
                    )  # fmt: skip
