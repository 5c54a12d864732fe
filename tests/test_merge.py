"""Shards of several clinics become one folder that is as good as any."""

import errno
import json
import os
import shutil

import pytest

from sslus.engine import tar
from sslus.engine.errors import InputError
from sslus.engine.labels import labelled_videos
from sslus.engine.manifest import read_manifest
from sslus.engine.merge import _common, merge
from sslus.engine.shard import Settings, shard
from sslus.engine.store import FrameStore
from sslus.tools.cli import main


@pytest.fixture(scope="module")
def clinics(clips, tmp_path_factory):
    """Two folders of shards of other videos, options and labels, and the CSV file of all labels."""
    folder = tmp_path_factory.mktemp("clinics")
    rows = {"x": ("a/x", "b/x", "a/y"), "y": ("b/z", "u")}
    for clinic, names in rows.items():
        (folder / f"videos-{clinic}").mkdir()
        lines = ["path,label,patient"]
        for i, name in enumerate(names):
            file = f"{i}.mp4"
            shutil.copy(clips / f"{name}.mp4", folder / f"videos-{clinic}" / file)
            lines.append(f"videos-{clinic}/{file},{'left' if i else clinic},{clinic}{i}")
        labels = folder / f"{clinic}.csv"
        labels.write_text("\n".join(lines) + "\n")
        settings = Settings(size=32, stride=1 if clinic == "x" else 3, frames_per_shard=20)
        shard([folder / f"videos-{clinic}"], folder / clinic, settings, labels=labels, jobs=1)
    both = "".join((folder / f"{c}.csv").read_text().split("\n", 1)[1] for c in "xy")
    (folder / "all.csv").write_text("path,label,patient\n" + both)
    return folder


def contents(folder, by_hand):
    return [(image.tobytes(), json.dumps(fact)) for image, fact in by_hand(folder)]


def test_all_frames_are_there_as_they_were(clinics, by_hand, tmp_path):
    told = []
    out = tmp_path / "out"
    result = merge([clinics / "y", clinics / "x"], out, report=lambda *x: told.append(x[:2]))
    want = [*contents(clinics / "x", by_hand), *contents(clinics / "y", by_hand)]
    assert sorted(contents(out, by_hand)) == sorted(want)
    assert told[-1] == (len(want), len(want)) and len(told) == len(result.manifest.shards) > 3
    assert result.num_linked == len(told)
    manifest = read_manifest(out)
    assert manifest == result.manifest and manifest.labels == ["left", "x", "y"]
    assert (manifest.num_videos, manifest.num_frames) == (5, len(want))
    assert manifest.settings["select"] == "1 of every 3 frames | all frames"
    assert manifest.settings["size"] == 32 and manifest.decoders == {"pyav": 5}
    ledger = [json.loads(x) for x in (out / "local" / "ledger.jsonl").read_text().splitlines()]
    num_pixels = 32 * 32 * len(want)
    mean = sum(x["sum"] for x in ledger) / num_pixels
    std = (sum(x["squares"] for x in ledger) / num_pixels - mean**2) ** 0.5
    assert (manifest.mean, manifest.std) == pytest.approx((mean / 255, std / 255), abs=1e-8)
    store = FrameStore.open(out)
    assert len(store) == len(want) and store.num_videos == 5
    for path in out.glob("*.tar"):  # the same as the index that was beside it
        (was,) = (p for c in "xy" for p in (clinics / c).glob("*.tar") if p.samefile(path))
        assert tar.index_path(path).read_bytes() == tar.index_path(was).read_bytes()
    # In any order.
    other = merge([clinics / "x", clinics / "y"], tmp_path / "other").manifest
    assert other == manifest and not (out / "local" / "work").exists()


def test_settings_that_differ_are_listed_once():
    assert _common(["a", "b | c", "b", "a"]) == "a | b | c"
    assert _common([95, 95]) == 95 and _common([95, 90, None]) == "90 | 95 | None"


def test_shards_are_copied_where_they_cannot_be_linked(clinics, by_hand, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out"
    result = merge([(clinics / "x").as_uri(), clinics / "y"], out)
    assert result.num_linked == 0 and result.num_named == 1
    want = [*contents(clinics / "x", by_hand), *contents(clinics / "y", by_hand)]
    assert sorted(contents(out, by_hand)) == sorted(want)
    assert all(p.stat().st_nlink == 1 for p in out.glob("*.tar"))


def test_evaluation_finds_the_videos_of_those_that_have_names(clinics, tmp_path):
    out, away = tmp_path / "out", tmp_path / "local"
    (clinics / "y" / "local").rename(away)
    assert merge([clinics / "x", clinics / "y"], out).num_named == 1
    assert (out / "local").stat().st_mode & 0o77 == 0
    found, _ = labelled_videos(clinics / "x.csv", out)
    assert found == labelled_videos(clinics / "x.csv", clinics / "x")[0] and len(found) == 3
    with pytest.raises(InputError, match="2 of 5 videos are not in"):
        labelled_videos(clinics / "all.csv", out)
    away.rename(clinics / "y" / "local")
    again = merge([clinics / "x", clinics / "y"], out)
    assert again.already and again.num_named == 2
    found, moved = labelled_videos(clinics / "all.csv", out)
    assert len(found) == 5 and not moved
    assert set(found) == set(FrameStore.open(out).video_ids)
    with (clinics / "videos-x" / "0.mp4").open("r+b") as f:  # sizes are compared
        length = f.seek(0, 2)
        f.write(b"0")
        f.flush()
        with pytest.raises(InputError, match="has another size"):
            labelled_videos(clinics / "all.csv", out)
        f.truncate(length)


def wrong_digest(clinics, tmp_path):
    path = sorted((tmp_path / "x").glob("*.tar"))[-1]
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    return ["x", clinics / "y"], f"{path.name}: its digest is wrong"


def same_file(clinics, tmp_path):
    ledger = tmp_path / "x" / "local" / "ledger.jsonl"
    other = json.loads((clinics / "y" / "local" / "ledger.jsonl").read_text().split("\n")[0])
    first, *rest = ledger.read_text().splitlines()
    line = json.loads(first) | {"source": other["source"]}
    ledger.write_text("\n".join([json.dumps(line), *rest]))
    return ["x", clinics / "y"], f"{other['source']} is a file of both .* could not tell them apart"


def no_ledger(clinics, tmp_path):
    (tmp_path / "x" / "local" / "ledger.jsonl").write_text("{}\n")
    return ["x", clinics / "y"], "local: its ledger is missing or damaged"


def same_video(clinics, tmp_path):
    shutil.rmtree(tmp_path / "x" / "local")
    shard([clinics / "videos-x"], tmp_path / "more", Settings(size=32, stride=2), jobs=1,
          key=clinics / "x" / "local" / "key")  # fmt: skip
    shutil.rmtree(tmp_path / "more" / "local")
    return ["x", "more"], "both hold the video [0-9a-f]{16}:"


def other_size(clinics, tmp_path):
    shard([clinics / "videos-y"], tmp_path / "large", Settings(size=48), jobs=1)
    return ["x", "large"], "x has frames of 32 pixels, but large of 48"


def other_shards(clinics, tmp_path):
    shutil.copytree(clinics / "y", tmp_path / "out")
    return ["x", clinics / "y"], "out: has other shards"


def unfinished(clinics, tmp_path):
    (tmp_path / "out" / "local" / "work").mkdir(parents=True)
    (tmp_path / "out" / "local" / "work" / "request.json").write_text("{}")
    (tmp_path / "out" / "local" / "key").write_text("0" * 64)
    return ["x", clinics / "y"], "out: has videos of an unfinished `sslus shard`"


def somebody_elses(clinics, tmp_path):
    (tmp_path / "out" / "store").mkdir(parents=True)
    return ["x", clinics / "y"], "out/store: is in the way"


CASES = {
    "one": lambda clinics, tmp_path: (["x"], "want two folders"),
    "the same": lambda clinics, tmp_path: (["x", clinics / "x"], "are the same shards"),
    "into itself": lambda clinics, tmp_path: (["x", "out"], "is also the folder to write to"),
    "not there": lambda clinics, tmp_path: (["x", "z"], "z: no such folder"),
} | {
    f.__name__: f for f in (wrong_digest, same_file, no_ledger, same_video, other_size,
                            other_shards, unfinished, somebody_elses)
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case, clinics, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clinics / "x", "x")
    folders, why = CASES[case](clinics, tmp_path)
    before = set(tmp_path.rglob("out/*"))
    with pytest.raises(InputError, match=why):
        merge(folders, tmp_path / "out")
    assert main(["merge", *map(str, folders), "-o", "out"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and err.count("\n") == 1
    left, local = set(tmp_path.rglob("out/*")), tmp_path / "out" / "local"
    assert left - {local} == before - {local}  # no shard, and none of the old ones gone


def test_what_was_broken_off_or_broken_is_made_again(clinics, by_hand, tmp_path, monkeypatch):
    out, write = tmp_path / "out", tar.write_index

    def break_off(path, samples):
        if path.name == "shard-000002.tar":
            raise KeyboardInterrupt
        write(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr("sslus.engine.merge.write_index", break_off)
        with pytest.raises(KeyboardInterrupt):
            merge([clinics / "x", clinics / "y"], out)
    assert [p.name for p in out.iterdir()] == ["local"]
    assert [p.name for p in (out / "local").iterdir()] == ["lock"]
    with monkeypatch.context() as patch:  # a kill cleans up nothing, neither here nor later
        patch.setattr("sslus.engine.merge.write_index", break_off)
        patch.setattr("sslus.engine.merge.ShardFolder.give_up", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            merge([clinics / "x", clinics / "y"], out)
    with monkeypatch.context() as patch:
        patch.setattr("sslus.engine.manifest.Manifest.write", break_off)
        with pytest.raises(AttributeError):  # when the shards are in their place
            merge([clinics / "x", clinics / "y"], out)
    assert list(out.glob("*.tar")) and not (out / "manifest.json").exists()
    manifest = merge([clinics / "x", clinics / "y"], out).manifest
    whole = contents(out, by_hand)
    (out / "local/work/new").mkdir(parents=True)  # killed while it deleted that
    assert merge([clinics / "x", clinics / "y"], out).already
    assert not (out / "local/work").exists()
    begun = out / "local/work/request.json"  # by `sslus shard --force`, and not finished
    begun.parent.mkdir()
    begun.write_text("{}")
    assert merge([clinics / "x", clinics / "y"], out).already and begun.exists()
    shutil.rmtree(begun.parent)
    for name in ("shard-000001.tar", "shard-000001.idx"):
        (out / name).unlink()
        again = merge([clinics / "x", clinics / "y"], out)
        assert not again.already and again.manifest == manifest
        assert contents(out, by_hand) == whole


def test_what_ended_as_it_began_is_in_nobodys_way(clinics, tmp_path, monkeypatch):
    """Before anything in the work folder says whose it is."""
    out, folders = tmp_path / "out", [clinics / "x", clinics / "y"]

    def full(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("sslus.engine.shard_folder.atomic_file", full)
        with pytest.raises(OSError, match="No space"):
            merge(folders, out)
        assert [p.name for p in (out / "local").iterdir()] == ["lock"]
        patch.setattr("sslus.engine.merge.ShardFolder.give_up", lambda self: None)  # killed
        with pytest.raises(OSError, match="No space"):
            merge(folders, out)
    (out / "local/work/request.json.tmp").touch()
    assert not merge(folders, out).already


def test_the_command(clinics, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    merged = ["merge", str(clinics / "x"), str(clinics / "y"), "-o", "all of them"]
    assert main(merged) == 0
    out, err = capsys.readouterr()
    assert (
        err.startswith("merge: ")
        and "videos   5\n" in out
        and "links that take no more space" in out
    )
    assert "labels   left, x, y\n" in out
    assert out.endswith("Next: sslus train 'all of them' --method vicreg\n")
    assert main(merged) == 0 and "already complete" in capsys.readouterr().out
    # `sslus shard` does not replace them unasked.
    for key in ([], ["--key", str(clinics / "x/local/key")]):  # which they have not lost
        assert main(["shard", str(clinics / "videos-x"), "-o", "all of them", *key]) == 1
        assert "the shards there were merged from other folders" in capsys.readouterr().err
    assert main(["shard", str(clinics / "videos-x"), "-o", "all of them", "--force"]) == 0
    assert "patients have new ids" in capsys.readouterr().err
