"""`sslus features`: the backbone's features of videos or frames, as a table."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sslus.engine.errors import InputError
from sslus.engine.shard import Settings, shard
from sslus.engine.store import FrameStore
from sslus.ssl import methods
from sslus.ssl.features import Pictures, build
from sslus.ssl.runs import read_run
from sslus.ssl.table import write_features
from sslus.ssl.train import Settings as Training
from sslus.ssl.train import train
from sslus.tools import cli


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """Trained on 32 px frames of six videos, of which one has no label."""
    folder = tmp_path_factory.mktemp("features")
    labels = folder / "labels.csv"
    rows = list(csv.DictReader((clips / "labels.csv").open()))
    text = "".join(f"{clips / r['path']},{r['label']},{r['patient']}\n" for r in rows[1:])
    labels.write_text("path,label,patient\n" + text)
    shard([clips], folder / "shards", Settings(size=32, stride=2), labels=labels, device="cpu")
    values, config = methods.recipe("vicreg", "default")
    small = {"backbone": "test_efficientnet", "max_steps": 2, "batch_size": 4, "image_size": 32}
    train(folder / "shards", Training(**values | small), config, folder / "run", device="cpu")
    return folder / "run"


def read(path):
    """Columns of text, and the features (rows, F)."""
    header, *rows = csv.reader(path.open(newline=""))
    num = sum(name[0] == "f" and name[1:].isdigit() for name in header)
    assert header[-num:] == [f"f{i}" for i in range(num)]
    columns = dict(zip(header[:-num], zip(*(row[:-num] for row in rows), strict=True), strict=True))
    return columns, np.array([row[-num:] for row in rows], np.float32)


@pytest.fixture(scope="module")
def by_hand(run):
    """The store, and the features of its frames one by one."""
    source, store = read_run(run), FrameStore.open(run.parent / "shards")
    backbone = build(source, "vicreg").eval()
    pictures = Pictures.of(source, store, torch.device("cpu"))
    with torch.no_grad():
        found = [backbone(pictures(np.array([i])))[0].numpy() for i in range(len(store))]
    return store, np.stack(found)


def test_a_row_is_a_video_and_its_features_are_the_mean(run, by_hand):
    store, features = by_hand
    table = write_features(run, device="cpu")
    columns, found = read(run / "features.csv")
    assert list(columns) == ["video", "num_frames", "label", "patient"]
    assert list(columns["video"]) == store.video_ids
    for v, got in enumerate(found):
        mine = store.video == v
        np.testing.assert_allclose(got, features[mine].mean(0), rtol=1e-4, atol=1e-5)
        assert columns["num_frames"][v] == str(mine.sum())
        label, patient = store.label[mine][0], store.patient[mine][0]
        assert columns["label"][v] == (store.label_names[label] if label >= 0 else "")
        assert columns["patient"][v] == str(patient)
    assert "" in columns["label"] and "-1" in columns["patient"]
    assert (table.num_rows, table.num_frames) == (len(store.video_ids), len(store))
    with pytest.raises(InputError, match="ends in .csv or .npz"):
        write_features(run, run.parent / "table.xlsx", device="cpu")
    assert table.num_features == features.shape[1]


def test_frames_and_numpy_have_the_same_numbers(run, by_hand, tmp_path):
    store, features = by_hand
    for name in ("a.csv", "a.npz"):
        write_features(run, tmp_path / name, per="frame", names=True, device="cpu")
    columns, found = read(tmp_path / "a.csv")
    np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-5)
    arrays = dict(np.load(tmp_path / "a.npz"))
    np.testing.assert_array_equal(arrays.pop("features"), found)  # a CSV loses no digit
    assert list(arrays) == list(columns)
    assert list(columns) == ["video", "path", "frame", "time_seconds", "label", "patient"]
    for name, array in arrays.items():
        assert array.astype(str).tolist() == list(columns[name]) or name == "time_seconds"
    np.testing.assert_array_equal(arrays["time_seconds"], store.time_seconds)
    np.testing.assert_array_equal(arrays["frame"], store.frame)
    with (run.parent / "shards/local/ledger.jsonl").open() as f:
        sources = {line["id"]: line["source"] for line in map(json.loads, f)}
    assert list(columns["path"]) == [sources[store.video_ids[v]] for v in store.video]


def test_the_command(run, tmp_path, capsys):
    out = tmp_path / "table.csv"
    assert cli.main(["features", str(run), "-o", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert str(out) in said.out and "Next: sslus evaluate" in said.out and "Warning" not in said.err
    assert not any(name in out.read_text() for name in ("clips", ".mp4", ".avi", ".mkv"))
    assert cli.main(["features", str(run), "-o", str(out), "--names"]) == 0
    assert "Warning: the table holds the paths" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--per", "clip"], "--per 'clip': want video or frame"),
        (["-o", "table.xlsx"], "want a name that ends in .csv or .npz"),
        (["-o", "none/table.csv"], "there is no folder none"),
        (["-o", "folder.csv"], "is no file"),
        (["--shards", "nowhere"], "nowhere: no such folder"),
        (["--shards", "s3://me:word@b/shards"], "s3://***@b/shards: is a URL, from which only tr"),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, options, said, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    assert cli.main(["features", str(run), *options]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


def test_names_want_the_local_folder_and_features_are_numbers(run, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (run.parent / "shards").glob("[!l]*"):
        (shards / path.name).symlink_to(path)
    out, threads = tmp_path / "a.csv", []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    write_features(run, out, shards=shards, device="cpu", threads=3)
    assert threads == [3]
    with pytest.raises(InputError, match=r"ledger.jsonl: is missing"):
        write_features(run, out, shards=shards, names=True, device="cpu")
    before = out.read_bytes()

    def broken(source, name):
        backbone = build(source, name)
        with torch.no_grad():
            next(backbone.parameters()).fill_(torch.nan)
        return backbone

    monkeypatch.setattr("sslus.ssl.table.build", broken)
    with pytest.raises(InputError, match="not finite"):
        write_features(run, out, shards=shards, device="cpu")
    assert out.read_bytes() == before


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_a_full_disk_is_one_line_and_the_old_table_stays(run, suffix, small_disk, capsys):
    out = small_disk / f"table.{suffix}"
    out.write_text("old")
    (small_disk / "filler").write_bytes(bytes((4 << 20) - 12288))  # the table takes more
    command = ["features", str(run), "--per", "frame", "--device", "cpu", "-o", str(out)]
    assert cli.main(command) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("Error: no space left on the disk")
    assert out.read_text() == "old" and len(list(small_disk.iterdir())) == 2


READ = (
    "run/config.json", "run/backbone.safetensors", "shards/manifest.json",
    "shards/store/store.json", "shards/store/index.npz", "shards/local/ledger.jsonl",
)  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that fails")
@pytest.mark.parametrize("name", READ)
def test_a_file_that_the_disk_does_not_give_is_named(name, run, by_hand, tmp_path, capsys):
    for part in ("run", "shards"):
        shutil.copytree(run.parent / part, tmp_path / part)
    path, out = tmp_path / name, tmp_path / "a.csv"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # at its start there is nothing: Input/output error
    shards = str(tmp_path / "shards")
    line = ["features", str(tmp_path / "run"), "--shards", shards, "--names", "-o", str(out)]
    assert cli.main(line) == 1 and not out.exists()
    assert capsys.readouterr().err.splitlines()[-1] == f"Error: Input/output error: {path}"
