"""Views of stored frames on a GPU: one Triton launch, with intermediate results kept in cache.

The four linear steps (resize and blur, each along both axes) are the same operation: contract the
last axis with a banded matrix of weights and transpose,

    out[o, m] = sum_k weight[o, k] in[m, k]            frame -> (w, S) -> (h, w) -> (w, h) -> (h, w)

so that each accesses memory contiguously and is a small tensor-core product. A program computes one
view after the other and keeps intermediate results in its own scratch memory of some 0.2 MB. That
of all programs fits (or nearly fits) in the L2 cache, so only the frame is read from memory and
only the view is written to it. A program computes the whole view because contrast needs the mean of
the view after clamping, and because the weights are then shared by many lines.

The cost of a view is instructions, many of them for weights. Weights are computed in registers,
once for every BM lines, and never loaded. A tile is therefore longer in `m` than in `o`, and visits
only the range of `k` that its outputs need. The mirrored border of the blur is produced as extra
lines by the previous step rather than by the weights, which thus depend only on a distance.

Intermediate values are fp16, 0 to 255: bytes are exact, black stays exactly 0 (gamma below 1 would
magnify an error), and rounding between two steps has a relative error of at most 2^-11. Weights are
rounded first and divided by the sum of the rounded weights, in float32, so that flat areas stay
flat.

According to the machine code for sm_90, a view of 224 x 224 from a frame of 256 x 256 takes about
0.15 million warp instructions, 0.24 million with blur; speckle adds 0.05 million. Not timed on a
GPU yet.

A view whose parameters are not finite, or whose frame or box does not exist, becomes NaN: to raise
an error, the host would have to wait for the device.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslus.kernels.augment.reference import COLUMNS, TOLERANCE
from sslus.kernels.tiles import power_of_2

MAX_RADIUS = 48  # three times the largest sigma
NUM_WARPS = 8
PROGRAMS = 2  # per multiprocessor
_NUM_COLUMNS = tl.constexpr(len(COLUMNS))
_MAX_RADIUS = tl.constexpr(MAX_RADIUS)
_MOST_TAPS = tl.constexpr(32)  # summed at once: a tile of BO x 1024 takes half a minute to compile
_TOLERANCE = tl.constexpr(TOLERANCE)
_ROOT_HALF_LOG2_E = tl.constexpr(math.sqrt(0.5 * math.log2(math.e)))
_NOISE_STD = tl.constexpr(math.sqrt(21845))


@triton.jit
def _tent(k, o, start, scale, first, last):
    """Weight of pixel k for output o, not normalised; k and o are broadcast.

    Terms that depend on k or o alone are computed before broadcasting, which leaves two additions
    and a maximum per weight. Pixels that the box does not touch are moved out of reach.
    """
    shrink = 1.0 / tl.maximum(scale, 1.0)
    place = tl.where((k >= first) & (k < last), k.to(tl.float32) + 0.5 - start, 1e9) * shrink
    centre = (o.to(tl.float32) + 0.5) * (scale * shrink)
    return tl.maximum(1.0 - tl.abs(place - centre), 0.0).to(tl.float16)


@triton.jit
def _tent_sum(o, start, scale, first, last, TAPS: tl.constexpr):
    """Sum of output o's rounded weights, over the TAPS pixels around its centre.

    When shrinking by less than 15, they are summed at once, otherwise in several rounds.
    """
    left = tl.floor(start + (o.to(tl.float32) + 0.5) * scale - tl.maximum(scale, 1.0) - 0.5)
    SPAN: tl.constexpr = min(TAPS, _MOST_TAPS)
    k = left.to(tl.int32)[:, None] + tl.arange(0, SPAN)[None, :]
    total = tl.sum(_tent(k, o[:, None], start, scale, first, last).to(tl.float32), 1)
    for past in tl.range(SPAN, TAPS, SPAN):
        weight = _tent(k + past, o[:, None], start, scale, first, last)
        total += tl.sum(weight.to(tl.float32), 1)
    return total


@triton.jit
def _mirror(i, COUNT: tl.constexpr):
    """Index of line i in an image with mirrored borders, clamped to existing lines."""
    i = (COUNT - 1) - tl.abs((COUNT - 1) - tl.abs(i))
    return tl.minimum(tl.maximum(i, 0), COUNT - 1)


@triton.jit
def _columns(source, line, k, bound, PITCH: tl.constexpr):
    """(K, M) fp16: the values of each line at k; 0 from `bound` on."""
    x = tl.load(source + line[None, :] * PITCH + k[:, None], mask=k[:, None] < bound, other=0)
    if source.dtype.element_ty == tl.uint8:
        # 0x6400 is 1024 in fp16, with a last bit worth 1: no conversion instruction is needed.
        x = (x.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    return x.to(tl.float16)


@triton.jit
def _resize(
    source, target, bound, shift, num_lines, start, length, flip, brightness, margin,
    LINES: tl.constexpr, COUNT: tl.constexpr, PITCH: tl.constexpr, TARGET_PITCH: tl.constexpr,
    LAST: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    TAPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """target[o, m] = brightness sum_k tent(o, k) source[mirror(m + shift), k], at most white.

    If LAST, returns the sum of the results, without the `margin` on both sides of m.
    """
    first = tl.floor(start + _TOLERANCE).to(tl.int32)
    last = tl.minimum(tl.ceil(start + length - _TOLERANCE).to(tl.int32), bound)
    # Exactly 1 where nothing is resized. With the last digit wrong, as by `/` on a GPU, neighbours
    # would weigh 1e-5, and black would not stay 0.
    scale = tl.div_rn(length, COUNT + 0.0)
    reach = tl.maximum(scale, 1.0) + 0.5
    total = 0.0
    for o0 in tl.range(0, COUNT, BO, disable_licm=True):
        o = o0 + tl.arange(0, BO)
        seen = tl.minimum(o, COUNT - 1)
        seen = tl.where(flip, COUNT - 1 - seen, seen)
        norm = brightness / _tent_sum(seen, start, scale, first, last, TAPS)
        end = tl.minimum(o0 + BO, COUNT) - 1
        low = start + (tl.where(flip, COUNT - 1 - end, o0) + 0.5) * scale - reach
        high = start + (tl.where(flip, COUNT - 1 - o0, end) + 0.5) * scale + reach
        k_first = tl.maximum(tl.floor(low).to(tl.int32), first) // 16 * 16
        k_last = tl.minimum(tl.ceil(high).to(tl.int32), last)
        for m0 in tl.range(0, num_lines, BM, disable_licm=True):
            m = m0 + tl.arange(0, BM)
            line = _mirror(m + shift, LINES)
            z = tl.zeros((BO, BM), tl.float32)
            for k0 in tl.range(k_first, k_last, BK, num_stages=STAGES):
                k = tl.multiple_of(k0, 16) + tl.arange(0, BK)
                x = _columns(source, line, k, bound, PITCH)
                weight = _tent(k[None, :], seen[:, None], start, scale, first, last)
                z = tl.dot(weight, x, z)
            z = z * norm[:, None]
            if LAST:
                z = tl.minimum(z, 255.0)
            inside = (o < COUNT)[:, None] & (m < num_lines)[None, :]
            place = target + o[:, None] * TARGET_PITCH + m[None, :]
            tl.store(place, z.to(tl.float16), mask=inside)
            if LAST:
                own = (o < COUNT)[:, None] & ((m >= margin) & (m < num_lines - margin))[None, :]
                # Both axes at once: for sm_100, Triton 3.6 cannot compile one after the other.
                total += tl.sum(tl.where(own, z, 0.0))
    return total


@triton.jit
def _gauss(place, o, root, radius):
    """Weight at distance place - o in pixels, not normalised: 2^-((root distance)^2), truncated at
    the radius."""
    distance = tl.abs(place.to(tl.float32) * root - o.to(tl.float32) * root)
    weight = tl.where(distance < (radius + 0.5) * root, tl.exp2(-distance * distance), 0.0)
    return weight.to(tl.float16)


@triton.jit
def _blur(
    source, target, shift, num_lines, sigma, margin,
    LINES: tl.constexpr, COUNT: tl.constexpr, PITCH: tl.constexpr, TARGET_PITCH: tl.constexpr,
    BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """target[o, m] = sum_k gauss(k - o) source[mirror(m + shift), margin + k].

    Each line of the source has `margin` mirrored pixels on both sides.
    """
    root = _ROOT_HALF_LOG2_E / sigma
    radius = tl.minimum(tl.minimum(tl.ceil(3.0 * sigma), _MAX_RADIUS), COUNT - 1)
    taps = tl.arange(0, 128) - 64
    norm = 1.0 / tl.sum(_gauss(taps, tl.zeros_like(taps), root, radius).to(tl.float32), 0)
    bound = tl.multiple_of(COUNT + 2 * margin, 16) if COUNT % 16 == 0 else COUNT + 2 * margin
    i = tl.arange(0, BO)
    for o0 in tl.range(0, COUNT, BO, disable_licm=True):
        for m0 in tl.range(0, num_lines, BM, disable_licm=True):
            m = m0 + tl.arange(0, BM)
            line = _mirror(m + shift, LINES)
            z = tl.zeros((BO, BM), tl.float32)
            for k0 in tl.range(0, BO + 2 * margin, BK, num_stages=STAGES):
                k = tl.multiple_of(k0, 16) + tl.arange(0, BK)
                x = _columns(source, line, o0 + k, bound, PITCH)
                z = tl.dot(_gauss(k[None, :] - margin, i[:, None], root, radius), x, z)
            inside = (o0 + i < COUNT)[:, None] & (m < num_lines)[None, :]
            place = target + (o0 + i)[:, None] * TARGET_PITCH + m[None, :]
            tl.store(place, (z * norm).to(tl.float16), mask=inside)


@triton.jit
def _tone(z, factor, mean, gamma, DEVICE: tl.constexpr):
    """Contrast about the view's mean, then gamma."""
    z = tl.minimum(tl.maximum(factor * z + (1.0 - factor) * mean, 0.0), 255.0)
    if gamma != 1.0:  # black stays 0: log2(0) is -inf, and exp2(-inf) is 0
        z = z * (1.0 / 255.0)
        if DEVICE:  # one instruction; tl.log2 takes twenty
            z = tl.inline_asm_elementwise(
                "lg2.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            z = tl.log2(z)
        z = tl.exp2(gamma * z) * 255.0
    return z


@triton.jit
def _noise(seed, y, x4):
    """The reference's noise of pixels 4 x4 .. 4 x4 + 3 of rows y: (Y, 4 X4)."""
    c1 = y[:, None] + tl.zeros_like(x4)[None, :]
    c0 = x4[None, :] + tl.zeros_like(c1)
    zero = tl.zeros_like(c0)
    a, b, c, d = tl.philox(seed, c0, c1, zero, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(c0.shape[0], 4 * c0.shape[1])
    pairs = (words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)
    total = (pairs + (pairs >> 16)) & 0xFFFF
    return (total.to(tl.int32) - 510).to(tl.float32) * (1.0 / _NOISE_STD)


@triton.jit(do_not_specialize=["num_frames", "num_views"])
def augment_kernel(
    frames, index, table, out, scratch, num_frames, num_views, white, black,
    S: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    A_PITCH: tl.constexpr, B_PITCH: tl.constexpr, SCRATCH: tl.constexpr,
    BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    DEVICE: tl.constexpr,
):  # fmt: skip
    """Views, distributed over as many programs as the device can hold at once."""
    # Scratch matrices of fp16: a (w, S rows or h + 2 margins) and b (h, w + 2 margins).
    a = scratch + tl.program_id(0).to(tl.int64) * SCRATCH
    b = a + W * A_PITCH
    for view in tl.range(tl.program_id(0), num_views, tl.num_programs(0), disable_licm=True):
        v = tl.cast(view, tl.int64)
        # In the order of reference.PARAMS.
        p = table + v * _NUM_COLUMNS
        top, left, height, width = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)
        flip, brightness = tl.load(p + 4) > 0, tl.load(p + 5)
        factor, gamma, sigma = tl.load(p + 6), tl.load(p + 7), tl.load(p + 8)
        solarize, near, far = tl.load(p + 9), tl.load(p + 10), tl.load(p + 11)
        speckle, seed = tl.load(p + 12), tl.load(p + 13)
        which = tl.load(index + v).to(tl.int64)

        column = tl.arange(0, 16)
        row = tl.load(p + column, mask=column < _NUM_COLUMNS, other=0.0)
        fits = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
        fits &= (top + height <= S + _TOLERANCE) & (left + width <= S + _TOLERANCE)
        fits &= (which >= 0) & (which < num_frames) & (tl.sum(row * 0.0, 0) == 0.0)
        which = tl.where(fits, which, 0)
        top, left = tl.where(fits, top, 0.0), tl.where(fits, left, 0.0)
        height, width = tl.where(fits, height, 1.0), tl.where(fits, width, 1.0)
        sigma = tl.where(fits, sigma, 0.0)

        blurred = sigma > 0.0
        # A Gaussian narrower than this is a single pixel; the bound keeps distance / sigma finite.
        sigma = tl.maximum(sigma, 0.01)
        margin = tl.where(blurred, tl.minimum(tl.ceil(3.0 * sigma).to(tl.int32), _MAX_RADIUS), 0)
        margin = (margin + 15) // 16 * 16

        # Rows of the frame that the box touches, extended to multiples of 16 at both ends.
        row0 = tl.floor(top + _TOLERANCE).to(tl.int32) // 16 * 16
        rows = tl.ceil(top + height - _TOLERANCE).to(tl.int32) - row0
        rows = tl.multiple_of((rows + 15) // 16 * 16, 16)
        frame = frames + which * (S * S)
        _resize(
            frame, a, S, row0, rows, left, width, flip, 1.0, 0,
            S, W, S, A_PITCH, False, BO, BM, BK, COLUMN_TAPS, STAGES,
        )  # fmt: skip
        tl.debug_barrier()
        total = _resize(
            a, b, rows, -margin, W + 2 * margin, top - row0, height, False, brightness, margin,
            W, H, A_PITCH, B_PITCH, True, BO, BM, BK, ROW_TAPS, STAGES,
        )  # fmt: skip
        pivot = total * (1.0 / (H * W))
        tl.debug_barrier()

        if blurred:
            wide = W + 2 * margin
            for y0 in tl.range(0, H, BY, disable_licm=True):
                y = y0 + tl.arange(0, BY)
                for x0 in tl.range(0, wide, BX, disable_licm=True):
                    x = x0 + tl.arange(0, BX)
                    place = b + y[:, None] * B_PITCH + x[None, :]
                    inside = (y < H)[:, None] & (x < wide)[None, :]
                    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
                    tl.store(
                        place, _tone(z, factor, pivot, gamma, DEVICE).to(tl.float16), mask=inside
                    )
            tl.debug_barrier()
            _blur(
                b, a, -margin, H + 2 * margin, sigma, margin,
                H, W, B_PITCH, A_PITCH, BO, BM, BK, STAGES,
            )  # fmt: skip
            tl.debug_barrier()
            _blur(a, b, 0, W, sigma, margin, W, H, A_PITCH, B_PITCH, BO, BM, BK, STAGES)
            tl.debug_barrier()

        zero = tl.where(fits, black, float("nan"))
        for y0 in tl.range(0, H, BY, disable_licm=True):
            y = y0 + tl.arange(0, BY)
            depth = (y.to(tl.float32) + 0.5) * (1.0 / H)
            gain = near + (far - near) * depth
            for x0 in tl.range(0, W, BX, disable_licm=True):
                x = x0 + tl.arange(0, BX)
                inside = (y < H)[:, None] & (x < W)[None, :]
                z = tl.load(b + y[:, None] * B_PITCH + x[None, :], mask=inside, other=0.0)
                z = z.to(tl.float32)
                if not blurred:
                    z = _tone(z, factor, pivot, gamma, DEVICE)
                z = tl.where(z >= solarize * 255.0, 255.0 - z, z)
                z = tl.minimum(z * gain[:, None], 255.0)
                if speckle > 0.0:
                    noise = _noise(seed.to(tl.int32), y, x0 // 4 + tl.arange(0, BX // 4))
                    z = tl.minimum(tl.maximum(z * (1.0 + speckle * noise), 0.0), 255.0)
                place = out + v * (H * W) + y[:, None] * W + x[None, :]
                tl.store(place, (z * white + zero).to(out.dtype.element_ty), mask=inside)


def _round_up(n: int, to: int = 16) -> int:
    return -(-n // to) * to


def plan(store: int, size: tuple[int, int]) -> dict[str, int]:
    """Compile-time constants for frames of side `store` and views of `size`."""
    h, w = size
    a_pitch = max(_round_up(store), _round_up(h) + 2 * MAX_RADIUS)
    b_pitch = _round_up(w) + 2 * MAX_RADIUS
    return {
        "S": store,
        "H": h,
        "W": w,
        "A_PITCH": a_pitch,
        "B_PITCH": b_pitch,
        "SCRATCH": _round_up(w * a_pitch + h * b_pitch, 64),
        # A product's tile, o by m, and its step along k. With 8 warps, two programs fit on a
        # multiprocessor of sm_90 and sm_100. Twice the BM would halve the weights to compute, but
        # needs the registers of both programs; half the BO is too small for sm_90's products.
        "BO": 64,
        "BM": 128 if max(store, h, w) > 64 else 64,
        "BK": 32,
        "STAGES": 3,
        # Room for 2 max(scale, 1) + 2 pixels: a triangle and partial pixels at both ends.
        "ROW_TAPS": power_of_2(2 * max(store / h, 1) + 2),
        "COLUMN_TAPS": power_of_2(2 * max(store / w, 1) + 2),
        # The tile of the elementwise steps: 8 pixels per thread, one 16-byte load.
        "BY": 8 if w > 128 else 16,
        "BX": 256 if w > 128 else 128,
    }


def augment_gpu(
    frames: Tensor, index: Tensor, params: Tensor, out: Tensor, *, mean: float, std: float
) -> None:
    """(B, S, S) uint8, (V,) int64, (V, P) float32 -> out (V, 1, h, w), which is overwritten.

    All tensors are contiguous and on one device; out is float32 or bfloat16. One launch on the
    current stream; the host does not wait.
    """
    num_views, store = len(index), frames.shape[-1]
    if num_views == 0:
        return
    meta = plan(store, tuple(out.shape[2:]))
    cores = 1  # of the interpreter
    if frames.is_cuda:
        cores = torch.cuda.get_device_properties(frames.device).multi_processor_count
    programs = min(num_views, PROGRAMS * cores)
    scratch = torch.empty((programs, meta["SCRATCH"]), dtype=torch.float16, device=frames.device)
    with torch.cuda.device_of(frames):  # Triton launches on the current device
        augment_kernel[(programs,)](
            frames, index, params, out, scratch, len(frames), num_views,
            1 / (255 * std), -mean / std, **meta,
            DEVICE=isinstance(augment_kernel, triton.JITFunction),  # not the interpreter
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
