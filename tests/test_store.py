"""The frame store: what is in the shards, once, and never a stale or half-written one."""

import errno
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from sslus.engine import tar
from sslus.engine.errors import InputError
from sslus.engine.manifest import Manifest, read_manifest
from sslus.engine.shard import Settings, shard
from sslus.engine.store import FrameStore

SETTINGS = Settings(size=64, stride=2, frames_per_shard=30)


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "shards"
    shard([clips], out, SETTINGS, labels=clips / "labels.csv", device="cpu", jobs=1)
    return out


@pytest.fixture
def shards(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


def test_store_holds_the_shards_frames_in_order(shards, by_hand, monkeypatch):
    monkeypatch.setattr("sslus.engine.store.CHUNK_BYTES", 7 * 64 * 64)  # several, the last shorter
    monkeypatch.setattr("sslus.engine.store.SYNC_BYTES", 15 * 64 * 64)
    seen, synced, fsync, pwrite = [], set(), os.fsync, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: pwrite(f, data[:9999], at))  # as it may

    def noted(fd: int) -> None:
        synced.add(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    store = FrameStore.open(shards, report=lambda done, total, note: seen.append((done, total)))
    assert synced >= {"frames.u8", "index.npz", "store.json", ".store.tmp"}
    want = {(fact["video"], fact["frame"]): (x, fact) for x, fact in by_hand(shards)}
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


def test_a_store_on_another_disk_is_used_but_never_replaced(shards, tmp_path):
    FrameStore.open(shards)
    elsewhere, link = tmp_path / "store", shards / "store"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    assert len(FrameStore.open(shards)) and link.is_symlink()
    with pytest.raises(InputError, match="store: is a link, .* remove it"):
        FrameStore.open(shards, rebuild=True)
    assert (elsewhere / "store.json").exists() and link.is_symlink()
    elsewhere.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="store: is a link, .* remove it"):
        FrameStore.open(shards)
    assert link.is_symlink() and not list(shards.glob(".store*"))


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


def test_more_shards_than_files_may_be_open(clips, tmp_path):
    settings = Settings(size=16, stride=2, frames_per_shard=1)
    made = shard([clips], tmp_path / "shards", settings, device="cpu", jobs=1)
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(made.manifest.shards), hard))
    try:
        assert len(FrameStore.open(tmp_path / "shards")) == len(made.manifest.shards)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_building_takes_little_memory_for_a_frame(tmp_path, monkeypatch):
    """Of millions of frames, as a hospital has, Python's objects would fill it."""
    num, per_shard, size = 20_000, 1000, 8
    jpeg = simplejpeg.encode_jpeg(np.zeros((size, size, 1), np.uint8), 95, "GRAY", "Gray")
    shards = []
    for start in range(0, num, per_shard):
        samples = []
        for i in range(start, start + per_shard):
            fact = {"video": f"{7 * i % 99:016x}", "frame": i, "time_seconds": i / 9,
                    "label": None, "patient": f"{i % 77:016x}"}  # fmt: skip
            key = f"{fact['video']}-{i:06d}"
            samples.append((key, {"jpg": jpeg, "json": json.dumps(fact).encode()}))
        name = f"shard-{len(shards):06d}.tar"
        num_bytes, sha256 = tar.write_shard(tmp_path / name, samples)
        shards.append({"name": name, "num_frames": per_shard, "bytes": num_bytes, "sha256": sha256})
    Manifest(
        settings={"size": size, "frames_per_shard": per_shard}, num_videos=99, num_frames=num,
        mean=0.5, std=0.2, labels=[], decoders={}, shards=shards,
    ).with_digest().write(tmp_path)  # fmt: skip
    monkeypatch.setattr("sslus.engine.store.CHUNK_BYTES", 500 * size**2)
    tracemalloc.start()
    try:
        store = FrameStore.open(tmp_path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (np.diff(store.video) >= 0).all() and len(np.unique(store.patient)) == 77
    assert most < 300 * num, most / num


def test_a_file_system_without_locks_is_no_obstacle(shards, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert len(FrameStore.open(shards)) == read_manifest(shards).num_frames


def test_store_without_labels(clips, tmp_path):
    shard([clips / "u.mp4"], tmp_path / "shards", SETTINGS, device="cpu", jobs=1)
    store = FrameStore.open(tmp_path / "shards", folder=tmp_path / "elsewhere")
    assert (store.label == -1).all() and (store.patient == -1).all() and store.label_names == []
    assert (tmp_path / "elsewhere" / "store.json").exists()
    assert not (tmp_path / "shards" / "store").exists()


def test_what_fits_in_memory_is_half_of_what_is_available(shards, monkeypatch):
    store = FrameStore.open(shards)
    least = -(-2 * store.frames.nbytes // 1024)
    for num_kib, limit, fits in [
        (least, None, True), (least, "max\n", True), (least, f"{1024 * least}\n", True),
        (least - 1, None, False), (9 * least, f"{1024 * (least - 1)}\n", False),
    ]:  # fmt: skip
        texts = {
            "/proc/meminfo": f"MemFree: 1 kB\nMemAvailable:   {num_kib} kB\nHugePages_Total: 0\n",
            "/sys/fs/cgroup/memory.max": limit,  # of a container
        }

        def read_text(path, texts=texts):
            if texts[str(path)] is None:
                raise FileNotFoundError
            return texts[str(path)]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", read_text)
            found = store.fits_in_memory()
        assert found is fits


def test_store_of_other_shards_is_refused_then_rebuilt(clips, shards):
    there = shards.parent / "store"
    old = FrameStore.open(shards, folder=there)
    FrameStore.open(shards)
    shard([clips], shards, Settings(size=48, stride=2), device="cpu", jobs=1, force=True)
    with pytest.raises(InputError, match="built from other shards.*--rebuild-store"):
        FrameStore.open(shards, folder=there)
    new = FrameStore.open(shards, folder=there, rebuild=True)
    assert (old.size, new.size) == (64, 48)
    assert FrameStore.open(shards).size == 48  # the one in the shards has gone with them


def damage(path, what):
    data = path.read_bytes()
    path.write_bytes(what(data))


@pytest.mark.parametrize(
    "file, what, words",
    [
        ("shards/shard-000000.tar", lambda d: d[:-10240], "missing or incomplete.*--force"),
        ("shards/shard-000001.tar", lambda d: d[:600] + b"x" * 99 + d[699:], "00001.tar.*--force"),
        ("shards/shard-000000.idx", lambda d: d[: len(d) // 2], "index.*--force"),
        ("shards/manifest.json", lambda d: d[:40], "damaged.*--force"),
        ("shards/store/frames.u8", lambda d: d[:-1], "--rebuild-store"),
        ("shards/store/index.npz", lambda d: d[:-9] + b"x" * 9, "--rebuild-store"),
        ("shards/store/store.json", lambda d: b"{}", "--rebuild-store"),
        ("shards/store/store.json", lambda d: b"\xff\x00" * 99, "--rebuild-store"),
        ("shards/store/store.json", lambda d: d.replace(b"videos", b"v"), "--rebuild-store"),
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
        assert not (shards / "store").exists() and not (shards / ".store.tmp").exists()


@pytest.mark.parametrize(
    "name, change",
    [
        ("label", None), ("video", lambda x: x[1:]), ("frame", lambda x: x.astype(np.int64)),
        ("time_seconds", lambda x: x[:, None]), ("patient", lambda x: x.astype(object)),
        ("label", lambda x: np.where(x == 0, 2, x)), ("label", lambda x: x - 2),
        ("video", lambda x: x + 1), ("video", lambda x: x - 1), ("video", lambda x: x[::-1]),
        ("patient", lambda x: x + 10**9), ("frame", lambda x: x - 1000),
        ("time_seconds", lambda x: np.where(x == 0, np.nan, x)), ("time_seconds", lambda x: -x),
        ("time_seconds", lambda x: np.where(x == 0, np.inf, x)), ("time_seconds", lambda x: b"x"),
        ("index.npz", lambda data: data[:-9]), ("index.npz", lambda data: b""),
        ("index.npz", lambda data: data.replace(b"<i4", b"<i9")),
        ("index.npz", lambda data: data.replace(b"(", b"[")), ("videos", lambda ids: ids[1:]),
        ("videos", lambda ids: [5, *ids[1:]]), ("videos", lambda ids: None),
    ],
)  # fmt: skip
def test_what_no_store_holds_is_refused_though_its_digest_is_right(name, change, shards):
    whole = FrameStore.open(shards)
    path, facts = shards / "store" / "index.npz", shards / "store" / "store.json"
    told = json.loads(facts.read_text())
    with np.load(path) as index:
        columns = dict(index)
    if name in columns and change is None:
        del columns[name]
    elif name in columns:
        columns[name] = change(columns[name])
    elif name in told:
        told[name] = change(told[name])
    np.savez(path, **columns)
    if name == "index.npz":
        path.write_bytes(change(path.read_bytes()))
    told["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    facts.write_text(json.dumps(told))
    with pytest.raises(InputError, match="store: damaged .*; rebuild it with --rebuild-store") as e:
        FrameStore.open(shards)
    assert "\n" not in str(e.value) and (name == "videos" or "index.npz: " in str(e.value))
    assert (FrameStore.open(shards, rebuild=True).time_seconds == whole.time_seconds).all()


def refusal_of_a_forged_frame(shards, kind, change):
    """One whose digests are all right: the shard was written so. What is said of it."""
    path = shards / "shard-000001.tar"
    data, index = path.read_bytes(), tar.read_index(path)
    content = [
        (key, {name: data[o : o + n] for name, (o, n) in members.items()}) for key, members in index
    ]
    key, members = content[3]
    members[kind] = change(members[kind])
    num_bytes, sha256 = tar.write_shard(path, content)
    manifest = read_manifest(shards)
    manifest.shards[1].update(bytes=num_bytes, sha256=sha256)
    manifest.with_digest().write(shards)
    with pytest.raises(InputError, match=f"shard-000001.tar: {key}.{kind} is ") as e:
        FrameStore.open(shards)
    assert not (shards / "store").exists() and not (shards / ".store.tmp").exists()
    return str(e.value)


@pytest.mark.parametrize("side, words", [(64, "damaged"), (32, "size"), (128, "damaged")])
def test_a_jpeg_that_does_not_decode_is_named(side, words, shards):
    def change(jpeg):
        if side == 64:  # the size is right
            return jpeg[:100]
        return simplejpeg.encode_jpeg(np.zeros((side, side, 1), np.uint8), 95, "GRAY", "Gray")

    assert re.search(
        rf"\.jpg is .*{words}[^\n]*$", refusal_of_a_forged_frame(shards, "jpg", change)
    )


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("time_seconds", math.nan, "from 0, got nan"), ("time_seconds", None, "damaged"),
        ("time_seconds", math.inf, "from 0, got inf"), ("time_seconds", -0.1, "from 0, got -0.1"),
        ("time_seconds", 1e300, r"from 0, got 1e\+300"),  # too large for float32
        ("time_seconds", [1.0], "damaged"), ("time_seconds", "late", "damaged .*late"),
        ("frame", -1, "differ"), ("frame", 2**40, "differ"), ("video", "another", "differ"),
        ("label", "unknown", "damaged .*unknown"), ("patient", 5, "damaged"), ("patient", [], ""),
    ],
)  # fmt: skip
def test_what_no_frame_can_be_is_named(name, value, words, shards):
    def change(facts):
        return json.dumps(json.loads(facts) | {name: value}).encode()

    said = refusal_of_a_forged_frame(shards, "json", change)
    assert re.search(rf"\.json is .*{words}[^\n]*$", said)


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_a_stopped_build_leaves_no_store_and_the_next_gives_the_same_bytes(how, shards, tmp_path):
    FrameStore.open(shards, folder=tmp_path / "straight")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from sslus.engine.store import FrameStore\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"stop = lambda done, total, note: done and os.kill(os.getpid(), signal.{how})\n"
        f"FrameStore.open(Path({str(shards)!r}), threads=1, report=stop)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -getattr(signal, how)
    assert not (shards / "store").exists()
    assert (shards / ".store.tmp").exists() == (how == "SIGKILL")
    FrameStore.open(shards)
    for path in (tmp_path / "straight").iterdir():
        assert (shards / "store" / path.name).read_bytes() == path.read_bytes()
    assert not (shards / ".store.tmp").exists()


def test_what_a_crash_in_a_rebuild_left_is_removed_or_put_back(shards):
    frames = FrameStore.open(shards).frames.sum()
    for name in (".store.old", ".store.tmp"):
        (shards / name).mkdir()
        (shards / name / "frames.u8").write_bytes(b"1")
        FrameStore.open(shards)
        assert sorted(p.name for p in shards.glob("*store*")) == ["store", "store.lock"]
    (shards / "store").rename(shards / ".store.old")  # between the two renames the only one
    for path in shards.glob("*.tar"):
        path.unlink()
    assert FrameStore.open(shards).frames.sum() == frames


CUT_OFF = """
import os, sys
from pathlib import Path
from sslus.engine.store import FrameStore
from sslus.engine.stream import StreamStore, fetch_shard

shards = Path(sys.argv[1])
if sys.argv[2] == "store":
    pages, path = FrameStore.open(shards).frames.ravel(), shards / "store" / "frames.u8"
else:
    entry = StreamStore.open(shards, "").manifest.shards[0]
    pages, path = fetch_shard(str(shards), entry).data, shards / entry["name"]
os.truncate(path, 0)
print("cut off", flush=True)
pages[0]
print("never")
"""


@pytest.mark.parametrize("what", ["store", "shard"])
def test_a_mapped_file_that_is_cut_off_is_named_before_the_process_ends(what, shards):
    FrameStore.open(shards)
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(shards), what], capture_output=True, text=True
    )
    name = "store/frames.u8" if what == "store" else read_manifest(shards).shards[0]["name"]
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "cut off\n")
    assert done.stderr.startswith(f"Error: {shards}/{name}: a part of it cannot be read any more;")
    assert done.stderr.count("\n") == 1


def test_a_store_opens_where_nothing_can_be_written(clips, small_disk):
    shard([clips / "u.mp4"], small_disk / "shards", SETTINGS, device="cpu", jobs=1)
    built = FrameStore.open(small_disk / "shards").frames.sum()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert FrameStore.open(small_disk / "shards").frames.sum() == built
    for folder, rebuild in (("other", False), ("shards/store", True)):
        with pytest.raises(InputError, match="none can be written there; .* with --tier stream"):
            FrameStore.open(small_disk / "shards", folder=small_disk / folder, rebuild=rebuild)


def test_shards_of_another_version_give_no_store(shards):
    damage(shards / "manifest.json", lambda d: d.replace(b'"format": 1', b'"format": 7'))
    with pytest.raises(InputError, match="another version of sslus.*format 7.*--force"):
        FrameStore.open(shards)
    assert not (shards / "store").exists()


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
    assert result.returncode == 1 and f"No space left on device: '{folder}'" in result.stderr
    assert [p.name for p in small_disk.iterdir()] == ["s.lock"]
