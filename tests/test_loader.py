"""The loader: the same batches from every tier, made ahead, and nothing left behind."""

import dataclasses
import os
import shutil
import threading
import time
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch

from sslus.engine.errors import InputError
from sslus.engine.plan import nearby
from sslus.engine.shard import Settings, shard
from sslus.engine.store import FrameStore
from sslus.engine.stream import Reader
from sslus.kernels.mask import sample_ids
from sslus.ssl import loader as loaders
from sslus.ssl.loader import Batch, Loader, Views, open_store, plan_of, tier
from sslus.ssl.views import parse

CPU = torch.device("cpu")
PRESETS = parse("barlowtwins,p_speckle=0.5,speckle=0.2")


@pytest.fixture(scope="module")
def shards(many_shards):
    return many_shards


@pytest.fixture(scope="module")
def store(shards) -> FrameStore:
    return FrameStore.open(shards)


def batches_of(store, size=16, seed=3, epochs=(0, 1), start=0):
    plan = plan_of(store, size, seed)
    for epoch in epochs:
        for indices in plan.epoch(epoch, start if epoch == epochs[0] else 0):
            yield Batch(epoch, indices, indices)


def loader_of(store, batches, presets=PRESETS, **options) -> Loader:
    return Loader(store, batches, presets, size=24, seed=5, device=CPU, **options)


def run(store, batches, **options) -> list[Views]:
    with loader_of(store, batches, **options) as loader:
        return list(loader)


def equal(one: list[Views], other: list[Views]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True)
               if not a is b is None)  # fmt: skip


def test_every_tier_makes_the_same_batches(store):
    ram = run(store, batches_of(store), wanted_tier="ram")
    assert len(ram) == 2 * (len(store) // 16) and ram[0].va.shape == (16, 1, 24, 24)
    assert equal(ram, run(store, batches_of(store), wanted_tier="disk", threads=2, ahead=5))
    assert not equal(ram[:1], ram[1:2])


def test_stream_makes_the_batches_of_the_store(shards, store):
    """The store sorts by video; put in the order of the shards, it has the stream's numbers."""
    streamed = open_store(shards, "stream")
    many = run(streamed, batches_of(streamed), threads=3)
    assert equal(many, run(streamed, batches_of(streamed), threads=1, ahead=1))
    keys = [key for path in sorted(shards.glob("*.tar")) for key, _ in loaders_index(path)]
    names = [f"{store.video_ids[v]}-{f:06d}" for v, f in zip(store.video, store.frame, strict=True)]
    order = np.array([names.index(key) for key in keys])
    columns = {name: getattr(store, name)[order]
               for name in ("video", "frame", "time_seconds", "label", "patient")}  # fmt: skip
    same = FrameStore(
        np.memmap(store.frames.filename, np.uint8, "c", shape=store.frames.shape), **columns,
        video_ids=store.video_ids, label_names=store.label_names, mean=store.mean,
        std=store.std, digest=store.digest,
    )  # fmt: skip
    same.frames[:] = store.frames[order]
    assert equal(many, run(same, batches_of(streamed), wanted_tier="ram"))
    assert {int(x) for batch in many for x in batch.labels} == {0, 1}


@pytest.mark.parametrize("wanted", ["ram", "disk", "stream"])
def test_of_one_view_no_second_is_made(shards, wanted):
    store = open_store(shards, wanted)
    two = run(store, batches_of(store))
    with mock.patch.object(loaders, "views", wraps=loaders.views) as made:
        one = run(store, batches_of(store), presets=PRESETS[:1])
    assert {len(call.args[2]) for call in made.call_args_list} == {16}  # rows of parameters
    assert equal([batch._replace(vb=batch.va) for batch in two], one)


def loaders_index(path):
    from sslus.engine import tar

    return tar.read_index(path)


@pytest.mark.parametrize("wanted", ["ram", "disk", "stream"])
def test_a_resume_in_the_middle_goes_on_exactly(shards, wanted):
    store = open_store(shards, wanted)
    whole = run(store, batches_of(store))
    rest = run(store, batches_of(store, epochs=(0, 1), start=4), threads=2)
    assert equal(whole[4:], rest)
    with loader_of(store, batches_of(store)) as loader:
        batches = iter(loader)
        first = next(batches)
        assert equal([whole[0]] * 2, [first, loader.at_once(next(batches_of(store)))])
        assert equal(whole[1:], list(batches))
        assert wanted != "stream" or not loader.reader.shards  # all of them were let go


def test_ids_and_labels_belong_to_the_frames(store):
    for batch, got in zip(batches_of(store), run(store, batches_of(store)), strict=True):
        want = sample_ids(torch.from_numpy(batch.first), seed=5, epoch=batch.epoch)
        assert torch.equal(got.ids, want)
        np.testing.assert_array_equal(got.labels, store.label[batch.first])
        assert got.ids.dtype == got.labels.dtype == torch.int64 and got.weights is None
    assert Views._fields[:3] == ("va", "vb", "weights")


def test_a_frame_nearby_two_others_is_shown_to_each_in_another_view(store):
    first, second = np.array([0, 1, 2]), np.array([1, 2, 1])
    (pair,) = run(store, iter([Batch(0, first, second)]))
    assert not torch.equal(pair.vb[0], pair.vb[2])  # both are views of frame 1
    (again,) = run(store, iter([Batch(0, first[:1], second[:1])]))
    assert torch.equal(again.vb[0], pair.vb[0])


@pytest.mark.parametrize("length", range(1, 8))
def test_the_shortest_clips(clip, pattern, length, tmp_path):
    for i in range(3):
        clip(tmp_path / f"{i}.mp4", pattern(length, 64, 80, seed=i))
    shard([tmp_path], tmp_path / "shards", Settings(size=32, stride=1), device="cpu", jobs=1)
    store = FrameStore.open(tmp_path / "shards")
    first = np.arange(3 * length)
    second, weights = nearby(store.video, store.time_seconds, first, 0.1, 0, 0)
    (pair,) = run(store, iter([Batch(0, first, second, weights)]))
    assert torch.equal(pair.weights, torch.from_numpy(weights)) and len(pair.va) == 3 * length
    streamed = open_store(tmp_path / "shards", "stream")
    assert len(run(streamed, batches_of(streamed, size=3))) == 2 * length


def threads_now() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("views", "shards", "jpeg"))}


@pytest.mark.parametrize("wanted", ["ram", "stream"])
def test_leaving_early_leaves_no_thread(shards, wanted):
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield from batches_of(store)

    store = open_store(shards, wanted)
    with loader_of(store, endless(), threads=2) as loader:
        for _ in loader:
            break
    assert not threads_now()
    num = len(drawn)
    time.sleep(0.05)
    assert len(drawn) == num
    with pytest.raises(KeyError), loader_of(store, endless()) as loader:
        for _ in loader:
            raise KeyError("of the step")
    assert not threads_now()


def test_what_the_thread_raises_is_raised_at_once(store, monkeypatch):
    made, make = [], Loader._make

    def fails(self, batch, *prepared):
        made.append(batch)
        if len(made) == 3:
            raise InputError("the third batch")
        return make(self, batch, *prepared)

    monkeypatch.setattr(Loader, "_make", fails)
    with loader_of(store, batches_of(store), ahead=4) as loader:
        batches = iter(loader)
        next(batches)
        while len(made) < 3:
            time.sleep(0.001)
        time.sleep(0.05)
        with pytest.raises(InputError, match="third"):  # not after the second, which is ready
            next(batches)
    assert len(made) == 3


def test_batches_are_made_ahead(store, monkeypatch):
    """While a step runs the next batches are made, `ahead` of them and no more."""
    made, make = [], Loader._make
    monkeypatch.setattr(Loader, "_make", lambda self, *a: (make(self, *a), made.append(1))[0])
    for ahead in (1, 3):
        made.clear()
        with loader_of(store, batches_of(store), ahead=ahead) as loader:
            next(iter_ := iter(loader))
            time.sleep(0.3)
            assert len(made) == 1 + ahead
            start = time.monotonic()
            next(iter_)
            assert time.monotonic() - start < 0.2


@pytest.mark.parametrize("pairs", [False, True])
def test_the_frames_of_the_disk_are_read_ahead(store, pairs, monkeypatch):
    """ram: all of them; disk: those of each batch, and no others."""
    told, length = Counter(), store.size**2

    def advise(fd, start, num_bytes, advice):
        assert (start % length, num_bytes, advice) == (0, length, os.POSIX_FADV_WILLNEED)
        told[start // length] += 1

    monkeypatch.setattr(os, "posix_fadvise", advise)
    batches = [
        dataclasses.replace(b, second=b.first[::-1] // 2) if pairs else b
        for b in batches_of(store, epochs=(0,))
    ][:3]
    run(store, iter(batches), wanted_tier="disk")
    both = [np.unique([b.first, b.second]).tolist() for b in batches]
    assert set(told) == {frame for frames in both for frame in frames} < set(range(len(store)))
    told.clear()
    with loader_of(store, iter(batches), wanted_tier="ram") as loader:
        list(loader)
        loader.advising.submit(int).result()
    assert told == Counter(range(len(store)))


@pytest.mark.parametrize(("wanted", "horizon"), [("disk", "DRAWN"), ("stream", "BUFFER")])
def test_the_read_ahead_is_ahead(shards, wanted, horizon, monkeypatch):
    """By as many frames as are meant, until the last ones are announced."""
    store = open_store(shards, wanted)
    announced, made, ahead = [], [], []
    monkeypatch.setattr(loaders, "DRAWN", 8)
    monkeypatch.setattr(loaders, horizon, 16)
    owner, name = (Loader, "_advise") if wanted == "disk" else (Reader, "read_ahead")
    announce, make = getattr(owner, name), Loader._make

    def told(self, frames):
        announced.extend(frames if wanted == "stream" else frames[: len(frames) // 2])
        return announce(self, frames)

    def making(self, drawn):
        ahead.append(len(announced) - len(made))
        made.extend(drawn.batch.first)
        return make(self, drawn)

    monkeypatch.setattr(owner, name, told)
    monkeypatch.setattr(Loader, "_make", making)
    batches = list(batches_of(store))
    num = len(run(store, iter(batches), wanted_tier=wanted))
    left = sum(len(b.first) for b in batches) - np.cumsum([0, *(len(b.first) for b in batches)])
    assert num == len(batches) > 8
    assert all(a > min(16, n - 1) for a, n in zip(ahead, left, strict=False))


def test_memory_is_used_again_but_never_while_somebody_looks(store):
    kept, blocks = [], set()
    with loader_of(store, batches_of(store, epochs=range(5))) as loader:
        for i, batch in enumerate(loader):
            blocks.add(batch.va.data_ptr())
            if i % 10 == 0:
                kept.append((batch.vb[3:5], batch.vb[3:5].clone()))  # a view keeps it too
            del batch
    assert len(kept) > 4 and all(torch.equal(a, b) for a, b in kept)
    assert len(blocks) <= len(kept) + 5


def test_the_tier_follows_size_and_wish(shards, store, monkeypatch):
    assert tier(store, CPU)[0] == "ram" and "fit into memory" in tier(store, CPU)[1]
    monkeypatch.setattr(FrameStore, "fits_in_memory", lambda self: False)
    assert tier(store, CPU) == ("disk", "0.8 MB of frames do not fit into memory")
    assert tier(store, CPU, "disk")[0] == "disk"
    for wanted, words in [("ram", "--tier ram: 0.8 MB .* memory"), ("gpu", "--tier gpu: there is"),
                          ("tape", "want one of auto, gpu")]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            tier(store, CPU, wanted)
    size, gpu = store.frames.nbytes, torch.device("cuda")
    for name, value in {
        "mem_get_info": (size, 10 * size), "memory_reserved": 3 * size, "memory_allocated": size,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    # What PyTorch keeps of an earlier run's memory is free, too.
    assert tier(store, gpu)[0] == "gpu"
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * size)
    assert tier(store, gpu)[0] == "disk"
    streamed = open_store(shards, "stream")
    assert tier(streamed, CPU) == ("stream", "as asked")
    with pytest.raises(InputError, match="--tier ram: the frames are streamed"):
        tier(streamed, CPU, "ram")


def test_what_does_not_fit_on_the_disk_is_streamed(shards, tmp_path, monkeypatch):
    free = {"free": 10**9}
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda _: type("Usage", (), free))
    here, there = (
        shutil.copytree(shards, tmp_path / name, ignore=shutil.ignore_patterns("store*", ".store*"))
        for name in ("here", "there")
    )
    assert isinstance(open_store(here), FrameStore)
    free["free"] = 5000
    assert isinstance(open_store(here), FrameStore)  # it is there already
    store = open_store(there)
    assert tier(store, CPU) == (
        "stream", "0.8 MB of frames do not fit on the disk, 0.0 MB are free"
    )  # fmt: skip
    with pytest.raises(InputError, match="--tier disk: .* do not fit on the disk.*--tier stream"):
        open_store(there, "disk")
    with pytest.raises(InputError, match="--pairs nearby: frames are streamed .*--pairs same"):
        open_store(there, pairs="nearby")
    assert not (there / "store").exists()


@pytest.mark.parametrize("wanted", ["auto", "stream"])
def test_from_blank_frames_nothing_can_be_learned(wanted, clip, tmp_path):
    """They have no standard deviation, by which views are divided."""
    clip(tmp_path / "blank.avi", np.full((6, 64, 64), 7, np.uint8))
    shard([tmp_path], tmp_path / "out", Settings(size=32, stride=1), device="cpu", jobs=1)
    with pytest.raises(InputError, match="out: all frames are blank"):
        open_store(tmp_path / "out", wanted)
