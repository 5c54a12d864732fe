"""Sharding: the same bytes whatever happens, every frame accounted for, nothing leaked."""

import ctypes
import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import simplejpeg

from sslus.engine import shard as shards
from sslus.engine import spool, tar
from sslus.engine.atomic import atomic_file, atomic_folder, sync_folder
from sslus.engine.errors import InputError, Interrupted
from sslus.engine.ids import keyed_hash, video_ids
from sslus.engine.manifest import Manifest, read_manifest
from sslus.engine.prepare import prepare
from sslus.engine.shard import Settings, shard
from sslus.engine.sources import HIDDEN_FOLDERS, Source, find_videos
from sslus.engine.spool import choose_backends
from sslus.engine.video import PyavBackend, VideoError, decode
from sslus.engine.workers import Workers, uninterrupted, worker_pool
from sslus.tools.shard import show

KEY = "00112233445566778899aabbccddeeff" * 2
SMALL = Settings(size=64, stride=3, frames_per_shard=40)


@pytest.fixture
def key(tmp_path) -> Path:
    (tmp_path / "key").write_text(KEY)
    return tmp_path / "key"


def make(clips, out, key, settings=SMALL, **kwargs):
    kwargs = {"jobs": 2, "device": "cpu", "labels": clips / "labels.csv"} | kwargs
    return shard([clips], out, settings, key=key, **kwargs)


def public_bytes(out: Path) -> dict[str, bytes]:
    """Everything that is shared: all files but those in local/."""
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """Read with the standard library, which knows nothing of this code."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = archive.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    return found


def command(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "sslus.tools", *map(str, arguments)],
        capture_output=True, text=True, **kwargs,
    )  # fmt: skip


def one_line(result, code: int, *words: str) -> None:
    """The house's rule for bad input."""
    assert result.returncode == code, result.stderr
    errors = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


def test_every_kept_frame_is_there_with_its_pixels(clips, tmp_path, key):
    told = []
    report = make(clips, tmp_path / "out", key, report=lambda *said: told.append(said))
    num = len(report.manifest.shards)  # of many videos, writing them takes as long as decoding
    assert told[-1] == (6, 6, f"{num} of {num} shards written") and num > 1
    found = samples(tmp_path / "out")
    by_source = {r["source"]: r for r in report.ledger}
    count = 0
    for source in find_videos([clips])[0]:
        record = by_source[str(source.path)]
        kept = [f for f in decode(source.path) if f.index % 3 == 0]
        assert record["kept_frames"] == len(kept) and record["status"] == "ok"
        assert record["expected_frames"] == record["decoded_frames"]
        for f in kept:
            sample = found[f"{record['id']}-{f.index:06d}"]
            want = simplejpeg.encode_jpeg(prepare(f.luma, 64)[..., None], 95, "GRAY", "Gray")
            assert sample["jpg"] == want
            fact = json.loads(sample["json"])
            assert fact["time_seconds"] == pytest.approx(f.time_seconds, abs=1e-6)
            assert fact["label"] in ("left", "right")
            count += 1
    manifest = read_manifest(tmp_path / "out")
    assert (
        len(found) == count == manifest.num_frames == sum(s["num_frames"] for s in manifest.shards)
    )
    pixels = np.stack(
        [prepare(f.luma, 64) for s in find_videos([clips])[0]
         for f in decode(s.path) if f.index % 3 == 0]
    )  # fmt: skip
    assert manifest.mean == pytest.approx(pixels.mean() / 255, abs=1e-8)
    assert manifest.std == pytest.approx(pixels.std() / 255, abs=1e-8)
    order = [k for p in sorted((tmp_path / "out").glob("*.tar")) for k, _ in tar.read_index(p)]
    videos = [k[:16] for k in order]
    changes = sum(a != b for a, b in zip(videos, videos[1:], strict=False))
    assert changes > 0.6 * len(videos)  # shuffled across videos, not only within


def test_few_processes_share_a_gpu(clips, tmp_path, monkeypatch):
    for i in range(9):
        shutil.copy(clips / "u.mp4", tmp_path / f"{i}.mp4")

    def pool(num, *_):
        raise InputError(f"{num} workers")

    monkeypatch.setattr(shards, "choose_backends", lambda *_: [("dali", "cuda"), ("pyav", "cpu")])
    monkeypatch.setattr(shards, "worker_pool", pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    for jobs, num in ((None, 7), (8, 8)):
        with pytest.raises(InputError, match=f"^{num} workers"):
            shard([tmp_path], tmp_path / "out", SMALL, jobs=jobs)


def test_bytes_do_not_depend_on_jobs_or_on_an_interruption(clips, tmp_path, key):
    make(clips, tmp_path / "a", key, jobs=1)
    make(clips, tmp_path / "b", key, jobs=3)
    assert public_bytes(tmp_path / "a") == public_bytes(tmp_path / "b")

    class Stop(Exception):
        pass

    def stop_after_two(done, total, note):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        make(clips, tmp_path / "c", key, jobs=1, report=stop_after_two)
    assert public_bytes(tmp_path / "c") == {}
    resumed = make(clips, tmp_path / "c", key)
    assert resumed.resumed >= 2
    assert public_bytes(tmp_path / "a") == public_bytes(tmp_path / "c")
    again = make(clips, tmp_path / "c", key)
    assert again.already and again.manifest == resumed.manifest


def test_webdataset_and_dali_read_them(clips, tmp_path, key):
    import webdataset
    from nvidia.dali import fn, pipeline_def

    make(clips, tmp_path / "out", key)
    mine = samples(tmp_path / "out")
    tars = sorted(str(p) for p in (tmp_path / "out").glob("*.tar"))
    theirs = {s["__key__"]: s for s in webdataset.WebDataset(tars, shardshuffle=False)}
    assert {k: s["jpg"] for k, s in theirs.items()} == {k: s["jpg"] for k, s in mine.items()}

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        indexes = [t.replace(".tar", ".idx") for t in tars]
        return fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["jpg"], name="r")

    built = pipeline()
    built.build()
    assert sum(built.epoch_size().values()) == len(mine)
    order = [k for t in tars for k, _ in tar.read_index(Path(t))]
    for key in order[:5]:
        assert np.asarray(built.run()[0][0]).tobytes() == mine[key]["jpg"]


def test_tar_headers_are_the_standard_librarys():
    for name, size in [("a-000001.jpg", 0), ("b" * 100, 12345), ("c.json", 8**11 - 1)]:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        assert tar.header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)
    for name, size in [("d" * 101, 1), ("e", 8**11)]:
        with pytest.raises(ValueError):
            tar.header(name, size)


def test_nothing_shared_holds_a_name(clips, key, tmp_path):
    """Names, patients and folders stay in local/, which only the owner can read.

    The key is given because the ids of another one may spell "1990".
    """
    videos = tmp_path / "Jane Doe 1990-01-01"
    videos.mkdir()
    (videos / "DOE_JANE.mp4").symlink_to(clips / "u.mp4")
    (videos / "labels.csv").write_text("path,label,patient\nDOE_JANE.mp4,left,JaneDoe\n")
    out = tmp_path / "out"
    shard([videos], out, SMALL, labels=videos / "labels.csv", key=key, device="cpu", jobs=1)
    words = (b"DOE", b"Doe", b"Jane", b"1990", b"u.mp4", str(tmp_path).encode(), KEY.encode())
    for content in public_bytes(out).values():
        for word in words:
            assert word not in content
    assert (out / "local").stat().st_mode & 0o777 == 0o700
    for name in ("key", "ledger.jsonl", "request.json"):  # also where they are copied to
        assert (out / "local" / name).stat().st_mode & 0o777 == 0o600
    assert "DOE_JANE.mp4" in (out / "local" / "ledger.jsonl").read_text()
    other = shard([videos], tmp_path / "other", SMALL, device="cpu", jobs=1)
    mine = json.loads((out / "local" / "ledger.jsonl").read_text())
    assert other.ledger[0]["id"] != mine["id"]  # another key: the id cannot be recomputed


@pytest.mark.parametrize(
    "settings, want",
    [
        (Settings(size=32, stride=1), list(range(20))),
        (Settings(size=32, stride=7), [0, 7, 14]),
        (Settings(size=32, stride=None, rate_hz=5), [0, 5, 10, 15]),
        (Settings(size=32, stride=None, rate_hz=25), list(range(20))),
        (Settings(size=32, stride=None, rate_hz=1000), list(range(20))),
        (Settings(size=32, stride=None, rate_hz=10), [0, 3, 5, 8, 10, 13, 15, 18]),
    ],
)
def test_selection(settings, want, clip, pattern, tmp_path):
    clip(tmp_path / "x.mp4", pattern(20, 48, 64))
    report = shard([tmp_path / "x.mp4"], tmp_path / "out", settings, device="cpu", jobs=1)
    kept = sorted(int(k.split("-")[1]) for k in samples(tmp_path / "out"))
    assert kept == want and report.ledger[0]["decoded_frames"] == 20


@pytest.mark.parametrize(
    "rate_hz, tick",
    [(r, 1 / 1000) for r in (24, 25, 30000 / 1001, 30, 50, 60, 100, 120, 200)]  # Matroska, FLV, ASF
    + [(r, 1 / 600) for r in (15, 24, 25, 30000 / 1001, 60)]  # QuickTime
    + [(r, 1 / 100) for r in (10, 12, 15, 24, 25, 30)],  # GIF
)
@pytest.mark.parametrize("first_seconds", [0, 0.0004, 33.3667])
def test_rounded_time_stamps_select_evenly(rate_hz, tick, first_seconds):
    stamps = np.round((first_seconds + np.arange(300) / rate_hz) / tick) * tick
    for every in (1, 2, 3):
        keep = Settings(stride=None, rate_hz=rate_hz / every).selector(tick)
        kept = [i for i, at in enumerate(stamps) if keep(i, at - stamps[0])]
        assert kept == list(range(0, 300, every))


@pytest.mark.parametrize(
    "codec, container, own_hz",
    [("ffv1", "mkv", 30), ("libx264", "avi", 30), ("libx264", "avi", 120), ("gif", "gif", 15)]
    + [("gif", "gif", 30), ("gif", "gif", 60), ("libvpx", "ivf", 120)],
)
def test_the_videos_own_rate_keeps_every_frame(codec, container, own_hz, clip, pattern, tmp_path):
    """With rounded time stamps, and with none but the order of the packets."""
    path, pixel_format = tmp_path / f"x.{container}", "gray" if codec == "gif" else "yuv420p"
    clip(path, pattern(60, 48, 64), codec=codec, rate=own_hz, pixel_format=pixel_format,
         options={"bf": "3"})  # fmt: skip
    for rate_hz, every in ((own_hz, 1), (own_hz / 2, 2)):
        out = tmp_path / str(rate_hz)
        shard([path], out, Settings(32, None, rate_hz), device="cpu", jobs=1)
        kept = sorted(int(k.split("-")[1]) for k in samples(out))
        assert kept == list(range(0, 60, every))


# ---------------------------------------------------------------- bad input


@pytest.fixture
def mixed(clips, clip, pattern, tmp_path) -> Path:
    """Good videos among bad ones."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.mp4").write_bytes((clips / "u.mp4").read_bytes())
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.avi").write_text("not a video " * 99)
    data = (clips / "v.mp4").read_bytes()
    (folder / "headless.mp4").write_bytes(data[: len(data) // 2])
    data = clip(folder / "codec.avi", pattern(5, 64, 64)).read_bytes()
    (folder / "codec.avi").write_bytes(data.replace(b"FMP4", b"ZZQ7"))  # FFmpeg knows no such codec
    return folder


def test_one_bad_file_costs_that_file_only(mixed, tmp_path):
    out = tmp_path / "out"
    result = command("shard", mixed, "-o", out, "--size", 64, "--all", "--device", "cpu")
    assert result.returncode == 3, result.stderr
    ledger = [json.loads(x) for x in (out / "local" / "ledger.jsonl").read_text().splitlines()]
    status = {Path(r["source"]).name: r["status"] for r in ledger}
    assert status == {
        "good.mp4": "ok", "empty.mp4": "refused", "text.avi": "refused",
        "headless.mp4": "refused", "codec.avi": "refused",
    }  # fmt: skip
    for name in set(status) - {"good.mp4"}:
        assert sum(name in line for line in result.stderr.splitlines()) == 1
    assert "1 of 5" in result.stdout and "Traceback" not in result.stderr
    fields = "source id codec width height rate_hz expected_frames decoded_frames kept_frames"
    for record in ledger:
        assert set(f"{fields} status why seconds".split()) <= set(record)
        assert (record["status"] == "ok") == (record["why"] == "")
    assert read_manifest(out).num_videos == 1


def without_override() -> None:
    """For a child process: root obeys file modes like anybody else."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: they are gone after exec


def zero_frames(folder: Path) -> dict[str, str]:
    """Containers without a picture: sound alone, and a video stream that holds nothing."""
    import av

    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    silence.sample_rate = 16000
    for name, streams in [("sound.mp4", "s"), ("hollow.avi", "v"), ("both.mkv", "vs")]:
        with av.open(str(folder / name), "w") as container:
            if "v" in streams:
                video = container.add_stream("mpeg4", rate=25)
                video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            sound = container.add_stream("aac", rate=16000) if "s" in streams else None
            container.start_encoding()
            for frame in (silence, None) if sound else ():
                container.mux(sound.encode(frame))
    nothing = "not a single frame can be decoded"
    return {"sound.mp4": "no video stream", "hollow.avi": nothing, "both.mkv": nothing}


def unreadable(folder: Path) -> dict[str, str]:
    for name in ("secret.mp4", "1.2.840.7"):  # the other may be a DICOM file
        shutil.copy(folder / "good.mp4", folder / name)
        (folder / name).chmod(0)
    (folder / "lost.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")  # to open it would wait for a writer for ever
    return {
        "secret.mp4": "Permission denied",
        "1.2.840.7": "Permission denied",
        "lost.mp4": "No such file",
        "pipe.mp4": "not a regular",
    }


@pytest.mark.parametrize("kind", [zero_frames, unreadable])
def test_files_without_a_frame_are_named_and_harm_no_other(kind, clips, tmp_path, key):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    (folder / "good.mp4").write_bytes((clips / "u.mp4").read_bytes())
    shard([folder], tmp_path / "good", Settings(64, 1), key=key, device="cpu", jobs=1)
    why = kind(folder)
    arguments = ["shard", folder, "-o", out, "--size", 64, "--all", "--device", "cpu"]
    limits = {"timeout": 300, "preexec_fn": without_override}
    strict = command(*arguments, "--key", key, "--strict", **limits)
    one_line(strict, 1, f"{len(why)} of {len(why) + 1} files", "--strict")
    assert public_bytes(out) == {}
    result = command(*arguments, "--key", key, **limits)
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    assert f"1 of {len(why) + 1}" in result.stdout
    ledger = [json.loads(x) for x in (out / "local" / "ledger.jsonl").read_text().splitlines()]
    assert {Path(r["source"]).name for r in ledger if r["status"] == "refused"} == set(why)
    for record in ledger:
        name = Path(record["source"]).name
        said = [x for x in result.stderr.splitlines() if name in x]
        assert len(said) == (name in why) and why.get(name, "") in record["why"]
        assert all(record["why"] in line for line in said)
    assert public_bytes(out) == public_bytes(tmp_path / "good")


def test_strict_writes_nothing(mixed, tmp_path):
    out = tmp_path / "out"
    result = command("shard", mixed, "-o", out, "--size", 64, "--strict", "--device", "cpu")
    ledger = out / "local" / "work" / "ledger.jsonl"
    one_line(result, 1, "4 of 5 files", "--strict", str(ledger))
    assert public_bytes(out) == {} and ledger.read_text().count("refused") == 4


def test_whatever_a_decoder_throws_is_that_files_refusal(clips, tmp_path, monkeypatch):
    from sslus.engine import spool as module

    def broken(*arguments):
        raise IndexError("out of range\nin a library")

    class Broken(PyavBackend):
        def prepared(self, *arguments):
            yield next(super().prepared(*arguments))
            broken()

    why = "its decoder failed (IndexError: out of range)"
    monkeypatch.setattr(module, "_worker_backends", [Broken()])
    record = module.spool_video(clips / "u.mp4", "0", Settings(64, 1), tmp_path)
    assert (record["status"], record["kept_frames"]) == ("incomplete", 1)
    assert record["why"].startswith(why + ";")
    monkeypatch.setattr(module, "probe", broken)
    record = module.spool_video(clips / "u.mp4", "0", Settings(64, 1), tmp_path)
    assert (record["status"], record["why"]) == ("refused", why)


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import av, pydicom, simplejpeg
from PIL import Image
from sslus.engine import spool
from sslus.engine.errors import InputError
from sslus.engine.settings import Settings

spool.start_worker([("pyav", "cpu")])
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for path, megabytes in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (megabytes << 20), -1))
    try:
        record = spool.spool_video(Path(path), "0", Settings(64, 1), Path(sys.argv[1]))
        print(record["status"], record["why"])
    except InputError as e:
        print(e)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


def test_little_memory_is_no_fault_of_a_file(clip, pattern, tmp_path):
    """Under `ulimit -v`: FFmpeg and Pillow, a MemoryError of each, and H.264, which has none."""
    from PIL import Image

    luma = np.kron(pattern(2, 96, 128), np.ones((24, 24), np.uint8))
    paths = [
        clip(tmp_path / f"{codec}.mkv", luma, codec=codec, pixel_format=kind)
        for codec, kind in [("mpeg4", "yuv420p"), ("libx264", "yuv420p"), ("mjpeg", "yuvj420p")]
    ]
    Image.fromarray(luma[0]).save(tmp_path / "a.png")
    good = clip(tmp_path / "good.mp4", pattern(2, 96, 128))
    (tmp_path / "bad.mp4").write_bytes(good.read_bytes()[:-3000])
    cases = [(path, 8) for path in (*paths, tmp_path / "a.png")]
    cases += [(good, 200), (tmp_path / "bad.mp4", 200)]
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, tmp_path, *(str(x) for case in cases for x in case)],
        capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    *short, whole, damaged = done.stdout.splitlines()
    for line, (path, _) in zip(short, cases, strict=False):
        assert line.startswith(f"{path}: memory ran out while it was read; raise the limit"), line
    assert len(short) == 4 and whole == "ok " and damaged.startswith("refused "), done


@pytest.mark.parametrize("linked", [False, True])
def test_videos_that_vanish_on_the_way_are_not_left_out(linked, clips, tmp_path, key):
    videos, out = shutil.copytree(clips, tmp_path / "videos"), tmp_path / "out"
    given = videos
    if linked:  # as data version control does it; the links stay
        given = tmp_path / "links"
        for file in videos.rglob("*.*"):
            link = given / file.relative_to(videos)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)

    def unmount(done, total, note):
        if done == 1:
            videos.rename(tmp_path / "elsewhere")

    with pytest.raises(InputError, match=r"is gone; .* of 6 videos are decoded; the same command"):
        make(given, out, key, jobs=1, report=unmount)
    assert public_bytes(out) == {}
    (tmp_path / "elsewhere").rename(videos)
    assert make(given, out, key).resumed >= 1
    make(clips, tmp_path / "straight", key)
    assert public_bytes(out) == public_bytes(tmp_path / "straight")


def test_few_open_files_are_enough(clip, pattern, tmp_path):
    (tmp_path / "videos").mkdir()
    for i in range(40):
        clip(tmp_path / "videos" / f"{i}.mp4", pattern(2, 32, 32))
    done = command(
        "shard", tmp_path / "videos", "-o", tmp_path / "out", "--size", 32, "--jobs", 1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_refused_file_is_tried_again_on_demand(clips, tmp_path):
    """Not unasked: the shards would change under whoever trains on them. The way is said."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name in "uv":
        (videos / f"{name}.mp4").write_bytes((clips / f"{name}.mp4").read_bytes())
    (videos / "v.mp4").chmod(0)
    arguments = ["shard", videos, "-o", out, "--size", 64, "--device", "cpu"]
    first = command(*arguments, preexec_fn=without_override)
    before = public_bytes(out)
    (videos / "v.mp4").chmod(0o600)
    again = command(*arguments, preexec_fn=without_override)
    assert (first.returncode, again.returncode) == (3, 3) and public_bytes(out) == before
    for result in (first, again):
        assert "once the cause is fixed, add --force to the same command" in result.stderr
    forced = command(*arguments, "--force", preexec_fn=without_override)
    assert forced.returncode == 0 and "2 of 2" in forced.stdout and not forced.stderr.count("force")


def test_what_is_left_out_is_said(clips, tmp_path):
    import av

    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "folder").symlink_to(clips)
    (videos / "one.mkv").symlink_to("two.mkv")
    with av.open(str(clips / "u.mp4")) as one, av.open(str(videos / "two.mkv"), "w") as two:
        streams = [two.add_stream_from_template(one.streams.video[0]) for _ in range(2)]
        for packet in one.demux(video=0):
            for stream in streams if packet.size else ():
                packet.stream = stream
                two.mux(packet)
    result = command("shard", videos, "-o", out, "--size", 64, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "1 file with several videos; the best of each was used" in result.stdout
    assert "1 further links to a file, each of which was taken once" in result.stdout
    assert "1 to folders, not followed" in result.stdout and "not videos" not in result.stdout
    assert json.loads((out / "local" / "ledger.jsonl").read_text())["other_streams"] == 1


def test_of_many_problems_a_few_are_shown(clips, tmp_path, key, capsys):
    result = make(clips, tmp_path / "out", key, jobs=1)
    for status, again in (("refused", True), ("incomplete", False)):
        ledger = [r | {"status": status, "why": f"why {i}"} for i, r in enumerate(result.ledger)]
        show(replace(result, ledger=ledger, ignored=Counter({HIDDEN_FOLDERS: 1})))
        out, err = capsys.readouterr()
        assert "why 4\n" in err and "why 5" not in err and "1 more file refused or incomp" in err
        assert ("once the cause is fixed, add --force to the same command" in err) == again
        assert "1 folder not searched; to include them, name them too" in out


def test_a_truncated_video_is_said_and_its_good_frames_kept(clip, pattern, tmp_path):
    path = clip(tmp_path / "cut.mkv", pattern(90, 64, 64), codec="libvpx-vp9")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = tmp_path / "out"
    result = command("shard", path, "-o", out, "--size", 64, "--all", "--device", "cpu")
    assert result.returncode == 3
    record = json.loads((out / "local" / "ledger.jsonl").read_text())
    assert record["status"] == "incomplete" and record["kept_frames"] == record["decoded_frames"]
    assert f"{record['decoded_frames']} of {record['expected_frames']} frames" in result.stderr
    assert 0 < record["decoded_frames"] < record["expected_frames"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], ["nowhere", "no such file or folder"]),
        (["empty"], ["no video found"]),
        (["empty/notes.txt"], ["none of the 1 files gave a frame", "notes.txt"]),
        (["a", "b"], ["same name", "x.mp4"]),
        (["a", "--labels", "lost.csv"], ["lost.csv", "1 of its videos", "lost.mp4"]),
        (["a", "--labels", "columns.csv"], ["path,label,patient"]),
        (["a", "--labels", "twice.csv"], ["line 3", "line 2"]),
        (["a", "--labels", "none.csv"], ["none.csv", "cannot be read"]),
        (["a", "--size", "3"], ["--size"]),
        (["a", "--stride", "0"], ["--stride"]),
        (["a", "--rate", "-1"], ["--rate"]),
        (["a", "--rate", "5", "--all"], ["--stride, --rate and --all"]),
        (["a", "--quality", "101"], ["--quality"]),
        (["a", "--jobs", "0"], ["--jobs"]),
        (["a", "--key", "empty/notes.txt"], ["64 hex digits"]),
        (["a", "--device", "cuda", "--decoder", "pyav"], ["--decoder dali"]),
    ],
)
def test_bad_input_is_one_line(arguments, words, clips, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mp4").symlink_to(clips / folder / "x.mp4")
    # Two videos of the same name that are different files
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    head = "path,label,patient\n"
    (tmp_path / "lost.csv").write_text(f"{head}a/lost.mp4,left,p\n")
    (tmp_path / "columns.csv").write_text("file,label\na/x.mp4,left\n")
    (tmp_path / "twice.csv").write_text(f"{head}a/x.mp4,left,p\na/x.mp4,right,p\n")
    one_line(command("shard", *arguments, cwd=tmp_path), 1, *words)
    assert public_bytes(tmp_path / "shards") == {} if (tmp_path / "shards").exists() else True


def test_other_settings_are_refused_and_force_replaces(clips, tmp_path, key):
    out = tmp_path / "out"
    first = make(clips, out, key)
    with pytest.raises(InputError, match="--force"):
        make(clips, out, key, Settings(size=32, frames_per_shard=1000))
    assert len(samples(out)) == first.manifest.num_frames  # untouched
    second = make(clips, out, None, Settings(size=32, frames_per_shard=1000), force=True)
    assert [s["name"] for s in second.manifest.shards] == ["shard-000000.tar"]
    assert len(list(out.glob("*.tar"))) == 1
    assert {r["id"] for r in first.ledger} == {r["id"] for r in second.ledger}  # the key is kept


@pytest.mark.parametrize("how", ["other key", "strict", "nothing", "stopped"])
def test_what_is_finished_outlives_a_run_that_is_not(how, clips, mixed, tmp_path, key, monkeypatch):
    """Shards, manifest, ledger and key: all or nothing is replaced."""
    out, other = tmp_path / "out", tmp_path / "other"
    make(clips, out, key)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    other.write_text("ff" * 32)
    arguments = {
        "other key": ([clips], {}),
        "strict": ([mixed], {"force": True, "strict": True}),
        "nothing": ([mixed / "empty.mp4"], {"force": True}),
        "stopped": ([clips / "u.mp4"], {"force": True}),
    }[how]
    if how == "stopped":  # after the first pass
        monkeypatch.setattr("sslus.engine.shard._write_all", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError if how == "stopped" else InputError):
        shard(arguments[0], out, SMALL, key=other, device="cpu", jobs=1, **arguments[1])
    assert {p: p.read_bytes() for p in before} == before
    assert make(clips, out, None).already


def test_where_videos_were_moved_to_is_taken_down(clips, tmp_path, key):
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    shutil.copytree(clips, here)  # with their times
    before = make(here, out, key, jobs=1)
    here.rename(there)
    after = make(there, out, None)
    assert after.already and after.manifest == before.manifest
    for was, now in zip(before.ledger, after.ledger, strict=True):
        assert now == was | {"source": was["source"].replace(str(here), str(there))}
    lines = (out / "local" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == after.ledger


@pytest.mark.parametrize(
    "name", ["manifest.json", "shard-2020.tar", "store/thesis.tex", "local/work/thesis.tex"]
)
def test_what_no_earlier_run_has_made_is_not_replaced(name, clips, tmp_path, key):
    theirs = tmp_path / name
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("theirs")
    for _ in range(2):
        with pytest.raises(InputError, match="is in the way"):
            make(clips, tmp_path, key, force=True)
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / "lock").touch()  # no more than a run leaves that was refused
    assert theirs.read_text() == "theirs"


def test_ids_are_the_same_in_every_version():
    """Shards of one key match, however old; a patient named like a file is not its video."""
    source, key = Source(Path("/videos/a/x.mp4"), "a/x.mp4"), bytes.fromhex(KEY)
    assert video_ids([source], key) == {"a/x.mp4": "f2dcbe6c565f7286"}
    assert keyed_hash(key, "patient", "a/x.mp4") == "ab1eb884c483bd3a"


def test_a_new_key_comes_with_its_shards(clips, tmp_path, key):
    (tmp_path / "other").write_text("ff" * 31)
    with pytest.raises(InputError, match="want 64 hex digits"):  # half a key can be guessed
        make(clips, tmp_path / "out", tmp_path / "other")
    (tmp_path / "other").write_text("ff" * 32)
    make(clips, tmp_path / "out", key)
    first = make(clips, tmp_path / "out", tmp_path / "other", force=True)
    assert (tmp_path / "out" / "local" / "key").read_text() == "ff" * 32 + "\n"
    assert make(clips, tmp_path / "out", None).manifest == first.manifest


def test_a_lost_key_changes_no_ids_unnoticed(clips, tmp_path, key):
    make(clips, tmp_path / "out", key)
    before = public_bytes(tmp_path / "out")
    (tmp_path / "out" / "local" / "key").unlink()
    for force in (False, True):
        with pytest.raises(InputError, match="/local/key: is missing, and .* other ids; put it"):
            make(clips, tmp_path / "out", None, force=force)
    assert make(clips, tmp_path / "out", key).already  # and it is there again
    make(clips, tmp_path / "out", None, force=True)
    assert public_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("new_ids", [False, True])
def test_new_shards_that_were_stopped_go_on(new_ids, clips, tmp_path, key, capsys):
    """--force on a finished folder: both passes are made again, but once."""
    out = tmp_path / "out"
    make(clips, out, key)
    before = public_bytes(out)
    if new_ids:
        shutil.rmtree(out / "local")

    def stop_after_two(done, total, note):
        if done == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make(clips, out, None, force=True, jobs=1, report=stop_after_two)
    assert public_bytes(out) == before
    resumed = make(clips, out, None, force=True, jobs=1)
    assert resumed.resumed >= 2 and not resumed.already
    assert resumed.new_ids == new_ids
    show(resumed)
    assert ("have new ids" in capsys.readouterr().err) == new_ids
    assert not (out / "local" / "work").exists()
    assert (public_bytes(out) == before) != new_ids  # other ids, other names in the shards
    again = make(clips, out, None)
    assert again.already
    with pytest.raises(ZeroDivisionError):
        make(clips, out, None, force=True, jobs=1, report=stop_after_two)
    assert (out / "local" / "work").exists()
    assert make(clips, out, None).already
    assert not (out / "local" / "work").exists()  # given up


def test_what_is_damaged_or_of_another_version_is_made_again(clips, tmp_path, key):
    out, garbage = tmp_path / "out", b"\xff\x00\x80" * 40
    make(clips, out, key, jobs=1)
    before = public_bytes(out)
    for name, what in [
        ("shard-000001.tar", None),  # gone
        ("shard-000001.idx", None),
        ("manifest.json", lambda d: d.replace(b'"format": 1', b'"format": 7')),
        ("manifest.json", lambda d: d[:100]),
        ("local/request.json", lambda d: garbage),
        ("local/ledger.jsonl", lambda d: garbage),
        ("local/ledger.jsonl", lambda d: d[: d.index(b"\n") + 1]),
        ("local/ledger.jsonl", None),
    ]:
        if what:
            (out / name).write_bytes(what((out / name).read_bytes()))
        else:
            (out / name).unlink()
        with pytest.raises(InputError, match="damaged, of another version, or .*; --force") as e:
            make(clips, out, key)
        assert "\n" not in str(e.value)
        (out / "local" / "work").mkdir()
        (out / "local" / "work" / "request.json").write_bytes(garbage)
        assert not make(clips, out, key, jobs=1, force=True).already
        assert public_bytes(out) == before, name
    (out / "local").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="made from is not in .*/local; put that back; --force"):
        make(clips, out, key)
    shutil.rmtree(out / "local")
    (tmp_path / "elsewhere").rename(out / "local")
    (out / "local" / "key").write_bytes(garbage)
    with pytest.raises(InputError, match="local/key: want 64 hex digits; put it back") as e:
        make(clips, out, None)
    assert "\n" not in str(e.value)
    assert make(clips, out, key).already and (out / "local" / "key").read_text() == KEY + "\n"


def test_a_local_folder_of_other_shards_is_not_believed(clips, tmp_path, key):
    """Their request, settings and counts are the same, but not the ids."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    make(clips, mine, key)
    (tmp_path / "other").write_text("ff" * 32)
    make(clips, theirs, tmp_path / "other")
    shutil.rmtree(theirs / "local")
    shutil.copytree(mine / "local", theirs / "local")
    with pytest.raises(InputError, match="or not those of .*/theirs/local; --force"):
        make(clips, theirs, None)
    assert not make(clips, theirs, None, force=True).reused
    assert public_bytes(theirs) == public_bytes(mine)


def test_what_may_not_be_read_is_no_reason_to_replace_it(clips, tmp_path, monkeypatch):
    def again():
        return shard([clips / "u.mp4"], tmp_path / "out", SMALL, device="cpu", jobs=1)

    again()

    def refused(read):
        def instead(path, *args, **kwargs):
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path, *args, **kwargs)

        return instead

    with monkeypatch.context() as patch:
        for read in ("read_text", "read_bytes"):  # root may read everything
            patch.setattr(Path, read, refused(getattr(Path, read)))
        for name in ("manifest.json", "request.json", "ledger.jsonl"):
            with pytest.raises(PermissionError, match=name):
                again()
        name = "key"
        with pytest.raises(InputError, match=r"^/.*/key: cannot be read \(Permission denied\)$"):
            again()
    assert again().already


def test_two_runs_do_not_mix(clips, tmp_path, key):
    import fcntl

    (tmp_path / "out" / "local").mkdir(parents=True)
    with (tmp_path / "out" / "local" / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another `sslus shard`"):
            make(clips, tmp_path / "out", key)


def gone(group: int, within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def long_videos(clip, pattern, tmp_path_factory) -> Path:
    """Some that take a while."""
    folder = tmp_path_factory.mktemp("long")
    for i in range(6):
        clip(folder / f"{i}.mp4", pattern(150, 256, 256, seed=i))
    return folder


@pytest.fixture(scope="module")
def straight(long_videos, tmp_path_factory) -> dict[str, bytes]:
    """What comes of them where nothing stops it."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "key").write_text(KEY)
    settings = Settings(size=128, stride=1)
    shard([long_videos], folder / "out", settings, key=folder / "key", device="cpu")
    return public_bytes(folder / "out")


def workers_of(pid: int) -> list[int]:
    """Its worker processes, once they are Python interpreters."""
    children = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid=,args="], capture_output=True, text=True
    ).stdout.splitlines()
    return [int(x.split()[0]) for x in children if "multiprocessing.spawn" in x]


def begin(arguments: list, until: Callable[[int], object]) -> subprocess.Popen:
    """`sslus shard` in a process group of its own, as a terminal starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sslus.tools", "shard", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not until(process.pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_any_moment_it_goes_on(how, long_videos, straight, tmp_path, key):
    arguments = [long_videos, "-o", tmp_path / "out", "--all", "--device", "cpu", "--jobs", 2,
                 "--size", 128, "--key", key]  # fmt: skip
    work = tmp_path / "out" / "local" / "work"
    process = begin(arguments, lambda pid: any(work.glob("*.jpegs")))
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert gone(process.pid, within_seconds=5)  # no worker is left behind
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert stderr.splitlines()[-1].startswith("Error: stopped; ")
        assert not list(work.glob("*.tmp"))
    assert public_bytes(tmp_path / "out") == {}
    assert command("shard", *arguments).returncode == 0
    assert public_bytes(tmp_path / "out") == straight


def test_ctrl_c_while_the_workers_start_is_one_line(long_videos, straight, tmp_path, key):
    """A terminal sends it to the workers too, in which nothing of ours runs yet."""
    arguments = [long_videos, "-o", tmp_path / "out", "--all", "--device", "cpu", "--jobs", 2,
                 "--size", 128, "--key", key]  # fmt: skip
    for delay_seconds in (0.0, 0.1, 0.2):
        process = begin(arguments, workers_of)
        time.sleep(delay_seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130 and gone(process.pid, within_seconds=5), stderr
        errors = [x for x in stderr.splitlines() if x.startswith("Error: ")]
        assert len(errors) == 1 and "the same command resumes" in errors[0], stderr
        assert "Traceback" not in stderr, (delay_seconds, stderr)
    # A worker that is hit and not stopped at once would die of it.
    process = begin(arguments, lambda pid: len(workers_of(pid)) == 2)
    for worker in workers_of(process.pid):
        os.kill(worker, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert public_bytes(tmp_path / "out") == straight


def test_a_signal_waits_while_processes_are_started():
    """Even if another thread, such as the progress bar's, takes it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    end, began = threading.Event(), []
    thread = threading.Thread(target=end.wait)
    thread.start()
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        began.append("all of them")
    end.set()
    thread.join()
    assert began and signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize(
    "place", ["module._write_all", "shard_folder.sync_folder", "shard_folder.shutil.rmtree"]
)
def test_killed_in_the_second_pass_it_goes_on(place, clips, tmp_path, key):
    """Before it, when the shards lie there without a manifest, and after the manifest."""
    make(clips, tmp_path / "straight", key)
    out = tmp_path / "out"
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from sslus.engine import shard as module, shard_folder\n"
        "def die(path, *a, **k):\n"
        "    if not k:  # the call that clears the place of new shards is not meant\n"
        "        os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        f"    {place} = die\n"
        f"    clips, out = Path({str(clips)!r}), Path({str(out)!r})\n"
        f"    module.shard([clips], out, module.{SMALL!r}, key=Path({str(key)!r}), jobs=1,\n"
        "                 device='cpu', labels=clips / 'labels.csv')\n"
    )
    (tmp_path / "killed.py").write_text(code)
    killed = subprocess.run([sys.executable, tmp_path / "killed.py"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / "manifest.json").exists() == place.endswith("rmtree")
    again = make(clips, out, key)
    assert again.already == place.endswith("rmtree") and (again.already or again.resumed == 6)
    assert public_bytes(out) == public_bytes(tmp_path / "straight")


def in_the_swap(monkeypatch, out: Path, visit: Callable[[], None]) -> None:
    """Call `visit` before each change from the first to what is shared to the new manifest."""
    inside = []

    def watched(name, change):
        def instead(*paths, **kwargs):
            if inside or any(Path(p).parent == out for p in paths):
                inside.append(name)
                visit()
            change(*paths, **kwargs)
            if Path(paths[-1]) == out / "manifest.json" and name == "replace":
                inside.clear()

        return instead

    for name in ("unlink", "rename", "replace"):  # what pathlib calls
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))


def test_killed_at_any_moment_of_the_swap_it_goes_on(clips, tmp_path, key, monkeypatch):
    """Whoever reads then finds the old set of shards, the new one, or none: never some of each."""
    out, moments = tmp_path / "out", []
    make(clips, out, key, Settings(size=32, frames_per_shard=1000))
    with monkeypatch.context() as patch:

        def copy():
            moments.append(shutil.copytree(out, tmp_path / f"{len(moments)}"))

        in_the_swap(patch, out, copy)
        make(clips, out, key, force=True)
    sets = [public_bytes(moments[0]), public_bytes(out)]
    assert len(moments) == 10 and sets[0] != sets[1]
    for moment in moments:
        now = public_bytes(moment)
        assert now in sets or "manifest.json" not in now
        again = make(clips, moment, key, jobs=1, force=True)
        assert again.resumed == 6 and public_bytes(moment) == sets[1]
        assert make(clips, moment, None).already  # with ledger and key


@pytest.mark.parametrize("how", [signal.SIGTERM, OSError])
def test_stopped_in_the_swap_it_decodes_nothing_again(how, clips, tmp_path, key, monkeypatch):
    out, changes = tmp_path / "out", []
    make(clips, out, key)
    before = public_bytes(out)
    with monkeypatch.context() as patch:

        def stop():
            changes.append(how)
            if len(changes) == 8:  # the first shard is in place
                if how is OSError:
                    raise OSError("the disk is gone")
                signal.raise_signal(how)

        in_the_swap(patch, out, stop)
        with pytest.raises(Interrupted if how == signal.SIGTERM else OSError):
            make(clips, out, key, force=True)
    assert "manifest.json" not in public_bytes(out) and len(list(out.glob("*.tar"))) == 1
    again = make(clips, out, key, force=True)
    assert again.resumed == 6 and public_bytes(out) == before


def decode_only(clips, out, key, monkeypatch) -> Path:
    """Stop before any shard is written. Returns the folder with the spools."""
    with monkeypatch.context() as patch:
        patch.setattr("sslus.engine.shard._write_all", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(clips, out, key)
    return out / "local" / "work"


def test_spools_that_a_power_cut_has_damaged_are_made_again(clips, tmp_path, key, monkeypatch):
    make(clips, tmp_path / "straight", key)
    out = tmp_path / "out"
    work = decode_only(clips, out, key, monkeypatch)
    first, second, third, *rest = sorted(work.glob("*.jpegs"))
    first.write_bytes(b"")  # its name came to the disk, its content did not
    second.write_bytes(bytes(second.stat().st_size))
    third.with_suffix(".json").write_bytes(b"\0" * 100)
    again = make(clips, out, key)
    assert again.resumed == len(rest) > 0
    assert public_bytes(out) == public_bytes(tmp_path / "straight")


def test_a_disk_that_failed_and_is_back_costs_no_frames(clips, tmp_path, key, monkeypatch):
    """Unplugged while a file is read, after some of its frames."""
    from sslus.engine import spool as module

    class Unplugged(PyavBackend):
        def prepared(self, path, *arguments):
            yield from itertools.islice(super().prepared(path, *arguments), 4)
            raise VideoError(path, "cannot be read to its end (Input/output error)")

    make(clips, tmp_path / "straight", key)
    out = tmp_path / "out"
    work = decode_only(clips, out, key, monkeypatch)
    sources = find_videos([clips])[0]
    ids = video_ids(sources, bytes.fromhex(KEY))
    monkeypatch.setattr(module, "_worker_backends", [Unplugged()])
    record = module.spool_video(clips / "u.mp4", ids["u.mp4"], SMALL, work)
    assert record["status"] == "incomplete"

    class Pool:
        def map(self, function, tasks):
            yield 0, record

    gone = Source(tmp_path / "u.mp4", "u.mp4")
    job = shards._Job([gone], ids, None, b"", SMALL, work, {}, {}, None)
    with pytest.raises(InputError, match=r"u.mp4: was there at the start and is gone"):
        shards._decode_all(job, Pool(), several=False)
    assert make(clips, out, key).resumed == len(sources) - 1
    assert public_bytes(out) == public_bytes(tmp_path / "straight")


@pytest.mark.parametrize("refuses", [False, True])
def test_that_others_can_read_local_is_told(refuses, clips, tmp_path, key, monkeypatch, capsys):
    """On a file system that ignores permissions, or refuses to change them."""

    really = Path.chmod

    def chmod(path, mode):
        really(path, 0o755)
        if refuses:
            raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", chmod)
        result = make(clips, tmp_path / "out", key)
    show(result)
    assert f"Warning: others can read {tmp_path}/out/local, which has" in capsys.readouterr().err
    show(make(clips, tmp_path / "out", key))
    assert "others can read" not in capsys.readouterr().err


def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch):
    """So that a power cut leaves the old content or the new, and whole."""
    done = []

    def noted(what: str, real: Callable, place: Callable) -> Callable:
        return lambda *x: (done.append(f"{what} {Path(place(*x)).name}"), real(*x))[1]

    folder = tmp_path / "folder"
    folder.mkdir()
    fsync = noted("sync", os.fsync, lambda fd: Path(f"/proc/self/fd/{fd}").readlink())
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, noted("name", getattr(Path, name), lambda _, to: to))
    with atomic_file(folder / "a", "w") as f:
        f.write("a")
    assert done == ["sync a.tmp", "name a", "sync folder"]
    done.clear()
    with atomic_folder(folder / "b") as new:
        (new / "c").touch()
    assert done == ["sync .b.tmp", "name b", "sync folder"]


def test_a_file_system_that_syncs_no_folders_is_no_obstacle(clips, tmp_path, key, monkeypatch):
    """As one that VirtualBox shares."""
    fsync = os.fsync

    def files_only(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr("os.fsync", files_only)
    make(clips, tmp_path / "out", key)
    assert make(clips, tmp_path / "out", key).already
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match=str(tmp_path)):  # which does not say where by itself
        sync_folder(tmp_path)


def test_full_disk(clip, tmp_path, small_disk):
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):  # noise, which JPEG cannot make small: 3 x 2.5 MB
        clip(videos / f"{i}.mp4", rng.integers(0, 256, (40, 256, 256), dtype=np.uint8))
    out = small_disk / "out"
    arguments = ["shard", videos, "-o", out, "--all", "--device", "cpu", "--jobs", 1]
    one_line(command(*arguments), 1, f"no space left on the disk of {out}/local/work/")
    assert public_bytes(out) == {}
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert command(*arguments).returncode == 0
    assert read_manifest(out).num_frames == 120


@pytest.mark.parametrize("decoders", [1, 2])
def test_a_crashing_decoder_costs_one_file(decoders, clips, tmp_path):
    """It takes its worker along, and the one that tries again; the rest goes on. The file goes to
    the next decoder, if there is one."""
    tries = tmp_path / "tries"
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from sslus.engine import shard as module, spool\n"
        "probe = spool.probe\n"
        "def crash(path):\n"
        "    if path.name == 'u.mp4':\n"
        f"        tries = Path({str(tries)!r}).open('a+')\n"
        "        tries.seek(0)\n"
        "        if len(tries.readlines()) < 2:\n"
        "            print(os.getpid(), file=tries, flush=True)\n"
        "            os.kill(os.getpid(), 9)\n"
        "    return probe(path)\n"
        "spool.probe = crash  # in the workers too, which run this file but for what follows\n"
        f"module.choose_backends = lambda *a: [('pyav', 'cpu')] * {decoders}\n"
        "if __name__ == '__main__':\n"
        f"    clips, out = Path({str(clips)!r}), Path({str(tmp_path / 'out')!r})\n"
        "    report = module.shard([clips], out, jobs=2, device='cpu')\n"
        "    print(len(report.ledger), [(r['source'], r['status'], r['why'])"
        " for r in report.problems])\n"
    )
    (tmp_path / "crashes.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "crashes.py"], capture_output=True, text=True
    )  # fmt: skip
    refused = f"6 [('{clips / 'u.mp4'}', 'refused', 'the decoder crashed"
    assert done.stdout.startswith("6 []" if decoders == 2 else refused), done.stdout + done.stderr
    assert len(set(tries.read_text().split())) == 2


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), RuntimeError("no thread")])
def test_workers_that_cannot_start_are_the_machines_fault(error, monkeypatch):
    def start(thread):
        raise error

    monkeypatch.setattr("threading.Thread.start", start)
    with pytest.raises(InputError, match=f"cannot start .{re.escape(str(error))}.: .*ulimit"):
        Workers(1, print, ())


def test_workers_killed_while_idle_are_replaced(clips, tmp_path, key):
    """Between the two passes, when no file is to blame; whether it has been noticed or not."""
    killed = []

    def kill_all(done, total, note):
        if done == total and not killed:
            for worker in workers_of(os.getpid()):
                killed.append(worker)
                os.kill(worker, signal.SIGKILL)

    assert not make(clips, tmp_path / "out", key, jobs=1, report=kill_all).problems
    make(clips, tmp_path / "straight", key)
    assert killed and public_bytes(tmp_path / "out") == public_bytes(tmp_path / "straight")


class Killing:
    """Kills a process when it is on its way to another one, where it arrives as 0."""

    def __init__(self, pid):
        self.pids = [pid]

    def __reduce__(self):
        if self.pids:
            os.kill(self.pids.pop(), signal.SIGKILL)
        return int, ()


def test_a_task_is_tried_again_where_its_worker_died_before_it_came():
    with worker_pool(1, int, (), str) as workers:
        for noticed in (True, False):
            (pid,) = workers.pools[0]._processes
            task = (Killing(pid),)  # is sent when its future is there already
            if noticed:
                os.kill(pid, signal.SIGKILL)
                while not workers.pools[0]._broken:
                    time.sleep(0.01)
                task = (0,)
            assert dict(workers.map(str, [task, (7,)])) == {0: "0", 1: "7"}
        crash = ("__import__('os')._exit(1)",)
        results = dict(workers.map(eval, [("1 + 1",), crash, ("2 + 2",)]))
    assert isinstance(results[1], BrokenProcessPool) and (results[0], results[2]) == (2, 4)


def test_changed_sources_are_seen(pattern, clip, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    clip(videos / "x.mp4", pattern(10, 64, 64))
    shard([videos], tmp_path / "out", SMALL, device="cpu", jobs=1)
    (videos / "x.mp4").rename(tmp_path / "x.mp4")
    clip(videos / "x.mp4", pattern(12, 64, 64))
    clip(videos / "y.mp4", pattern(12, 64, 64))
    with pytest.raises(InputError, match="1 of the videos added; 1 of the videos changed"):
        shard([videos], tmp_path / "out", SMALL, device="cpu", jobs=1)
    (videos / "y.mp4").unlink()
    (tmp_path / "x.mp4").rename(videos / "x.mp4")
    (videos / "labels.csv").write_text("path,label,patient\nx.mp4,a,p\n")
    other = replace(SMALL, quality=50)
    with pytest.raises(InputError, match=r"quality was \d+, now 50; labels: none before\)"):
        shard([videos], tmp_path / "out", other, labels=videos / "labels.csv", device="cpu", jobs=1)
    make(videos, tmp_path / "out", None, jobs=1, force=True)
    for row in ("x.mp4,a,q", "x.mp4,b,p"):  # another patient, another label
        (videos / "labels.csv").write_text(f"path,label,patient\n{row}\n")
        with pytest.raises(InputError, match=r"other videos, labels or settings \(labels\)"):
            make(videos, tmp_path / "out", None, jobs=1)


def test_a_manifest_that_cannot_be_used_says_why(clips, tmp_path, key):
    make(clips, tmp_path / "out", key)
    path = tmp_path / "out" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(InputError, match="format 7"):
        read_manifest(tmp_path / "out")
    path.write_text(text.replace('"quality": 95', '"quality": 96'))
    with pytest.raises(InputError, match="was changed"):
        read_manifest(tmp_path / "out")
    huge = text.replace('"num_videos": ', '"num_videos": ' + "9" * 5000)
    for damage in (text[:100], "[" * 10**5, huge):
        path.write_text(damage)
        with pytest.raises(InputError, match="damaged"):
            read_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda m: m["shards"][0].update(num_frames=10**12), "num_frames 1000000000"),
        (lambda m: m.update(num_frames=-1), "num_frames .*, got -1"),
        (lambda m: m.update(num_frames=float(m["num_frames"])), r"num_frames .*, got .*\.0"),
        (lambda m: m.update(num_videos=-1), "0 to num_frames as num_videos"),
        (lambda m: m["shards"][0].update(num_frames=-5), "1 frame or more in shard-000000.tar"),
        (lambda m: m["shards"][0].update(num_frames=None), "1 frame or more in shard-000000.tar"),
        (lambda m: m["shards"][0].update(name="../../etc/passwd"), "names like shard-000000.tar"),
        (lambda m: m["shards"][0].pop("bytes"), "length and the digest of shard-0000"),
        (lambda m: m["shards"][0].update(sha256=None), "the length and the digest of shard-0000"),
        (lambda m: m["settings"].update(size=10**6), "a size of 1 to 4096"),
        (lambda m: m.update(mean=float("nan")), "mean and std from 0 to 1"),
        (lambda m: m.update(labels=[["a"]]), "names as labels"),
        (lambda m: m.update(settings=[]), "list indices"),
        (lambda m: m.update(decoders={"pyav": "2"}), "a number of videos for each decoder"),
        (lambda m: m.update(decoders=["pyav"]), "a number of videos for each decoder"),
    ],
)
def test_a_manifest_that_says_what_no_shards_have_is_refused(change, why, shards, tmp_path):
    """With the right digest, which anybody can compute."""
    content = json.loads((shards / "manifest.json").read_text())
    change(content)
    del content["format"], content["digest"]
    Manifest(**content).with_digest().write(tmp_path)
    with pytest.raises(InputError, match=f"manifest.json: damaged .*{why}") as e:
        read_manifest(tmp_path)
    assert "\n" not in str(e.value)


def test_the_real_videos_are_accounted_for(real_data, tmp_path):
    """44 videos, 11,208 frames, H.264 and MPEG-2: none lost."""
    folder = real_data / "pocus-ccby"
    result = command(
        "shard", folder / "pocus_videos", "-o", tmp_path / "out", "--size", 64, "--stride", 50,
        "--labels", folder / "labels.csv", "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "44 of 44" in result.stdout
    assert "11,208 decoded of 11,208 expected" in result.stdout
    assert "sslus train" in result.stdout.splitlines()[-1]
    assert read_manifest(tmp_path / "out").num_videos == 44


@pytest.fixture
def two_kinds(clip, pattern, tmp_path) -> Path:
    """A grey VP9 clip, which DALI decodes without a GPU, and an MPEG-4 clip, which it does not."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    luma = pattern(20, 64, 96)
    clip(folder / "a.webm", luma, codec="libvpx-vp9", options={"crf": "10", "b:v": "0"})
    clip(folder / "b.mp4", luma)
    return folder


def test_a_named_decoder_does_it_or_says_why(two_kinds, tmp_path):
    arguments = ["--size", 64, "--all", "--jobs", 1, "--device", "cpu", "--decoder", "dali"]
    result = command("shard", two_kinds, "-o", tmp_path / "out", *arguments)
    assert result.returncode == 3, result.stderr
    assert "1 of 2 (1 with dali)" in result.stdout and "mpeg4" in result.stderr
    same = shard([two_kinds / "a.webm"], tmp_path / "pyav", Settings(64, 1), device="cpu", jobs=1)
    mine = read_manifest(tmp_path / "out")
    assert mine.num_frames == same.manifest.num_frames == 20
    assert mine.mean == pytest.approx(same.manifest.mean, abs=0.5 / 255)


def test_each_file_goes_where_it_can_be_decoded(two_kinds, tmp_path, monkeypatch):
    """What `auto` does on a GPU machine, with DALI's CPU decoder in the GPU's place."""
    from sslus.engine import shard as module

    order = [("dali", "cpu"), ("pyav", "cpu")]
    monkeypatch.setattr(module, "choose_backends", lambda device, decoder: order)
    report = shard([two_kinds], tmp_path / "out", Settings(64, 1), jobs=1)
    assert report.manifest.decoders == {"dali": 1, "pyav": 1} and not report.problems


@pytest.mark.parametrize(
    ("device", "decoder", "with_gpu", "without"),
    [
        ("auto", "auto", ["dali cuda", "pyav cpu"], ["pyav cpu"]),
        ("auto", "dali", ["dali cuda"], ["dali cpu"]),
        ("auto", "pyav", ["pyav cpu"], ["pyav cpu"]),
        ("cuda", "auto", ["dali cuda"], "dali: no GPU"),
        ("cpu", "auto", ["pyav cpu"], ["pyav cpu"]),
        ("cpu", "dali", ["dali cpu"], ["dali cpu"]),
    ],
)
def test_decoders_are_chosen_by_what_is_there(device, decoder, with_gpu, without, monkeypatch):
    """And each is asked once: to start the GPU's takes seconds."""
    for gpu, want in ((True, with_gpu), (False, without)):
        asked = []

        def why_not(name, asked=asked, gpu=gpu):
            asked.append(name)
            return "no GPU" if name == "cuda" and not gpu else None

        monkeypatch.setattr("sslus.engine.dali.why_not", why_not)
        try:
            got = [" ".join(each) for each in choose_backends(device, decoder)]
        except InputError as e:
            got = str(e)
        assert got == want and len(set(asked)) == len(asked)


def test_cuda_without_a_gpu_is_an_error(two_kinds, tmp_path):
    from sslus.engine.dali import why_not

    if why_not("cuda") is None:
        pytest.skip("this machine has a GPU that decodes")
    out = tmp_path / "out"
    one_line(command("shard", two_kinds, "-o", out, "--device", "cuda"), 1, "--device cpu")
    assert not out.exists()


def test_the_page_about_the_files_names_their_fields(clips, tmp_path, key):
    make(clips, tmp_path / "out", key)
    page = (Path(__file__).parent.parent / "engine" / "README.md").read_text()

    def fields(start: str) -> list[str]:
        table = page[page.index(start) :].split("\n\n")[1]
        first = [row.split("|")[1] for row in table.splitlines()[2:]]
        return sorted(name for cell in first for name in re.findall(r"`(\w+)`", cell))

    fact = json.loads(next(iter(samples(tmp_path / "out").values()))["json"])
    assert fields("A frame's `json`:") == sorted(fact)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert fields("`manifest.json`:") == sorted(manifest)
    for name in (*manifest["settings"], *manifest["shards"][0]):
        assert f"`{name}`" in page
    for line in (tmp_path / "out" / "local" / "ledger.jsonl").read_text().splitlines():
        assert fields("`ledger.jsonl` has") == sorted(json.loads(line))


def grow(path: Path) -> None:
    with path.open("ab") as f:
        f.write(bytes(188))


def replace_by_another(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(1, 1))
    other.replace(path)


@pytest.mark.parametrize("change, told", [(grow, True), (replace_by_another, True),
                                          (Path.unlink, False)])  # fmt: skip
def test_a_file_that_changes_while_it_is_read(change, told, clip, pattern, tmp_path, monkeypatch):
    """As while it is copied: all frames that it had are there, and nothing else would tell of the
    others. One that was moved away meanwhile was read to its end."""

    class Backend(spool.PyavBackend):
        def prepared(self, path, *args):
            for frame in super().prepared(path, *args):
                if frame.index == 5:
                    change(path)
                yield frame

    monkeypatch.setattr(spool, "_worker_backends", [Backend()])
    path = clip(tmp_path / "x.ts", pattern(20, 48, 64), codec="mpeg2video")
    record = spool.spool_video(path, "id", Settings(size=32, stride=1), tmp_path)
    assert record["decoded_frames"] == record["expected_frames"] == record["kept_frames"] == 20
    assert record["status"] == ("incomplete" if told else "ok")
    assert ("changed while it was read" in record["why"]) == told
