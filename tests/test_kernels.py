"""Every implementation of every loss against float64, by one rule.

A kernel may be at most twice as far from the float64 answer as the plain PyTorch reference run
in the kernel's own dtype (the rule of flash-attention's tests), for the loss and each gradient,
and 1e-6 of the largest entry more, since the reference may happen to be exact.
The reference itself is held against an oracle written from the paper, without autograd.
"""

import contextlib
import copy
import importlib.util
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from sslus.kernels import _cpu
from sslus.kernels.moments import moments
from sslus.kernels.op import CHOICES, OPS, Op, load_all
from sslus.kernels.products import standardised
from sslus.kernels.ranks import Ranks

load_all()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LOSSES = [op for op in OPS.values() if isinstance(op, Op)]
CASES = [
    pytest.param(op, case, id=f"{op.name}-{k}") for op in LOSSES for k, case in enumerate(op.cases)
]


def vicreg_oracle(za, zb, pairs=None, *, invariance, variance, covariance):
    """Equations 1 to 6 of arXiv:2105.04906 in float64, with numpy's own covariance."""
    n, d = za.shape
    pairs = np.ones(n) if pairs is None else pairs
    loss = (
        invariance
        * sum(w * np.sum((a - b) ** 2) for w, a, b in zip(pairs, za, zb, strict=True))
        / (n * d)
    )
    for z in (za, zb):
        cov = np.cov(z, rowvar=False).reshape(d, d)
        for i in range(d):
            loss += variance * max(0.0, 1 - np.sqrt(cov[i, i] + 1e-4)) / d / 2
            loss += covariance * sum(cov[i, j] ** 2 for j in range(d) if j != i) / d
    return loss


def barlow_oracle(za, zb, *, off_diagonal):
    """Equations 1 and 2 of arXiv:2103.03230, an entry of C at a time."""
    n, d = za.shape
    a, b = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (za, zb))
    c = [[sum(a[:, i] * b[:, j]) / n for j in range(d)] for i in range(d)]
    loss = sum((c[i][i] - 1) ** 2 for i in range(d))
    return loss + off_diagonal * sum(c[i][j] ** 2 for i in range(d) for j in range(d) if i != j)


def cosine(u, v):
    return u @ v / np.sqrt((u @ u) * (v @ v))


def ntxent_oracle(za, zb, *, temperature):
    """Equation 1 of arXiv:2002.05709, in which k runs over all views but i."""
    z, n = np.concatenate([za, zb]), len(za)
    loss = 0.0
    for i in range(2 * n):
        s = {k: cosine(z[i], z[k]) / temperature for k in range(2 * n) if k != i}
        top = max(s.values())
        loss += top + np.log(sum(np.exp(x - top) for x in s.values())) - s[(i + n) % (2 * n)]
    return loss / (2 * n)


def infonce_queue_oracle(q, k, queue, *, temperature):
    """Equation 1 of arXiv:1911.05722, whose keys are of unit length."""
    loss = 0.0
    for x, key in zip(q, k, strict=True):
        positive = cosine(x, key) / temperature
        s = np.append(queue @ x / np.linalg.norm(x) / temperature, positive)
        loss += s.max() + np.log(np.exp(s - s.max()).sum()) - positive
    return loss / len(q)


def byol_oracle(pa, pb, ta, tb):
    """Equation 2 of arXiv:2006.07733, both directions."""
    cosines = [cosine(p, t) for ps, ts in ((pa, tb), (pb, ta)) for p, t in zip(ps, ts, strict=True)]
    return sum(2 - 2 * c for c in cosines) / len(pa)


def masked_mse_oracle(prediction, target, ids, *, hole, rest, **mask):
    """The rules of kernels/mask/reference.py, a cell at a time."""
    loss = weights = 0.0
    for p, t, sample in zip(prediction[:, 0], target[:, 0], ids.astype(int).tolist(), strict=True):
        w = np.where(hidden_oracle(t, sample, **mask), hole, rest)
        loss, weights = loss + (w * (p - t) ** 2).sum(), weights + w.sum()
    return loss / weights


def philox(counter, key):
    """Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section
    3.3: in a round two of the four words are multiplied, their high halves mixed with the others
    and with the key, whose two words then go on by the golden ratio and by the root of 3."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        (high, low), (high2, low2) = divmod(0xD2511F53 * a, 2**32), divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high2 ^ b ^ k, low2, high ^ d ^ m, low
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(
    "counter, key, want",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_the_oracles_random_words_are_the_papers(counter, key, want):
    """kat_vectors of the authors' Random123."""
    counter, key, want = ([int(x, 16) for x in words.split()] for words in (counter, key, want))
    assert philox(counter, key) == tuple(want)


def hidden_oracle(t, sample, *, kind, patch, ratio, num, min_side, max_side, background, share):
    h, w = t.shape
    cells = [(y, x) for y in range(0, h, patch) for x in range(0, w, patch)]
    square = lambda y, x: np.s_[y : y + patch, x : x + patch]  # noqa: E731
    lit = {c for c in cells if (t[square(*c)] > background).mean() >= max(share, 1e-9)}

    def inside(y, x):
        row, column = [b for a, b in lit if a == y], [a for a, b in lit if b == x]
        return row and column and min(row) <= x <= max(row) and min(column) <= y <= max(column)

    high, low = (sample >> 32) & 0xFFFFFFFF, sample & 0xFFFFFFFF
    words = {c: philox([i, high, 0, 0], [low, 0]) for i, c in enumerate(cells)}
    sector = [c for c in cells if not lit or inside(*c)]
    ranked = sorted(sector, key=lambda c: (words[c][0] >> 11, c))
    hidden, allowed = np.zeros((2, h, w), bool)
    if kind == "patches":
        for c in ranked[: max(1, int(ratio * len(ranked) + 0.5))]:
            hidden[square(*c)] = True
        return hidden
    for c in ranked[:num]:
        edges = []
        numbers = (words[c][1], words[c][3] >> 16), (words[c][2], words[c][3] & 0xFFFF)
        for side, start, (size, place) in zip((h, w), c, numbers, strict=True):
            low, high = (min(max(round(s * side), 1), side) for s in (min_side, max_side))
            size = low + size * (high - low + 1) // 2**32
            middle = start + place * min(patch, side - start) // 2**16
            first = min(max(middle - size // 2, 0), side - size)
            edges.append(slice(first, first + size))
        hidden[tuple(edges)] = True
    for c in sector:
        allowed[square(*c)] = True
    return hidden & allowed


ORACLES = {
    "vicreg": vicreg_oracle, "barlow": barlow_oracle, "ntxent": ntxent_oracle,
    "infonce_queue": infonce_queue_oracle, "byol": byol_oracle,
    "masked_mse": masked_mse_oracle,
}  # fmt: skip


def inputs(case, dtype, device="cpu", kind="plain", seed=0):
    """Rows of unequal scale about an offset: dead and alive dimensions, and no zero mean."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for shape in case["tensors"]:
        x = torch.randn(shape, generator=g) * torch.linspace(0.1, 2, shape[-1]) + 0.3
        if kind == "collapsed":
            x = 0.5 + 1e-3 * x
        elif kind in ("near", "identity") and out:
            x = out[0] + 1e-3 * x
        elif kind in ("white", "identity") and x.shape[0] > 2:
            # As little correlation as N and D allow.
            x = torch.nn.init.orthogonal_(x, generator=g) * 9
            x = torch.linalg.qr(x - x.mean(0))[0] * 9 if x.shape[0] > x.shape[1] else x
        elif kind == "dominant":  # nearly all of |cov|^2 is the square of one variance
            x[:, 0] *= 1000
        out.append(x)
    return [x.to(device, dtype) for x in out]


def value_and_grads(op, which, tensors, scalars, factor=3, around=None):
    """around: a context for the forward pass."""
    leaves = [t.detach().clone() for t in tensors]
    for leaf in leaves:
        leaf.requires_grad_(leaf.ndim > 1)  # weights that want a gradient are refused
    with around or contextlib.nullcontext():
        loss = op.run(which, *leaves, **scalars)
    (factor * loss).backward()  # 3: a backward that ignores its incoming gradient must fail
    assert all(leaf.grad is None for leaf in leaves[op.num_gradients :])
    return [loss.detach(), *(leaf.grad for leaf in leaves[: op.num_gradients])]


@pytest.mark.parametrize("op, case", CASES)
def test_reference_is_the_paper(op, case):
    exact = inputs(case, torch.float64)
    want = ORACLES[op.name](*(t.numpy() for t in exact), **case["scalars"])
    got = op.run("reference", *exact, **case["scalars"]).item()
    assert got == pytest.approx(want, rel=1e-12, abs=1e-14)
    # float32 may lose its last digits, no more; temperature 0.01 magnifies them.
    plain = op.run("reference", *(t.float() for t in exact), **case["scalars"])
    assert plain.dtype == torch.float32
    assert plain.item() == pytest.approx(want, rel=2e-6, abs=2e-6)


def small_cases():
    """The largest small case of each op, and the largest with pairs' weights."""
    for op in LOSSES:
        size = lambda case: np.prod(case["tensors"][0])  # noqa: E731
        for num in {len(case["tensors"]) for case in op.cases}:
            cases = [c for c in op.cases if len(c["tensors"]) == num and size(c) < 200]
            yield pytest.param(op, max(cases, key=size), id=f"{op.name}-{num}")


@pytest.mark.parametrize("op, case", list(small_cases()))
def test_reference_gradient(op, case):
    tensors = inputs(case, torch.float64)
    leaves = [t.requires_grad_() for t in tensors[: op.num_gradients]]
    assert torch.autograd.gradcheck(
        lambda *leaves: op.run("reference", *leaves, *tensors[len(leaves) :], **case["scalars"]),
        leaves,
    )


def implementation(which):
    missing = which == "gpu" and not (torch.cuda.is_available() or INTERPRET)
    if missing and os.environ.get("SSLUS_REQUIRE_GPU") == "1":
        raise RuntimeError("SSLUS_REQUIRE_GPU=1, but there is no CUDA device")
    skip = pytest.mark.skipif(missing, reason="no CUDA device and TRITON_INTERPRET is not 1")
    return pytest.param(which, marks=skip)


KERNELS = [implementation(which) for which in ("cpu", "gpu")]


def device_of(which):
    return "cuda" if which == "gpu" and torch.cuda.is_available() else "cpu"


def kernels():
    for op in LOSSES:
        for k, case in enumerate(op.cases):
            for which, marks in ((p.values[0], p.marks) for p in KERNELS):
                if getattr(op, which):
                    yield pytest.param(op, case, which, id=f"{op.name}-{which}-{k}", marks=marks)


def assert_parity(op, which, *draws, scalars):
    """draws: lists of tensors. What is wrong is added up over them, for the loss and each gradient:
    with a few numbers alone, the definition may be right by luck."""
    wrong = []
    for tensors in draws:
        truth = value_and_grads(op, "reference", [t.double() for t in tensors], scalars)
        plain = value_and_grads(op, "reference", tensors, scalars)
        kernel = value_and_grads(op, which, tensors, scalars)
        wrong.append([])
        for t, p, k in zip(truth, plain, kernel, strict=True):
            assert k.dtype == p.dtype and k.shape == p.shape
            # A GPU multiplies float32 as three products of tf32: the fourth, of the low parts, is
            # left out, and sums are cut off rather than rounded.
            least = 5e-6 if tensors[0].is_cuda and tensors[0].dtype == torch.float32 else 1e-6
            allowed = 2 * (p - t).abs().max() + least * t.abs().max() + 1e-12
            wrong[-1].append(torch.stack([(k - t).abs().max().double(), allowed.double()]))
    for found, allowed in sum(torch.stack(w) for w in wrong).tolist():
        assert found <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("op, case, which", list(kernels()))
def test_kernel_parity(op, case, which, strided, dtype):
    tensors = inputs(case, dtype, device_of(which))
    if strided:
        tensors = [t.mT.contiguous().mT if t.ndim >= 2 else t for t in tensors]
    assert_parity(op, which, tensors, scalars=case["scalars"])


# Both forms of vicreg and barlow, and enough rows and columns for planes of half precision.
TYPED = [(name, [shape] * 2) for name in ("vicreg", "barlow") for shape in ((64, 70), (70, 64))]
TYPED += [("ntxent", [(9, 48)] * 2), ("infonce_queue", [(9, 48), (9, 48), (70, 48)])]
TYPED += [("byol", [(9, 48)] * 4)]


MATRICES = ("vicreg", "barlow")


def typed(name, shapes, dtypes, device):
    tensors = inputs({"tensors": shapes}, torch.float32, device)
    tensors = [t.to(dtypes[i % 2]) for i, t in enumerate(tensors)]
    return OPS[name], tensors, OPS[name].cases[0]["scalars"]


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("name, shapes", TYPED)
def test_parity_where_every_other_input_is_of_another_type(name, shapes, which, first):
    """As a float32 queue is beside bfloat16 projections: neither is read as the other."""
    second = torch.bfloat16 if first == torch.float32 else torch.float32
    op, tensors, scalars = typed(name, shapes, (first, second), device_of(which))
    assert_parity(op, which, tensors, scalars=scalars)


@pytest.mark.parametrize("which", KERNELS[1:])
@pytest.mark.parametrize("name, shapes", TYPED)
def test_parity_in_float16(name, shapes, which):
    op, tensors, scalars = typed(name, shapes, (torch.float16,) * 2, device_of(which))
    assert_parity(op, which, tensors, scalars=scalars)


@pytest.mark.parametrize("which", [pytest.param("reference"), *KERNELS])
@pytest.mark.parametrize("name, shapes", TYPED)
def test_autocast_changes_nothing(name, shapes, which):
    """An op knows where it wants precision; autocast would round the factors of its products."""
    device = device_of(which)
    op, tensors, scalars = typed(name, shapes, (torch.float32,) * 2, device)
    want = value_and_grads(op, which, tensors, scalars)
    around = torch.autocast(device, torch.bfloat16)
    got = value_and_grads(op, which, tensors, scalars, around=around)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("which", ["auto", "reference", *KERNELS])
def test_an_empty_batch_is_refused(which):
    for op in LOSSES:
        shapes = [(0, *shape[1:]) for shape in op.cases[0]["tensors"]]
        tensors = [torch.zeros(shape, device=device_of(which)) for shape in shapes]
        with pytest.raises(ValueError, match=f"op '{op.name}': the batch is empty") as error:
            op.run(which, *tensors, **op.cases[0]["scalars"])
        assert "\n" not in str(error.value)


SHAPES = [(2, 9), (3, 1), (65, 64), (64, 65), (257, 1030), (1030, 257), (17, 2053), (4096, 7)]
SHAPES += [(640, 600), (4096, 1)]


KINDS = ["collapsed", "near", "white", "dominant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_parity_where_sums_cancel(name, shape, kind):
    """Both forms, where all minus diagonal, or one minus a correlation, would lose digits."""
    assert_parity_of_terms(name, "cpu", shape, kind, torch.float32)


@pytest.mark.parametrize("shape", [(65, 64), (64, 65), (512, 1024), (1030, 257)], ids=str)
def test_parity_where_barlow_twins_is_at_its_goal(shape):
    """White views that agree: the correlation is the identity, and all terms are remainders."""
    assert_parity_of_terms("barlow", "cpu", shape, "identity", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ntxent", "infonce_queue"])
def test_parity_over_several_bands(name, dtype, monkeypatch):
    """Logits made again for the gradient, and sums rescaled when a later band has a larger one."""
    module = importlib.import_module(f"sslus.kernels.{name}.cpu")
    monkeypatch.setattr(module, "BAND", {"ntxent": 200, "infonce_queue": 64}[name])
    shapes = [(33, 20), (33, 20)] + [(300, 20)] * (name == "infonce_queue")
    tensors = inputs({"tensors": shapes}, dtype)
    assert_parity(OPS[name], "cpu", tensors, scalars={"temperature": 0.1})


@pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRET),
    reason="no CUDA device and TRITON_INTERPRET is not 1",
)
@pytest.mark.parametrize(
    "shape, dtype",
    [
        *((s, torch.float32) for s in [(2, 9), (3, 1), (20, 19), (19, 20), (9, 60)]),
        # Smaller ones, or narrower, are multiplied as float32.
        *((s, torch.bfloat16) for s in [(2, 9), (20, 19), (9, 60), (64, 70), (70, 64)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_gpu_parity_where_sums_cancel(name, shape, kind, dtype):
    if (name, shape, kind) == ("vicreg", (20, 19), "white") and torch.cuda.is_available():
        pytest.skip("the definition is off by 8 % there, and what is right is a matter of luck")
    assert_parity_of_terms(name, "gpu", shape, kind, dtype)


@pytest.mark.parametrize("which", KERNELS)
def test_weights_count_where_sums_cancel(which):
    shapes = {"tensors": [(9, 60)] * 2}
    tensors = inputs(shapes, torch.float32, device_of(which), "dominant")
    weights = torch.linspace(0, 2, 9, device=device_of(which))
    assert_parity(OPS["vicreg"], which, [*tensors, weights], scalars=OPS["vicreg"].defaults)


@pytest.mark.parametrize("which", KERNELS[1:])
def test_two_planes_of_half_precision_keep_what_is_promised(which):
    """Below 1e-6. The squares on the diagonal of K are all positive: what is left out of them adds
    up, to 5e-6 where K has no products of two low planes."""
    g = torch.Generator().manual_seed(0)
    z = [torch.randn(64, 256, generator=g).bfloat16().to(device_of(which)) for _ in "ab"]
    alone = {"invariance": 0.0, "variance": 0.0, "covariance": 1.0}
    want = OPS["vicreg"].run("reference", *(x.double() for x in z), **alone).item()
    assert OPS["vicreg"].run(which, *z, **alone).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_two_is_exact(kind, which):
    """Two standardised rows are u and -u: 1 - u^2 is a difference in which the definition in
    float32 keeps four digits, or none."""
    op, device = OPS["barlow"], device_of(which)
    for shape in ((2, 9), (2, 1)):
        tensors = inputs({"tensors": [shape, shape]}, torch.float32, device, kind)
        truth = value_and_grads(
            op, "reference", [t.double() for t in tensors], op.cases[0]["scalars"]
        )
        kernel = value_and_grads(op, which, tensors, op.cases[0]["scalars"])
        for k, t in zip(kernel, truth, strict=True):
            assert (k - t).abs().max() <= 2e-6 * t.abs().max()


def assert_parity_of_terms(name, which, shape, kind, dtype):
    op = OPS[name]
    device = device_of(which)
    several = 4 if which == "gpu" and INTERPRET else 16  # the interpreter takes 0.1 s a draw
    seeds = range(several if np.prod(shape) < 64 else 1)
    draws = [inputs({"tensors": [shape, shape]}, dtype, device, kind, seed) for seed in seeds]
    scalars = dict(op.cases[0]["scalars"])
    assert_parity(op, which, *draws, scalars=scalars)
    if name == "vicreg" and dtype == torch.float32:  # others must not hide the covariance
        assert_parity(op, which, *draws, scalars=scalars | {"invariance": 0.0, "variance": 0.0})


@pytest.mark.parametrize("n", [2, 5, 63, 300])
@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_parity_at_the_widest(name, n):
    """D = 16384, where the definition needs gigabytes: autograd of the N x N form in float64."""
    op = OPS[name]
    scalars = op.cases[0]["scalars"]
    za, zb = inputs({"tensors": [(n, 16384)] * 2}, torch.float32)
    kernel = value_and_grads(op, "cpu", [za, zb], scalars)
    leaves = [z.double().requires_grad_() for z in (za, zb)]
    x, y = (z - z.mean(0) for z in leaves)
    n, d = x.shape
    if name == "vicreg":
        loss = 25 * (leaves[0] - leaves[1]).square().mean()
        for z in (x, y):
            v = z.square().sum(0) / (n - 1)
            loss = loss + 12.5 * (1 - (v + 1e-4).sqrt()).clamp(min=0).mean()
            loss = loss + ((z @ z.T).square().sum() / (n - 1) ** 2 - v.square().sum()) / d
    else:
        x, y = (z / (z.square().mean(0) + 1e-5).sqrt() for z in (x, y))
        c = (x * y).mean(0)
        off = (x @ x.T * (y @ y.T)).sum() / n**2 - c.square().sum()
        loss = (c - 1).square().sum() + scalars["off_diagonal"] * off
    (3 * loss).backward()
    for t, k in zip([loss.detach(), *(z.grad for z in leaves)], kernel, strict=True):
        # At D = 4096 the definition in float32 is off by 2.6e-6.
        assert (k - t).abs().max() <= 5e-6 * t.abs().max()


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("kind", ["near", "identity"])
@pytest.mark.parametrize("shape", [(40, 100), (100, 40)])
def test_ntxent_where_the_views_agree(shape, kind, temperature):
    """Loss and gradient are what is left of sums that cancel."""
    tensors = inputs({"tensors": [shape] * 2}, torch.float32, kind=kind)
    assert_parity(OPS["ntxent"], "cpu", tensors, scalars={"temperature": temperature})


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("name, shapes", [case for case in TYPED if case[0] not in MATRICES])
def test_rows_too_short_to_be_normalised(name, shapes, which):
    """Their length counts as 1e-12, as in F.normalize, so they are not of length 1 afterwards."""
    tensors = inputs({"tensors": shapes}, torch.float32, device_of(which))
    tensors = [t * (1e-14 if i < 2 else 1) for i, t in enumerate(tensors)]
    assert_parity(OPS[name], which, tensors, scalars=OPS[name].cases[0]["scalars"])


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("shape", [(64, 129), (129, 64)], ids=str)
def test_a_correlation_near_one_keeps_its_digits(shape, which):
    """1 - C_jj is at most 1e-3 here: as a difference it would keep four digits, as in the
    definition. Without the other correlations, which would hide it."""
    op, scalars = OPS["barlow"], {"off_diagonal": 0.0}
    tensors = inputs({"tensors": [shape, shape]}, torch.float32, device_of(which), "near")
    truth = op.run("reference", *(t.double() for t in tensors), **scalars).item()
    assert op.run(which, *tensors, **scalars).item() == pytest.approx(truth, rel=2e-6)


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_the_shape_selects_the_form(name, monkeypatch):
    module, taken = importlib.import_module(f"sslus.kernels.{name}.cpu"), []
    for form in ("gram", "tiled"):
        result = lambda *_, form=form: (taken.append(form), (torch.zeros(()),))[1]  # noqa: E731
        monkeypatch.setattr(module, form, result)
    for n in (4, 5, 6):
        OPS[name].cpu(*torch.zeros(2, n, 5), **OPS[name].cases[0]["scalars"], ranks=Ranks())
    assert taken == ["gram", "tiled", "tiled"]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of Triton's interpreter
@pytest.mark.parametrize("which", [pytest.param("reference"), *KERNELS])
@pytest.mark.parametrize("name, shapes", TYPED)
def test_what_is_not_a_number_shows(name, shapes, which):
    """In the loss, by which divergence is noticed, whichever input it comes from."""
    op, clean, scalars = typed(name, shapes, (torch.float32,) * 2, device_of(which))
    for i in range(len(clean)):
        tensors = [t.clone() for t in clean]
        tensors[i][3, 2] = torch.nan
        loss, *grads = value_and_grads(op, which, tensors, scalars)
        assert loss.isnan() and any(g.isnan().any() for g in grads), i


def test_moments_of_what_is_not_finite_and_of_half_precision():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 9, 3, generator=g)
    z[0, 4, 1] = float("nan")
    found = moments(*z, Ranks())
    assert found.variances[0].isnan().tolist() == [False, True, False]
    assert found.of_difference.isnan().tolist() == [False, True, False]
    half = moments(*z[:, :4].half(), Ranks())
    want = moments(*z[:, :4].half().float(), Ranks())
    torch.testing.assert_close(half.variances, want.variances)
    mixed = moments(z[0, :4].half().float(), z[1, :4].half(), Ranks())
    torch.testing.assert_close(mixed, want)


@pytest.mark.parametrize("kind", ["plain", "collapsed", "near", "dominant", "outlier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (2, 257), (300, 600)], ids=str)
def test_moments(shape, dtype, kind):
    za, zb = inputs({"tensors": [shape] * 2}, torch.float32, kind=kind)
    if kind == "outlier":  # the first row, from which squares are taken, is the furthest
        za[0] += 1000
    za, zb = za.to(dtype).mT.contiguous().mT, zb.to(dtype)
    a, b = za.double(), zb.double()
    want = [a.mean(0), b.mean(0), *(x.var(0, correction=0) for x in (a, b, a - b))]
    means, variances, of_difference = moments(za, zb, Ranks())
    found = (*means, *variances, of_difference)
    for x, w, scale in zip(found, want, (a, b, a, b, a - b), strict=True):
        # A few roundings for each row: see moments_stripe in products.cpp.
        most = 2**-22 * scale.abs().amax(0)
        assert ((x - w).abs() <= most + len(za) * 2**-21 * w.abs() + most**2).all()


@pytest.mark.parametrize("eps", [None, 0.0, 0.5])
def test_columns_are_standardised_alike_in_both_precisions(eps):
    z = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    for found, want in zip(
        *(standardised(z, t, eps) for t in (torch.float32, torch.float64)), strict=True
    ):
        torch.testing.assert_close(found, want.float())


def test_the_border_of_the_products_refuses_what_does_not_fit():
    """The compiled functions trust nobody: they would read or write beyond a tensor's memory."""
    z, x, row, weights = torch.ones(9, 70), torch.ones(9, 70), torch.ones(70), torch.ones(9)
    for name, fits in [
        ("centre_columns", [z, x, row, 0.1, 1]),
        ("distance", [z, z, weights, 1]),
        ("spread_gradient", [z, z, weights, 1.0, z, 1.0, row, x, 1]),
        ("distances", [z, z, row, 1]),
        ("moments", [z, z, torch.ones(5, 70), 1]),
        ("cross_gradients", [x, x, x, x, row, 1.0, row, row, row, row, 1]),
    ]:
        function = getattr(_cpu, name)
        function(*fits)
        for i, right in enumerate(fits):
            if not isinstance(right, torch.Tensor):
                continue
            gaps = torch.ones(*right.shape, 2)[..., 0]
            for wrong in (right[..., :-1], right[:-1], gaps, right.double(), right.half()):
                with pytest.raises((ValueError, TypeError)):  # TypeError: else written to a copy
                    function(*fits[:i], wrong, *fits[i + 1 :])
        if name not in ("distance", "spread_gradient", "distances"):  # needs a first row
            with pytest.raises(ValueError, match="products: want"):
                function(*(t[:0] if t is z or t is x else t for t in fits))


def test_others_run_during_a_pass(others_run):
    """Such as the threads that load the next batch; all passes share one loop."""
    z, x = torch.ones(2, 2048, 4096)
    places = x.numpy()[-1, ::256]
    assert others_run(lambda: _cpu.centre_columns(z, x, z[0], -1.0, 1), places)


def test_a_failure_in_a_thread_is_an_exception():
    """Where memory runs out in a loop of OpenMP, which must not be left by an exception."""
    script = """if True:
        import torch
        from sslus.kernels import _cpu
        z = torch.zeros(1, 512).expand(1 << 48, 512)  # would be packed into 2^58 bytes
        for threads in (1, 2):
            try:
                _cpu.centre_columns(z, z, torch.zeros(512), -1.0, threads)
            except MemoryError:
                print(threads)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "2"]), done.stderr


class Held(TorchDispatchMode):
    """The most bytes held at a time but for the inputs."""

    def __init__(self, inputs):
        super().__init__()
        self.peak_bytes = 0
        self.held = WeakIdKeyDictionary({t.untyped_storage(): 0 for t in inputs})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.held.setdefault(x.untyped_storage(), x.untyped_storage().nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "n, d, kind",
    [
        *((256, 8192, kind) for kind in ("plain", "dominant")),
        *((512, 513, kind) for kind in ("plain", "dominant", "identity")),
        *((n, d, "plain") for n, d in [(1024, 2048), (512, 512), (1030, 1029)]),
    ],
)
@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_memory_of_a_step(name, n, d, kind, dtype):
    op = OPS[name]
    scalars = op.cases[0]["scalars"]
    views = inputs({"tensors": [(n, d)] * 2}, dtype, kind=kind)
    with Held(views) as forward:
        op.cpu(*views, **scalars, ranks=Ranks())
    leaves = [z.requires_grad_() for z in views]
    loss = op.run("cpu", *leaves, **scalars)  # as an op, into which the mode does not see
    saved = loss.grad_fn.saved_tensors
    with Held([*leaves, *saved]) as backward:
        torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    num_bytes = backward.peak_bytes + sum(t.nbytes for t in saved)
    assert 0 < max(forward.peak_bytes, num_bytes) <= 4 * 4 * (n * n + n * d)


@pytest.mark.parametrize("num_weights", [0, 1])
def test_memory_of_vicregs_tiled_form(num_weights):
    """3 N D + 512 D floats, and blocks of columns."""
    op, n, d = OPS["vicreg"], 2048, 1024
    tensors = inputs({"tensors": [(n, d)] * 2 + [(n,)] * num_weights}, torch.float32)
    with Held(tensors) as held:
        op.cpu(*tensors, **op.cases[0]["scalars"], ranks=Ranks())
    assert 0 < held.peak_bytes / 4 <= 3.5 * n * d + 512 * d


def test_a_queue_in_half_precision_is_not_copied_as_a_whole():
    module = importlib.import_module("sslus.kernels.infonce_queue.cpu")
    tensors = inputs({"tensors": [(8, 1024), (8, 1024), (8192, 1024)]}, torch.bfloat16)
    with Held(tensors) as held:
        OPS["infonce_queue"].cpu(*tensors, temperature=0.1, ranks=Ranks())
    # A copy of the whole queue would take 8 BAND floats.
    assert 0 < held.peak_bytes / 4 <= 3 * module.BAND


@pytest.mark.parametrize(
    "name, shapes, limit",
    [
        ("vicreg", [(40, 1100)] * 2, 1100**2 // 8),
        ("barlow", [(40, 1100)] * 2, 1100**2 // 8),
        ("vicreg", [(1100, 1099)] * 2, 1100**2),  # its gradients are that large
        ("barlow", [(1100, 1099)] * 2, 1100**2),
        ("infonce_queue", [(8, 16), (8, 16), (200_000, 16)], 200_000 * 16),
    ],
)
def test_the_large_matrix_is_never_made(name, shapes, limit, largest):
    op = OPS[name]
    tensors = [torch.randn(shape) for shape in shapes]
    with largest:
        op.cpu(*tensors, **op.cases[0]["scalars"], ranks=Ranks())
    # The queue itself is seen where it is sliced, so nothing may be larger than it.
    assert 0 < largest.numel <= limit


@pytest.mark.parametrize(
    "op, backend",
    [
        *(pytest.param(op, "aot_eager", id=op.name) for op in LOSSES if op.cpu),
        pytest.param(OPS["vicreg"], "inductor", id="vicreg-inductor"),
    ],
)
def test_compiled_without_a_break(op, backend):
    case = op.cases[-1]
    tensors = inputs(case, torch.float32)
    torch.library.opcheck(
        op.fused["cpu"],
        tuple(t.requires_grad_(i < op.num_gradients) for i, t in enumerate(tensors)),
        case["scalars"],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )

    def model(*leaves):
        loss = op(*(2 * z for z in leaves), *tensors[len(leaves) :], **case["scalars"])
        return 3 * loss

    want = [t.detach().clone().requires_grad_() for t in tensors[: op.num_gradients]]
    got = [t.detach().clone().requires_grad_() for t in want]
    model(*want).backward()
    torch.compile(model, fullgraph=True, backend=backend)(*got).backward()
    torch.testing.assert_close([t.grad for t in got], [t.grad for t in want], rtol=0, atol=0)


@pytest.fixture
def toy_op():
    def reference(x: torch.Tensor) -> torch.Tensor:
        return (x**2).sum()

    def kernel(x, ranks):
        return (x**2).sum(), 2 * x

    op = Op("toy", reference=reference, cpu=kernel, num_gradients=1)
    yield op
    del OPS["toy"]


def test_dispatch_uses_the_kernel_and_scales_its_gradient(toy_op, monkeypatch):
    x = torch.randn(3, 4)
    assert toy_op.choose(x) == "cpu" and toy_op.choose(x.double()) == "reference"
    for choice in ("auto", "cpu", "reference"):
        monkeypatch.setenv("SSLUS_KERNELS", choice)
        leaf = x.clone().requires_grad_()
        (3 * toy_op(leaf)).backward()
        torch.testing.assert_close(leaf.grad, 6 * x)


def test_a_module_that_holds_an_op_can_be_copied():
    """For a teacher, say, or another process, in which no op was imported yet."""
    model = torch.nn.Identity()
    for op in LOSSES:
        model.loss = op
        assert copy.deepcopy(model).loss is op is pickle.loads(pickle.dumps(model)).loss
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).name)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(op), capture_output=True)
    assert done.stdout.decode() == f"{op.name}\n", done.stderr


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("name, shapes", TYPED)
def test_derivatives_that_an_op_does_not_have_are_refused(name, shapes, which):
    """A gradient penalty or a forward-mode derivative would silently be another number."""
    op, tensors, scalars = typed(name, shapes, [torch.float32] * 2, device_of(which))
    leaf = tensors[0].requires_grad_()
    loss = op.run(which, *tensors, **scalars)
    with pytest.raises(RuntimeError, match="no second derivative; SSLUS_KERNELS=reference has"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda z: op.run(which, z, *tensors[1:], **scalars),
            (leaf.detach(),),
            (torch.ones_like(leaf),),
        )
    for number in op.numbers.keys() & scalars.keys():  # a temperature that is learned, say
        learned = scalars | {number: torch.tensor(float(scalars[number]), requires_grad=True)}
        with pytest.raises(RuntimeError, match=f"no derivative by {number}; SSLUS_KERNELS=ref"):
            op.run(which, *tensors, **learned)
        op.run("reference", *tensors, **learned).backward()
        assert learned[number].grad != 0
        with torch.no_grad():
            assert torch.equal(op.run(which, *tensors, **learned), loss)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("large", ["ab", "a", "b"])
@pytest.mark.parametrize("shape", [(600, 20), (40, 9), (20, 600)])
def test_variances_that_overflow_are_no_perfect_loss(shape, large, which):
    """Divided by them, all columns are 0 and agree. NaN is a good answer, 0 is not."""
    tensors = inputs({"tensors": [shape] * 2}, torch.float32, device_of(which))
    tensors = [1e20 * z if view in large else z for view, z in zip("ab", tensors, strict=True)]
    op = OPS["barlow"]
    truth, loss = (
        value_and_grads(op, how, given, op.cases[0]["scalars"])[0]
        for how, given in (("reference", [z.double() for z in tensors]), (which, tensors))
    )
    assert loss.isnan() or loss == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("other", [torch.complex64, torch.int64, torch.float16, torch.float64])
def test_every_matrix_has_to_have_a_type_that_is_taken(other):
    z = torch.randn(9, 4)
    for name, num in [("barlow", 2), ("ntxent", 2), ("byol", 4), ("infonce_queue", 3)]:
        tensors = [z] * (num - 1) + [z.to(other)]
        with pytest.raises(ValueError, match=f"cpu' cannot run: it takes .*, not {other}"):
            OPS[name].run("cpu", *tensors, **OPS[name].cases[0]["scalars"])
        if other == torch.float64:  # for which `auto` takes the reference
            found, want = (
                OPS[name](*ts, **OPS[name].cases[0]["scalars"])
                for ts in (tensors, [t.double() for t in tensors])
            )
            assert found.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
            continue
        with pytest.raises(ValueError, match=f"not {other}: convert"):
            OPS[name](*tensors, **OPS[name].cases[0]["scalars"])


def test_the_authors_weights_are_the_defaults():
    za, zb = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
    for name, weights in (
        ("vicreg", {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}),
        ("barlow", {"off_diagonal": 0.0051}),
    ):
        for which in ("reference", "cpu"):
            assert torch.equal(
                OPS[name].run(which, za, zb), OPS[name].run(which, za, zb, **weights)
            )
        compiled = torch.compile(OPS[name], fullgraph=True, backend="eager")
        assert torch.equal(compiled(za, zb), OPS[name](za, zb, **weights))
    assert OPS["vicreg"](za, zb, covariance=0.0) < OPS["vicreg"](za, zb)


def test_a_named_choice_that_cannot_run_raises(toy_op, monkeypatch):
    x = torch.randn(3, 4)
    for choice, tensor, why in [
        ("gpu", x, "not written"),
        ("cpu", x.double(), "float64"),
        ("cuda", x, "want one of " + ", ".join(CHOICES)),
    ]:
        monkeypatch.setenv("SSLUS_KERNELS", choice)
        with pytest.raises(ValueError, match=why):
            toy_op(tensor)
    with pytest.raises(ValueError, match="already registered"):
        Op("toy", reference=lambda x: x)


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_losses_refuse_what_they_cannot_compare(which):
    for name, shapes, why in [
        ("vicreg", [(1, 4), (1, 4)], r"want two \(N, D\) tensors with N >= 2"),
        ("vicreg", [(4, 4), (4, 5)], r"want two \(N, D\) tensors"),
        ("vicreg", [(4, 4), (4, 4), (3,)], "want 4 weights"),
        ("barlow", [(4,), (4,)], r"want two \(N, D\) tensors"),
        ("ntxent", [(4, 4), (5, 4)], r"want two \(N, D\) tensors"),
        ("infonce_queue", [(4, 4), (4, 4), (9, 3)], r"a queue of \(M, D\)"),
        ("byol", [(4, 4), (4, 4), (4, 4), (4, 5)], r"want four \(N, D\) tensors"),
    ]:
        op = OPS[name]
        with pytest.raises(ValueError, match=why):
            op.run(which, *(torch.zeros(shape) for shape in shapes), **op.cases[0]["scalars"])
    for name in ("ntxent", "infonce_queue"):
        with pytest.raises(ValueError, match="greater than 0"):
            OPS[name].run(which, *[torch.ones(3, 3)] * (2 + (name != "ntxent")), temperature=0.0)
    z, learned = torch.randn(4, 3, device=device_of(which)), torch.ones(4, device=device_of(which))
    with pytest.raises(ValueError, match="vicreg: weights get no gradient; detach"):
        OPS["vicreg"].run(which, z, z, learned.requires_grad_())


@pytest.mark.parametrize("which", ["auto", "reference"])
def test_what_is_no_tensor_or_number_is_told_in_one_line(which):
    z, weights = torch.randn(8, 4), torch.ones(8)
    wanted = "want the tensors za, zb, weights=None, and by name invariance, variance, covariance; "
    for name, tensors, scalars, why in [
        ("vicreg", [z, z, 1.0], {}, f"{wanted}got Tensor, Tensor, float"),
        ("vicreg", [z], {}, f"{wanted}got Tensor"),
        ("vicreg", [], {}, f"{wanted}got nothing"),
        ("vicreg", [z, None], {}, f"{wanted}got Tensor, NoneType"),
        ("vicreg", [z.tolist(), z.tolist()], {}, f"{wanted}got list, list"),
        ("vicreg", [z, z, weights.numpy()], {}, f"{wanted}got Tensor, Tensor, ndarray"),
        ("vicreg", [z, z, weights, weights], {}, f"{wanted}got Tensor, Tensor, Tensor, Tensor"),
        ("vicreg", [z, z], {"invarance": 1.0}, f"{wanted}got Tensor, Tensor, invarance=float"),
        ("vicreg", [z, z], {"variance": None}, "want a number as variance, got None"),
        (
            "barlow",
            [z, z, 0.005],
            {},
            "want the tensors za, zb, and by name off_diagonal; got Te",
        ),
        (
            "ntxent",
            [z, z],
            {},
            "want the tensors za, zb, and by name temperature; got Tensor, Te",
        ),
        ("ntxent", [z, z], {"temperature": "0.1"}, "want a number as temperature, got '0.1'"),
        ("infonce_queue", [z, z, 0.2], {}, "want the tensors q, k, queue, and by name temperature"),
        ("byol", [z, z], {}, "want the tensors pa, pb, ta, tb; got Tensor, Tensor"),
    ]:
        with pytest.raises(TypeError) as e:
            OPS[name].run(which, *tensors, **scalars)
        assert str(e.value).startswith(f"{name}: {why}") and "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"^vicreg: weights get no gradient; detach\(\) them$"):
        OPS["vicreg"].run(which, z, -z, weights.requires_grad_())
    weights = weights.detach()
    by_name = OPS["vicreg"].run(which, zb=-z, za=z, weights=weights)
    assert torch.equal(by_name, OPS["vicreg"].run(which, z, -z, weights))


def test_the_weights_have_these_names_in_lightly():
    losses = pytest.importorskip("lightly.loss")
    z = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(
        OPS["vicreg"](*z, invariance=3.0, variance=5.0, covariance=7.0),
        losses.VICRegLoss(lambda_param=3.0, mu_param=5.0, nu_param=7.0)(*z),
    )
    torch.testing.assert_close(
        OPS["barlow"](*z, off_diagonal=0.02), losses.BarlowTwinsLoss(lambda_param=0.02)(*z)
    )
