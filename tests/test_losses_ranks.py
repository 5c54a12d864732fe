"""Losses across ranks: on every rank the joint batch's loss, and its gradient at the own rows.

Three processes over gloo on 127.0.0.1: as three ranks, and two of them as a group. An
implementation that adds statistics over the ranks outside the gradient, as several public ones
do, has its gradient too small by the number of ranks, and fails here.
"""

import os
import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sslus.kernels import ranks
from sslus.kernels.mask import Mask
from sslus.kernels.moments import moments
from sslus.kernels.op import OPS, Op, load_all

ROWS = 4  # on each rank
SCALARS = {
    "vicreg": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
    "barlow": {"off_diagonal": 0.0051},
    "ntxent": {"temperature": 0.1},
    "infonce_queue": {"temperature": 0.1},
    "byol": {},
    "masked_mse": vars(Mask(patch=2, background=0.3)) | {"hole": 1.0, "rest": 0.25},
}
# Widths on both sides of the number of rows, and not divisible by the number of ranks.
CASES = [
    *[(name, [(ROWS, d)] * 2, 1) for name in ("vicreg", "barlow") for d in (3, 7, 40)],
    *[(name, [(ROWS, 40)] * 2, 1000) for name in ("vicreg", "barlow")],  # computed in float64
    *[("vicreg", [(ROWS, d), (ROWS, d), (ROWS,)], 1) for d in (3, 40)],
    ("vicreg", [(ROWS, 3), (ROWS, 3), None], 1),
    ("ntxent", [(ROWS, 5)] * 2, 1),
    ("infonce_queue", [(ROWS, 5), (ROWS, 5), (11, 5)], 1),
    ("byol", [(ROWS, 5)] * 4, 1),
    ("masked_mse", [(ROWS, 1, 7, 6), (ROWS, 1, 7, 6), (ROWS,)], 1),
    ("vicreg", [(ROWS, 40)] * 2, (1000, 1)),  # of one view alone
    ("barlow", [(2, 3)] * 2, 1),  # not a batch of two, which would be another formula
]


def joined(name, shapes, dominant, world):
    """The whole batch; a queue is not part of it."""
    g = torch.Generator().manual_seed(0)
    out = []
    for i, shape in enumerate(shapes):
        if shape is None:  # left out
            out.append((None, False))
            continue
        rows, *rest = shape
        batched = OPS[name].num_batched is None or i < OPS[name].num_batched
        x = torch.randn(rows * world if batched else rows, *rest, generator=g) + 0.3
        if rest:
            x[:, 0] *= dominant[i] if isinstance(dominant, tuple) else dominant
        out.append((x, batched))
    return out


def gradients(name, which, tensors, group=None):
    op = OPS[name]
    leaves = [
        t if t is None else t.clone().requires_grad_(i < op.num_gradients)
        for i, t in enumerate(tensors)
    ]
    named = {"weights": leaves[2]} if name == "vicreg" and len(leaves) > 2 else {}
    loss = op.run(which, *leaves[: 2 if named else None], group=group, **named, **SCALARS[name])
    (3 * loss).backward()
    return loss.detach(), [t.grad for t in leaves[: op.num_gradients]]


def check(rank, world, group, alone):
    for i, (name, shapes, dominant) in enumerate(CASES):
        batch = joined(name, shapes, dominant, world)
        num = shapes[0][0]
        rows = slice(rank * num, (rank + 1) * num)
        own = [x[rows] if batched else x for x, batched in batch]
        for which in ("cpu", "reference", "gpu"):
            if OPS[name].why_not(which, own[0]):  # gpu: runs here in Triton's interpreter alone
                continue
            loss, grads = gradients(name, which, own, group)
            want, want_grads = alone[world, i]
            assert abs(loss - want) <= 1e-5 * abs(want), (name, which, loss, want)
            for g, w in zip(grads, want_grads, strict=True):
                error = (g - w[rows]).abs().max() / w.abs().max()
                assert error <= 1e-5, (name, which, shapes, world, error)


def uneven(rank):
    for name in SCALARS:
        z = [torch.ones(3 + (rank == 1), 4)] * (2 + 2 * (name == "byol") + (name[0] in "im"))
        for which in ("cpu", "reference"):
            with pytest.raises(ValueError, match=r"same \(N, D\) on every rank, got .*\(4, 4\)"):
                gradients(name, which, z)


def empty(rank):
    """The others must not wait for the rank that has nothing."""
    z = torch.ones(3 * (rank == 0), 4)
    for which in ("cpu", "reference"):
        with pytest.raises(ValueError, match=r"same \(N, D\) on every rank, got .*\(0, 4\)"):
            gradients("barlow", which, [z, z])


def remembered(rank):
    """Where asking the others would wait for a GPU, they ask once, and then look for themselves."""
    z = torch.ones(3 + (rank == 1), 5)
    with mock.patch.object(ranks, "_asks_once", lambda z: True):
        for _ in range(2):  # what was wrong is not taken for granted later
            with pytest.raises(ValueError, match="same .* on every rank, got"):
                gradients("barlow", "cpu", [z, z])
        z = torch.ones(3, 5)
        gradients("barlow", "cpu", [z, z])
        gradients("barlow", "cpu", [z[:, :4], z[:, :4]])  # another model
        with mock.patch.object(dist, "all_gather", side_effect=AssertionError("asked again")):
            gradients("barlow", "cpu", [z, z])
            if rank == 1:  # the others would not answer
                with pytest.raises(ValueError, match="want 3 rows .* got 2: drop the last, uneven"):
                    gradients("barlow", "cpu", [z[:2], z[:2]])


def compiled(rank, alone):
    from sslus.kernels.vicreg import vicreg_loss

    batch = joined(*CASES[0], 3)
    leaves = [x[rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_() for x, _ in batch]
    step = lambda a, b: 3 * vicreg_loss(a, b, **SCALARS["vicreg"])  # noqa: E731
    if rank == 0:  # one is enough
        step = torch.compile(step, fullgraph=True, backend="eager")
    step(*leaves).backward()
    want = alone[3, 0][1][0]
    assert (leaves[0].grad - want[rank * ROWS :][:ROWS]).abs().max() <= 1e-5 * want.abs().max()


def terms(rank, alone):
    from sslus.kernels.vicreg import vicreg_terms

    batch = [x for x, _ in joined(*CASES[1], 3)]
    loss = alone[3, 1][0]
    weights = SCALARS["vicreg"]
    own = [x[rank * ROWS : (rank + 1) * ROWS] for x in batch]
    with mock.patch.object(dist, "all_gather", side_effect=AssertionError("rows are gathered")):
        got = vicreg_terms(*own, loss, **weights)
        far = moments(*(x + 1000 for x in own), ranks.Ranks(dist.group.WORLD))
    a, b = batch
    far = (*far.variances, far.of_difference)
    for x, z in zip(far, ((a + 1000), (b + 1000), a - b), strict=True):
        torch.testing.assert_close(x, z.var(0, correction=0), rtol=1e-3, atol=1e-6)
    assert torch.isclose(got["invariance"], (a - b).square().mean())
    assert torch.isclose(sum(weights[k] * v for k, v in got.items()), loss)


def decided(rank, alone):
    """Whether sums cancel is decided once: a kernel of another opinion would find no sums."""
    if not os.environ.get("TRITON_INTERPRET"):
        return
    for i in (6, 7):  # with a dominant column, D > N
        name, shapes, dominant = CASES[i]
        own = [x[rank * ROWS :][:ROWS] for x, _ in joined(name, shapes, dominant, 3)]
        with mock.patch("sslus.kernels.gram_gpu.LEFT", 0):
            loss, grads = gradients(name, "gpu", own)
        want, want_grads = alone[3, i]
        assert abs(loss - want) <= 1e-2 * abs(want), (name, loss, want)
        for g, w in zip(grads, want_grads, strict=True):
            error = (g - w[rank * ROWS :][:ROWS]).abs().max() / w.abs().max()
            assert error <= 1e-2, (name, error)


def work(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    load_all()
    try:
        alone = {
            (world, i): gradients(case[0], "reference", [x for x, _ in joined(*case, world)])
            for world in (2, 3)
            for i, case in enumerate(CASES)
        }
        store = dist.FileStore(str(folder / "store"), 3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
        check(rank, 3, None, alone)
        uneven(rank)
        empty(rank)
        remembered(rank)
        compiled(rank, alone)
        terms(rank, alone)
        decided(rank, alone)
        pair = dist.new_group([0, 1])
        if rank < 2:
            check(rank, 2, pair, alone)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the others would wait for this one


def test_two_and_three_ranks_are_one_batch(tmp_path, start_ranks):
    load_all()
    assert set(SCALARS) == {op.name for op in OPS.values() if isinstance(op, Op)}
    try:
        start_ranks(work, (tmp_path,), 3)
    except mp.ProcessExitedException:
        pytest.fail("\n".join(p.read_text() for p in sorted(tmp_path.glob("error-*"))))
