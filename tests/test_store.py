"""The frame store: what is in the shards, once, and never a stale or half-written one."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg

from sslus.engine import tar
from sslus.engine.errors import InputError
from sslus.engine.shard import Settings, shard
from sslus.engine.store import FrameStore

SETTINGS = Settings(size=64, stride=2, frames_per_shard=30)


@pytest.fixture
def shards(clips, tmp_path):
    shard([clips], tmp_path / "shards", SETTINGS, labels=clips / "labels.csv", device="cpu", jobs=1)
    return tmp_path / "shards"


def by_hand(shards) -> dict[tuple[str, int], tuple[np.ndarray, dict]]:
    found = {}
    for path in shards.glob("*.tar"):
        data = path.read_bytes()
        for _, members in tar.read_index(path):
            jpg, fact = (data[o : o + n] for o, n in (members["jpg"], members["json"]))
            fact = json.loads(fact)
            image = simplejpeg.decode_jpeg(jpg, "GRAY")[..., 0]
            found[fact["video"], fact["frame"]] = image, fact
    return found


def test_store_holds_the_shards_frames_in_order(shards):
    seen = []
    store = FrameStore.open(shards, report=lambda done, total, note: seen.append((done, total)))
    want = by_hand(shards)
    assert len(store) == len(want) and store.size == 64 and store.frames.dtype == np.uint8
    keys = [(store.video_ids[v], int(f)) for v, f in zip(store.video, store.frame, strict=True)]
    assert keys == sorted(want)
    patients = {}
    for i, key in enumerate(keys):
        image, fact = want[key]
        np.testing.assert_array_equal(store.frames[i], image)
        assert store.time_seconds[i] == pytest.approx(fact["time_seconds"], abs=1e-5)
        assert store.label_names[store.label[i]] == fact["label"]
        assert patients.setdefault(int(store.patient[i]), fact["patient"]) == fact["patient"]
    assert len(patients) == 3 and seen[-1] == (len(want), len(want))
    with pytest.raises(ValueError, match="read-only"):
        store.frames[0, 0, 0] = 1


def test_store_is_built_once_even_by_several_at_a_time(shards):
    calls = []
    with ThreadPoolExecutor(4) as pool:
        stores = list(
            pool.map(lambda _: FrameStore.open(shards, report=lambda *a: calls.append(a)), range(4))
        )
    assert len({s.digest for s in stores}) == 1
    assert sum(done == total for done, total, _ in calls) == 1
    before = (shards / "store" / "frames.u8").stat().st_mtime_ns
    FrameStore.open(shards)
    assert (shards / "store" / "frames.u8").stat().st_mtime_ns == before


def test_store_without_labels(clips, tmp_path):
    shard([clips / "u.mp4"], tmp_path / "shards", SETTINGS, device="cpu", jobs=1)
    store = FrameStore.open(tmp_path / "shards", folder=tmp_path / "elsewhere")
    assert (store.label == -1).all() and (store.patient == -1).all() and store.label_names == []
    assert (tmp_path / "elsewhere" / "store.json").exists()
    assert not (tmp_path / "shards" / "store").exists()


def test_store_of_other_shards_is_refused_then_rebuilt(clips, shards):
    old = FrameStore.open(shards)
    shard([clips], shards, Settings(size=48, stride=2), device="cpu", jobs=1, force=True)
    with pytest.raises(InputError, match="built from other shards.*--rebuild-store"):
        FrameStore.open(shards)
    new = FrameStore.open(shards, rebuild=True)
    assert (old.size, new.size) == (64, 48)


def damage(path, what):
    data = path.read_bytes()
    path.write_bytes(what(data))


@pytest.mark.parametrize(
    "file, what, words",
    [
        ("shards/shard-000000.tar", lambda d: d[:-10240], "missing or not whole"),
        ("shards/shard-000001.tar", lambda d: d[:600] + b"x" * 99 + d[699:], "shard-000001.tar"),
        ("shards/shard-000000.idx", lambda d: d[: len(d) // 2], "index"),
        ("shards/manifest.json", lambda d: d[:40], "damaged"),
        ("shards/store/frames.u8", lambda d: d[:-1], "--rebuild-store"),
        ("shards/store/index.npz", lambda d: d[:-9] + b"x" * 9, "--rebuild-store"),
        ("shards/store/store.json", lambda d: b"{}", "--rebuild-store"),
    ],
)
def test_damage_is_named_and_leaves_no_half_store(file, what, words, shards, tmp_path):
    if "store" in file:
        FrameStore.open(shards)
    damage(tmp_path / file, what)
    with pytest.raises(InputError, match=words) as e:
        FrameStore.open(shards)
    assert "\n" not in str(e.value)
    if "store" not in file:
        assert not (shards / "store").exists() and not (shards / "store.tmp").exists()


def test_no_shards_here(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        FrameStore.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no finished shards"):
        FrameStore.open(tmp_path)


def test_full_disk_is_an_error_not_a_crash(clips, tmp_path, small_disk):
    shard([clips], tmp_path / "shards", Settings(size=256, stride=1), device="cpu", jobs=1)
    # In a process of its own: a mapped file on a full disk would kill it with SIGBUS.
    shards, folder = str(tmp_path / "shards"), str(small_disk / "s")
    code = (
        "from sslus.engine.store import FrameStore; from pathlib import Path\n"
        f"FrameStore.open(Path({shards!r}), folder=Path({folder!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "No space left on device" in result.stderr
    assert [p.name for p in small_disk.iterdir()] == ["s.lock"]
