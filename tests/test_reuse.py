"""Adding to finished shards: what is there is not decoded again, and the bytes are the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from sslus.engine import shard as module
from sslus.engine.errors import InputError, Interrupted
from sslus.engine.reuse import _Spool
from sslus.engine.shard import Settings, ShardReport, shard
from sslus.tools.shard import show

SMALL = Settings(size=64, stride=3, frames_per_shard=20)


@pytest.fixture
def videos(clips, tmp_path) -> Path:
    """The six clips, two of them not yet in the folder, and the key."""
    (tmp_path / "key").write_text("0f" * 32)
    folder = shutil.copytree(clips, tmp_path / "videos")
    (tmp_path / "later").mkdir()
    for name in ("u", "v"):
        (folder / f"{name}.mp4").rename(tmp_path / "later" / f"{name}.mp4")
    (folder / "labels.csv").unlink()
    return folder


def make(videos: Path, out: str, settings=SMALL, **more) -> ShardReport:
    key = videos.parent / "key"
    return shard(
        [videos], videos.parent / out, settings, key=key, jobs=1, device="cpu", **more
    )  # fmt: skip


def add_videos_and_labels(videos: Path, clips: Path) -> Path:
    for path in (videos.parent / "later").iterdir():
        shutil.copy2(path, videos / path.name)
    return shutil.copy2(clips / "labels.csv", videos)


def spoil(path: Path) -> None:
    """Nothing can be decoded any more, but the file looks as before."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def shared(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def timeless(report: ShardReport) -> list[dict]:
    return [line | {"seconds": 0} for line in report.ledger]


def test_only_what_is_new_is_decoded(videos, clips, tmp_path):
    make(videos, "out")
    first = sorted(videos.rglob("*.mp4"))
    labels = add_videos_and_labels(videos, clips)
    whole = make(videos, "whole", labels=labels)
    for path in first:
        spoil(path)
    with pytest.raises(
        InputError, match=r"2 of the videos added\); --force .* \(4 of 6 videos are"
    ):
        make(videos, "out", labels=labels)
    added = make(videos, "out", labels=labels, force=True)
    assert (added.reused, added.resumed) == (4, 0)
    assert shared(tmp_path / "out") == shared(tmp_path / "whole")
    assert timeless(added) == timeless(whole)
    assert make(videos, "out", labels=labels).already
    # Again from shards that were made so: fewer videos, in shards of another size.
    first[0].unlink()
    fewer = make(videos, "out", replace(SMALL, frames_per_shard=7), force=True)
    assert fewer.reused == 5 and fewer.manifest.num_videos == 5 and not fewer.problems


def test_what_may_differ_is_decoded_again(videos, clip, pattern, tmp_path):
    cut = clip(videos / "cut.mkv", pattern(30, 64, 64))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    assert [line["status"] for line in make(videos, "out").problems] == ["incomplete"]

    def again(num: int, **more) -> None:
        assert make(videos, "out", force=True, **more).reused == num

    again(0)  # nothing has changed: whoever asks does not trust what is there
    again(0, settings=replace(SMALL, quality=90))
    again(0)
    first, second, *_ = sorted(videos.rglob("*.mp4"))
    os.utime(first, ns=(0, 0))
    again(3)  # of five: nor the incomplete one, which --force retries
    shutil.copy2(first, second)
    again(3)
    request = json.loads((tmp_path / "out" / "local" / "request.json").read_text())
    for damaged in (request | {"decoding": 0}, request | {"sources": 3}, []):
        (tmp_path / "out" / "local" / "request.json").write_text(json.dumps(damaged))
        again(0)
    (tmp_path / "key").write_text("ff" * 32)
    again(0)


@pytest.mark.parametrize("how", ["changed", "cut off", "gone", "unreadable"])
def test_a_broken_shard_costs_the_decoding_of_its_videos(
    how, videos, clips, clip, pattern, tmp_path, monkeypatch, capsys
):
    clip(videos / "short.mp4", pattern(3, 64, 64))  # one frame is kept
    make(videos, "out")
    labels = add_videos_and_labels(videos, clips)
    whole = make(videos, "whole", labels=labels)
    path = tmp_path / "out" / "shard-000000.tar"
    data, read = path.read_bytes(), Path.read_bytes
    if how == "changed":
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    elif how == "cut off":
        path.write_bytes(data[:5000])
    elif how == "gone":
        path.unlink()

    def failing(p: Path) -> bytes:
        if how == "unreadable" and p == path:
            raise OSError(5, "Input/output error", str(p))
        return read(p)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        added = make(videos, "out", labels=labels, force=True)
    assert added.reused == 1 and timeless(added) == timeless(whole)
    assert shared(tmp_path / "out") == shared(tmp_path / "whole")
    show(added)
    line = "Warning: 1 old shard missing or damaged (shard-000000.tar); videos with frames there"
    assert line in capsys.readouterr().err


def test_a_local_folder_of_other_shards_is_not_believed(videos, clips, tmp_path):
    """One that is copied beside the wrong shards, or a ledger that was changed."""
    make(videos, "other", replace(SMALL, size=32))
    make(videos, "out")
    labels = add_videos_and_labels(videos, clips)
    whole = make(videos, "whole", labels=labels)
    local, ledger = tmp_path / "other" / "local", tmp_path / "out" / "local" / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    none = {"kept_frames": 0}
    for changed in ({"sum": 5}, {"sum": "5"}, {"decoder": None}, none):
        ledger.write_text("".join(json.dumps(line | changed) + "\n" for line in lines))
        shutil.copytree(tmp_path / "out", tmp_path / "again")
        added = make(videos, "again", labels=labels, force=True)
        assert added.reused == 0 and timeless(added) == timeless(whole)
        assert shared(tmp_path / "again") == shared(tmp_path / "whole")
        shutil.rmtree(tmp_path / "again")
    shutil.copytree(tmp_path / "out" / "local", local, dirs_exist_ok=True)
    (local / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    added = make(videos, "other", labels=labels, force=True)  # at 64 px, and 32 px are there
    assert added.reused == 0 and timeless(added) == timeless(whole)
    assert shared(tmp_path / "other") == shared(tmp_path / "whole")


def test_a_file_that_changes_meanwhile_is_decoded_when_it_goes_on(
    videos, clips, tmp_path, monkeypatch
):
    make(videos, "out")
    labels = add_videos_and_labels(videos, clips)
    first, second, *_ = sorted(videos.rglob("*.mp4"))

    def late(job, folder):
        shutil.copy(second, first)
        reuse(job, folder)
        raise KeyboardInterrupt

    reuse = module._reuse
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_reuse", late)
        make(videos, "out", labels=labels, force=True)
    assert make(videos, "out", labels=labels, force=True).resumed == 3
    make(videos, "whole", labels=labels)
    assert shared(tmp_path / "out") == shared(tmp_path / "whole")


def test_stopped_on_the_way_it_says_what_is_kept(videos, clips, tmp_path):
    make(videos, "out")
    labels = add_videos_and_labels(videos, clips)

    def stopped(at: str) -> str:
        def report(done: int, total: int, note: str) -> None:
            if note.endswith(at):
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Interrupted) as e:
            make(videos, "out", labels=labels, force=True, report=report)
        return str(e.value)

    last = len(list((tmp_path / "out").glob("*.tar")))
    told = stopped(f"shard {last} of {last} is used again")
    assert "0 of 6 videos are decoded, and taking 4 from the old shards begins anew; the" in told
    told = stopped(" frames")
    assert "4 of 6 videos are decoded; the same" in told
    assert make(videos, "out", labels=labels, force=True).resumed == 4


@pytest.mark.parametrize("place", ["Archive", "keep_record"])
def test_killed_on_the_way_it_goes_on(place, videos, clips, tmp_path):
    """Between two shards, and between two videos."""
    make(videos, "out")
    before = shared(tmp_path / "out")
    labels = add_videos_and_labels(videos, clips)
    whole = make(videos, "whole", labels=labels)
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from sslus.engine import reuse\n"
        "from sslus.engine.shard import Settings, shard\n"
        f"true, left = reuse.{place}, [2]\n"
        "def die(*arguments):\n"
        "    left[0] -= 1\n"
        "    return true(*arguments) if left[0] else os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        f"    reuse.{place} = die\n"
        f"    shard([Path({str(videos)!r})], Path({str(tmp_path / 'out')!r}), {SMALL!r}, jobs=1,\n"
        f"          labels=Path({str(labels)!r}), device='cpu', force=True)\n"
    )
    (tmp_path / "killed.py").write_text(code)
    killed = subprocess.run([sys.executable, tmp_path / "killed.py"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert shared(tmp_path / "out") == before
    added = make(videos, "out", labels=labels, force=True)
    assert added.resumed + added.reused == 4
    assert added.resumed == (1 if place == "keep_record" else 0)
    assert timeless(added) == timeless(whole)
    assert shared(tmp_path / "out") == shared(tmp_path / "whole")


def test_a_frame_takes_no_more_memory_than_in_the_second_pass():
    spool, num = _Spool(Path("not written")), 20_000
    tracemalloc.start()
    for i in range(num):
        spool.add({"frame": 1000 + i, "time_seconds": i / 37}, memoryview(b"jpeg"))
        spool.waiting.clear()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 40 * num
    assert spool.frames()[-1] == (999 + num, (num - 1) / 37, 4 * (num - 1), 4)
