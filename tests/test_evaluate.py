"""The probe: frozen means frozen, and no patient is on both sides."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.torch import save, save_file
from sklearn.metrics import f1_score, roc_auc_score
from threadpoolctl import threadpool_info

from sslus.engine.errors import InputError
from sslus.engine.shard import Settings as ShardSettings
from sslus.engine.shard import shard
from sslus.engine.store import FrameStore
from sslus.ssl import (
    backbones,
    evaluate,
    features,
    finetune,
    linear,
    neighbours,
    online,
    predictions,
    report,
    scores,
    splits,
    views,
)
from sslus.ssl.methods import vicreg
from sslus.ssl.runs import Run
from sslus.ssl.state import State
from sslus.ssl.train import Options, Settings, train
from sslus.ssl.world import World
from sslus.tools.cli import main
from sslus.tools.evaluate import _print

CLASSES = ("dark", "bright", "striped")


@pytest.fixture(scope="module")
def videos(clip, pattern, tmp_path_factory):
    """Three classes that anyone can tell apart, four patients each with one or two videos."""
    folder = tmp_path_factory.mktemp("videos")
    rows = ["path,label,patient"]
    for patient in range(12):
        name = CLASSES[patient % 3]
        for k in range(1 + patient % 2):
            luma = pattern(6, 64, 64, seed=10 * patient + k)
            if name == "striped":
                luma[:, ::8] = luma[:, 1::8] = 255
            else:
                luma = luma // 4 + (0 if name == "dark" else 150)
            clip(folder / f"{patient}-{k}.avi", luma.astype(np.uint8))
            rows.append(f"{patient}-{k}.avi,{name},p{patient}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def shards(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "shards"
    shard([videos], out, ShardSettings(size=32, stride=1), device="cpu", jobs=1)
    return out


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(backbone="test_resnet", image_size=32, batch_size=16, max_steps=6)
    train(
        shards, settings, vicreg.Config(projector="32-32"), folder,
        device="cpu", threads=1, options=Options(log_every=3),
    )  # fmt: skip
    return folder


@pytest.fixture
def frames(shards, videos):
    return splits.label_frames(FrameStore.open(shards), shards, videos / "labels.csv")


def rewrite(videos, tmp_path, change):
    """labels.csv with changed rows and absolute paths."""
    rows = list(csv.DictReader((videos / "labels.csv").open()))
    for row in rows:
        row["path"] = str(videos / row["path"])
    rows = change(rows)
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def big(num_patients=30, num_classes=4, seed=0):
    """Labelled frames without pictures: patients with videos of several classes."""
    rng = np.random.default_rng(seed)
    y, video, patient = [], [], []
    for p in range(num_patients):
        for c in rng.permutation(num_classes)[: rng.integers(1, num_classes + 1)]:
            for _ in range(rng.integers(1, 4)):
                n = rng.integers(1, 30)
                video += n * [(video[-1] if video else -1) + 1]
                y += n * [c]
                patient += n * [p]
    return splits.LabelledFrames(
        np.arange(len(y)), np.array(y), np.array(video), np.array(patient), None,
        [f"class {c}" for c in range(num_classes)], 0, 0,
    )  # fmt: skip


def small(*classes):
    """Labelled frames: `classes` are the patients of each, with a video of two frames each."""
    pairs = [(c, p) for c, patients in enumerate(classes) for p in patients for _ in range(2)]
    y, patient = np.array(pairs).T
    names = [f"class {c}" for c in range(len(classes))]
    return splits.LabelledFrames(
        np.arange(len(y)), y, np.arange(len(y)) // 2, patient, None, names, 0, 0
    )


def test_labels_join_by_source_file(frames, shards):
    store = FrameStore.open(shards)
    assert len(frames) == len(store) == 18 * 6 and frames.num_unlabelled == 0
    assert frames.names == sorted(CLASSES)
    # The pictures tell: the join is right if each class looks as it was drawn.
    level = [store.frames[frames.index[frames.y == c]].mean() for c in range(3)]
    by_name = dict(zip(frames.names, level, strict=True))
    assert by_name["dark"] < 70 < 140 < by_name["bright"]
    assert all(len(np.unique(frames.patient[frames.video == v])) == 1 for v in range(18))


@pytest.fixture
def movable(videos, shards, tmp_path):
    """Folders of one's own: the videos and, as if sharded from there, their shards."""
    here, out = tmp_path / "here", tmp_path / "shards"
    shutil.copytree(videos, here)
    shutil.copytree(shards, out)
    ledger = out / "local" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace(str(videos), str(here)))
    return here, out


def labelled(out, labels):
    return splits.label_frames(FrameStore.open(out), out, labels)


@pytest.mark.parametrize("learnt, num", [("all", 18), ("train", 0), ("test", 0), ("val", 0)])
def test_labels_that_the_run_has_learnt_are_named(learnt, num, run, videos, tmp_path):
    """A dual task sees what is in its shards; of test and val, only the patients are."""

    def split(rows, other="test"):
        return [r | {"split": "train" if int(r["patient"][1:]) < 6 else other} for r in rows]

    def known(rows):
        if learnt in ("test", "val"):
            return split(rows, learnt)
        return [r for r in rows if learnt == "all" or int(r["patient"][1:]) < 6]

    for name in ("in_shards", "asked"):
        (tmp_path / name).mkdir()
    shards = tmp_path / "shards"
    labels = rewrite(videos, tmp_path / "in_shards", known)
    settings = ShardSettings(size=32, stride=3)
    made = shard([videos], shards, settings, labels=labels, device="cpu", jobs=1)
    counts = {"all": (0, 0), "train": (9, 0), "test": (0, 9), "val": (0, 9)}
    assert (made.unlabelled, made.held_out) == counts[learnt]
    store = FrameStore.open(shards)
    assert (np.sum(store.label < 0), np.sum(store.patient < 0)) == {
        "all": (0, 0), "train": (18, 18), "test": (18, 0), "val": (18, 0),
    }[learnt]  # fmt: skip
    dual = tmp_path / "run"
    shutil.copytree(run, dual)
    config = json.loads((run / "config.json").read_text())
    config["settings"]["dual_task"] = 0.5
    config["shards"] |= {"path": str(shards), "digest": store.digest}
    (dual / "config.json").write_text(json.dumps(config))
    labels = rewrite(videos, tmp_path / "asked", split)
    result = evaluate.evaluate(dual, labels, protocol="knn", num_seeds=1, percents=(100,))
    found = [line for line in result.warnings if "--dual-task" in line]
    assert len(found) == (num > 0) and all(f"of {num} of the 18 frames" in x for x in found)


def test_videos_that_were_moved_keep_their_labels(movable, frames, tmp_path):
    here, out = movable
    assert not labelled(out, here / "labels.csv").moved
    found = labelled(out, here.rename(tmp_path / "there") / "labels.csv")
    assert found.moved
    np.testing.assert_array_equal(found.index, frames.index)
    np.testing.assert_array_equal(found.y, frames.y)
    np.testing.assert_array_equal(found.patient, frames.patient)


def test_no_video_is_taken_for_another(movable, tmp_path):
    here, out = movable
    # One that is missing is not looked for elsewhere.
    (here / "labels.csv").write_text("path,label,patient\n0-0.avi,a,1\nsub/1-0.avi,b,2\n")
    with pytest.raises(InputError, match="1 of 2 videos are not in .*sub/1-0.avi.*If they were mo"):
        labelled(out, here / "labels.csv")
    # Nor is one of two folders chosen that both hold such names.
    ledger = out / "local" / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in lines:
        if line["source"].endswith("/1-0.avi"):
            line["source"] = str(tmp_path / "elsewhere" / "0-0.avi")
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (here / "labels.csv").write_text("path,label,patient\n0-0.avi,a,1\n")
    there = here.rename(tmp_path / "there")
    with pytest.raises(InputError, match="1 of 1 videos are not in"):
        labelled(out, there / "labels.csv")
    # And another file under an old name is not what was sharded.
    there.rename(here)
    (here / "0-0.avi").write_bytes((here / "1-1.avi").read_bytes() + b"longer")
    with pytest.raises(InputError, match="0-0.avi has another size than the file in"):
        labelled(out, here / "labels.csv")


@pytest.mark.parametrize("seed", range(20))
def test_patients_never_leak_and_every_frame_is_tested_once(seed):
    frames = big(seed=seed)
    pairs = splits.folds(frames, seed)
    assert len(pairs) == splits.num_folds(frames) == 5
    tested = np.concatenate([test for _, test in pairs])
    assert np.array_equal(np.sort(tested), np.arange(len(frames)))
    for train_part, test in pairs:
        assert not set(frames.patient[train_part]) & set(frames.patient[test])
        assert set(frames.y[train_part]) == set(range(4))  # every class can be learned
        for percent in (1, 30, 100):
            kept = splits.share(frames, train_part, percent, seed)
            assert set(kept) <= set(train_part)
    other = np.concatenate([test for _, test in splits.folds(frames, seed + 1)])
    assert not np.array_equal(tested, other)


@pytest.mark.parametrize(
    "classes, num_lost",
    [
        ([(0, 1), (2, 3), (0, 2)], 0),  # 0 and 2 apart, though they may fall together
        ([(i, i + 1) for i in range(11)], 0),  # one way only: every other patient
        ([(0, 1), (1, 2), (0, 2)], 1),  # two of three are together, however they are dealt
    ],
)
def test_every_class_can_be_learned_where_patients_allow_it(classes, num_lost):
    frames = small(*classes)
    for seed in range(50):
        pairs = splits.folds(frames, seed)
        num_seen = [len(np.unique(frames.y[train])) for train, _ in pairs]
        assert sum(len(classes) - n for n in num_seen) == num_lost
        again = splits.folds(frames, seed)
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(pairs, again, strict=True))


def test_a_share_is_rounded_up_exactly():
    """Not by floats: 7 / 100 * 100 is a little more than 7."""
    frames = small(range(100), range(100, 200))
    train = np.arange(len(frames))
    for percent, num in (
        (1, 1), (7, 7), (14, 14), (28, 28), (55, 55), (56, 56), (56.5, 57), (0.001, 1), (100, 100),
    ):  # fmt: skip
        kept = splits.share(frames, train, percent, seed=0)
        assert len(np.unique(frames.video[kept])) == 2 * num


def test_a_share_keeps_whole_videos_of_every_class():
    frames = big()
    train_part = splits.folds(frames, 0)[0][0]
    of_class = [np.unique(frames.video[train_part[frames.y[train_part] == c]]) for c in range(4)]
    assert [len(videos) for videos in of_class] == [29, 34, 30, 34]
    smaller = np.array([], int)
    for percent, nums in (
        (1, [1, 1, 1, 1]), (10, [3, 4, 3, 4]), (35, [11, 12, 11, 12]), (100, [29, 34, 30, 34]),
    ):  # fmt: skip
        kept = splits.share(frames, train_part, percent, seed=0)
        of_kept = [np.unique(frames.video[kept[frames.y[kept] == c]]) for c in range(4)]
        assert [len(videos) for videos in of_kept] == nums
        whole = train_part[np.isin(frames.video[train_part], frames.video[kept])]
        assert np.array_equal(kept, whole) and set(smaller) <= set(kept)
        smaller = kept
    assert np.array_equal(smaller, train_part)
    few = [splits.share(frames, train_part, 10, seed) for seed in (0, 1)]
    assert not np.array_equal(*few)
    # Patient by patient: a tenth of the videos does not need nearly every patient.
    assert len(np.unique(frames.patient[few[0]])) <= len(np.unique(frames.video[few[0]]))


def test_which_videos_of_a_patient_a_share_keeps_is_up_to_the_seed():
    """Not their order in the store: a patient's first video may be another view than the last."""
    frames = small([0] * 6, [0] * 6)  # one patient, with six videos of each class
    train = np.arange(len(frames))
    first = set()
    for seed in range(60):
        kept = [set(splits.share(frames, train, percent, seed)) for percent in (1, 40, 80, 100)]
        assert kept[0] < kept[1] < kept[2] < kept[3] == set(train)
        assert set(splits.share(frames, train, 40, seed)) == kept[1]
        first.add(tuple(np.unique(frames.video[[*kept[0]]]).tolist()))
    for of_class in zip(*first, strict=True):  # a pair of videos for each seed
        assert len(set(of_class)) == 6
    assert len(first) > 12  # of 36 pairs: the classes are drawn apart


def test_probe_standardises_on_the_training_part_and_weighs_classes():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [190, 10])
    x = rng.normal(size=(200, 3)).astype(np.float32) * [1, 1000, 1]
    x[:, 0] += 2 * y
    x[:, 2] = 7.0  # constant where it is trained
    guess, probability, converged = linear.probe(x, y, x, 2)
    assert converged and (guess[y == 1] == 1).mean() > 0.6  # unweighted: hardly any
    assert np.array_equal(probability.argmax(1), guess)
    # Nothing of the test part decides anything: a row alone is judged as among others.
    assert all(linear.probe(x, y, x[i : i + 1], 2)[0] == guess[i] for i in (0, 100, 199))
    moved = x + np.float32([0, 0, 1e4])  # what is constant in training counts for nothing
    assert np.array_equal(linear.probe(x, y, moved, 2)[0], guess)
    scaled = np.float32([1e-3, 10, 1])
    assert (linear.probe(x * scaled, y, x * scaled, 2)[0] == guess).mean() > 0.99


def test_a_constant_feature_counts_for_nothing_whatever_its_value():
    """Added up as float32, 0.1 has a mean that is not 0.1, so that it seems to vary."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 2500)
    x = np.float32([y + 0.5 * rng.normal(size=5000), np.full(5000, 0.1)]).T.copy()
    guess, *_ = linear.probe(x, y, x, 2)
    assert np.array_equal(linear.probe(x, y, x + np.float32([0, 1]), 2)[0], guess)


@pytest.mark.parametrize("learned", [[0, 2], [1, 3, 4], [3]])
def test_a_class_that_was_not_learned_has_no_probability(learned):
    """Of five classes; the columns of the others are where their classes are."""
    rng = np.random.default_rng(0)
    y = np.resize(learned, 90)
    x = (np.eye(5)[y] + 0.2 * rng.normal(size=(90, 5))).astype(np.float32)
    guess, probability, _ = linear.probe(x, y, x, 5)
    assert probability.shape == (90, 5)
    assert set(np.flatnonzero(probability.sum(0))) == set(learned)
    np.testing.assert_allclose(probability.sum(1), 1)
    assert np.array_equal(guess, y) and np.array_equal(probability.argmax(1), y)


def test_what_is_nearly_certain_is_not_a_tie():
    """As it would be in float32, where both frames have the probability 1."""
    y = np.repeat([0, 1], 50)
    x = y[:, None].astype(np.float32)
    _, (one, other), _ = linear.probe(x, y, np.float32([[25], [26]]), 2)
    assert 1 - 1e-7 < one[1] < other[1]


def test_scores_by_hand():
    confusion = np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    f1, accuracy, per_class = scores.scores(confusion)
    assert per_class == pytest.approx([16 / 19, 6 / 9, 0])
    assert f1 == pytest.approx((16 / 19 + 6 / 9) / 3)
    assert accuracy == pytest.approx((0.8 + 0.75) / 3)


@pytest.mark.parametrize("protocol", report.PROTOCOLS)
def test_the_scores_are_those_of_the_predictions(
    protocol, run, videos, shards, tmp_path, monkeypatch
):
    """By scikit-learn, from nothing but predictions.csv; for classes that are hard to tell."""
    odd = ('=1+1, "a"', "video", "四腔")

    def hard(rows):
        return [row | {"label": odd[int(row["patient"][1:]) // 4]} for row in rows]

    of_frames, rows = {}, evaluate.rows

    def spied(frames, tasks, guesses, deals):
        for t, guess in zip(tasks, guesses, strict=True):
            assert np.array_equal(guess.y, guess.probability.argmax(1))
            part = of_frames.setdefault((t.backbone, t.percent, t.seed), [])
            part.append((frames.y[t.test], guess.probability))
        return rows(frames, tasks, guesses, deals)

    monkeypatch.setattr(evaluate, "rows", spied)
    judged = evaluate.evaluate(
        run, rewrite(videos, tmp_path, hard), out=tmp_path / "out", protocol=protocol,
        percents=(10, 100), num_seeds=2, steps=2, device="cpu",
    )  # fmt: skip
    with (judged.out / "predictions.csv").open(newline="", encoding="utf-8") as f:
        header, *lines = csv.reader(f)
    columns = [f"probability_{name}" for name in judged.names]
    assert judged.names == sorted(odd)
    assert header == "backbone percent seed video label predicted num_frames".split() + columns
    ledger = [json.loads(line) for line in (shards / "local" / "ledger.jsonl").open()]
    patient_of = {line["id"]: int(Path(line["source"]).stem.split("-")[0]) for line in ledger}
    parts, lines = {}, [dict(zip(header, line, strict=True)) for line in lines]
    for row in lines:
        assert row["label"] == odd[patient_of[row["video"]] // 4] and row["num_frames"] == "6"
        parts.setdefault((row["backbone"], float(row["percent"]), row["seed"]), []).append(row)
    assert all({row["video"] for row in part} == set(patient_of) for part in parts.values())
    assert len(parts) == 8 and len(lines) == 8 * 18
    found = {}
    for (backbone, percent, seed), part in parts.items():
        truth, guess = ([row[key] for row in part] for key in ("label", "predicted"))
        probability = np.array([[float(row[c]) for c in columns] for row in part])
        np.testing.assert_allclose(probability.sum(1), 1)
        assert guess == [judged.names[c] for c in probability.argmax(1)]
        f1 = f1_score(truth, guess, labels=judged.names, average="macro", zero_division=0)
        auroc = roc_auc_score(truth, probability, multi_class="ovr", labels=judged.names)
        y, frames = map(np.concatenate, zip(*of_frames[backbone, percent, int(seed)], strict=True))
        auroc_of_frames = roc_auc_score(y, frames, multi_class="ovr")
        found.setdefault((backbone, percent), []).append((f1, auroc, auroc_of_frames))
    assert 0.05 < np.mean(list(found.values())) < 0.95
    for row in judged.rows[:-1]:
        of_seeds = np.array(found[row.backbone, row.percent])
        got = [row.macro_f1_per_video, row.auroc_per_video, row.auroc]
        assert got == pytest.approx(of_seeds.mean(axis=0).tolist())
        got = [row.macro_f1_per_video_std, row.auroc_per_video_std, row.auroc_std]
        assert got == pytest.approx(of_seeds.std(axis=0, ddof=1).tolist())
    majority = judged.rows[-1]
    assert majority.auroc == majority.auroc_per_video == 0.5
    assert majority.macro_f1_per_video < 0.3
    page = (judged.out / "report.md").read_text()
    for name in ("macro-F1 per video", "AUROC per video"):
        assert f"| {name} |" in page and f"\n- {name[0].upper()}{name[1:]}: " in page


def pooled(frames, probability, seeds=(0,)):
    """What rows makes of the probabilities of frames that are all tested at once."""
    every = np.arange(len(frames))
    tasks = [scores.Task("one", 100.0, seed, every, every) for seed in seeds]
    guesses = [predictions.Guess(p.argmax(1), p) for p in probability]
    return scores.rows(frames, tasks, guesses, [[(every, every)]] * len(seeds))


def test_frames_of_a_video_are_averaged():
    """Two of three frames have another class than the mean of their probabilities."""
    frames = small((0, 1), (2, 3))  # four videos of two frames each
    frames = dataclasses.replace(frames, video=np.array([0, 0, 0, 1, 2, 2, 3, 3]), y=np.repeat(
        [0, 1], 4))  # fmt: skip
    first = np.array([0.45, 0.45, 0.9, 0.4, 0.2, 0.3, 0.55, 0.1])  # of class 0
    (row, _), (videos,) = pooled(frames, [np.stack([first, 1 - first], 1)])
    assert videos.video.tolist() == [0, 1, 2, 3] and videos.y.tolist() == [0, 0, 1, 1]
    assert videos.num_frames.tolist() == [3, 1, 2, 2]
    assert videos.probability[:, 0] == pytest.approx([0.6, 0.4, 0.25, 0.325])
    assert videos.guess.tolist() == [0, 1, 1, 1]
    assert row.macro_f1 == pytest.approx(f1_score(frames.y, first <= 0.5, average="macro"))
    assert row.macro_f1_per_video == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert row.auroc == pytest.approx(13 / 16) and row.auroc_per_video == 1  # pairs in order


def test_auroc_is_that_of_the_classes_that_are_tested():
    rng = np.random.default_rng(0)
    probability = rng.dirichlet(np.ones(4), 200)
    y = rng.integers(0, 4, 200)
    theirs = roc_auc_score(y, probability, multi_class="ovr")
    assert predictions.auroc(y, probability) == pytest.approx(theirs)
    y[y == 2] = 3
    each = [roc_auc_score(y == c, probability[:, c]) for c in (0, 1, 3)]
    assert predictions.auroc(y, probability) == pytest.approx(np.mean(each))


def test_the_majority_of_a_fixed_split_is_that_of_its_training_part():
    frames = small((0, 1, 2), (3, 4, 5, 6))
    frames = dataclasses.replace(frames, test=np.isin(frames.patient, (2, 4, 5, 6)))
    part = np.flatnonzero(~frames.test), np.flatnonzero(frames.test)
    task = scores.Task("one", 100.0, 0, *part)
    sure = np.eye(2)[frames.y[task.test]]
    table, _ = scores.rows(frames, [task], [predictions.Guess(sure.argmax(1), sure)], [[part]])
    assert np.sum(table[-1].confusion, axis=0).tolist() == [len(task.test), 0]


def test_fits_with_other_probabilities_are_not_one_fit():
    """Fine-tunings of two seeds, which predict the same classes."""
    frames = small((0, 1), (2, 3))
    sure = np.eye(2)[frames.y]
    (same, majority), videos = pooled(frames, [sure, sure], seeds=(0, 1))
    assert same.num_seeds == majority.num_seeds == len(videos) == 1
    (row, _), videos = pooled(frames, [sure, 0.9 * sure + 0.05], seeds=(0, 1))
    assert row.num_seeds == len(videos) == 2 and row.macro_f1_std == 0


def test_folds_that_can_be_dealt_in_one_way_have_no_spread():
    """Two patients with both classes: the seeds only change which fold is the first."""
    frames = small((0, 1), (0, 1))
    a, b = (np.flatnonzero(frames.patient == p) for p in (0, 1))
    deals = [[(a, b), (b, a)], [(b, a), (a, b)]]
    tasks = [scores.Task("one", 100.0, seed, *pair) for seed in (0, 1) for pair in deals[seed]]
    sure = np.eye(2)[frames.y]
    guesses = [predictions.Guess(frames.y[t.test], sure[t.test]) for t in tasks]
    table, videos = scores.rows(frames, tasks, guesses, deals)
    assert [row.num_seeds for row in table] == [1, 1] and len(videos) == 1
    assert table[0].macro_f1_std is None and table[0].num_test_frames == len(frames)
    guesses[1] = predictions.Guess(1 - guesses[1].y, guesses[1].probability)
    assert [row.num_seeds for row in scores.rows(frames, tasks, guesses, deals)[0]] == [2, 1]


def test_features_are_frozen(run, shards, tmp_path, monkeypatch):
    """BatchNorm neither drifts nor lets one frame's feature depend on the others."""
    store = FrameStore.open(shards)
    config = json.loads((run / "config.json").read_text())
    backbone = backbones.build("test_resnet", 32, 0)
    backbone.train()  # as a training loop leaves it
    before = {k: v.clone() for k, v in backbone.state_dict().items()}

    def compute(index, cache):
        cache.mkdir(exist_ok=True)
        name = config["settings"]["backbone"]
        pictures = features.Pictures.of(SimpleNamespace(config=config), store, torch.device("cpu"))
        return features._features(
            backbone, False, name, pictures, index, cache, {}, lambda done: None
        )[0]

    index = np.arange(80)
    together = compute(index, tmp_path / "a")
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    alone = np.concatenate([compute(index[i : i + 1], tmp_path / "b") for i in range(5)])
    np.testing.assert_allclose(together[:5], alone, rtol=1e-4, atol=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(views, "whole", None)  # what is in the cache is not computed again
        assert np.array_equal(compute(index, tmp_path / "a"), together)
    nan = torch.full((len(index), 1, 32, 32), torch.nan)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="are not finite; train"):
        patch.setattr(views, "whole", lambda frames, *_: nan[: len(frames)])
        compute(index, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
    (cached,) = (tmp_path / "a").iterdir()
    for size in (0, 100, 2000):  # copied in part
        os.truncate(cached, size)
        assert np.array_equal(compute(index, tmp_path / "a"), together)
    with torch.no_grad():
        next(backbone.parameters()).mul_(1.5)
    assert not np.array_equal(compute(index, tmp_path / "a"), together)  # other weights
    compute(index, tmp_path / "a")
    monkeypatch.setattr(views, "whole", None)
    compute(index, tmp_path / "a")  # from the cache, until anything else is other
    for part, key, value in (
        ("shards", "mean", 0.9), ("shards", "std", 0.9), ("settings", "image_size", 16),
        ("settings", "backbone", "resnet18"),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(TypeError, match="not callable"):
            patch.setitem(config[part], key, value)
            compute(index, tmp_path / "a")
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="not callable"):
        patch.setattr(features, "versions", lambda: {"torch": "other"})
        compute(index, tmp_path / "a")
    with pytest.raises(TypeError, match="not callable"):
        compute(index[::-1], tmp_path / "a")
    store = dataclasses.replace(store, digest="other")
    with pytest.raises(TypeError, match="not callable"):
        compute(index, tmp_path / "a")


def test_a_run_that_goes_on_is_judged_as_it_was_read(run, videos, tmp_path):
    mine = tmp_path / "run"
    shutil.copytree(run, mine)
    weights = mine / "backbone.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    config = json.loads((mine / "config.json").read_text())
    config["settings"]["max_steps"] = 100  # of which 6 are done
    (mine / "config.json").write_text(json.dumps(config))

    @contextlib.contextmanager
    def stage(label, unit):
        other = backbones.build("test_resnet", 32, seed=9)
        backbones.save(other, weights, {"step": 100})
        yield lambda *a: None

    result = evaluate.evaluate(
        mine, videos / "labels.csv", percents=(100,), num_seeds=1, device="cpu", stage=stage
    )
    assert any("from step 6 of 100" in line for line in result.warnings)
    facts = json.loads((mine / "evaluation" / "results.json").read_text())
    assert facts["run"]["weights_sha256"] == digest


@pytest.mark.parametrize("zero", [False, True])
def test_the_random_backbone_is_what_the_run_began_with(zero, tmp_path):
    settings = Settings(
        backbone="test_resnet", image_size=32, batch_size=4, seed=3, zero_init_residual=zero
    ).resolved(torch.device("cpu"), 8)
    state = State.build(settings, vicreg.Config(projector="8"), World(torch.device("cpu")))
    config = {"settings": dataclasses.asdict(settings)}
    if not zero:
        del config["settings"]["zero_init_residual"]  # as of an earlier version
    random = features.build(Run(tmp_path, config, b""), features.RANDOM).state_dict()
    began = state.backbone.state_dict()
    assert random.keys() == began.keys()
    assert all(torch.equal(began[k], v) for k, v in random.items())
    assert zero == any((v == 0).all() for k, v in random.items() if k.endswith("weight"))


def test_a_backbone_that_only_saw_the_pictures_is_no_better_than_random(
    run, shards, videos, tmp_path
):
    """Its weights are those of the start, its BatchNorm has met the frames as in training."""
    store = FrameStore.open(shards)
    config = json.loads((run / "config.json").read_text())
    backbone = backbones.build("test_resnet", 32, config["settings"]["seed"]).train()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    mean, std = config["shards"]["mean"], config["shards"]["std"]
    with torch.no_grad():
        backbone(views.whole(store.frames[:], 32, mean, std))
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(config))
    save_file(backbone.state_dict(), copy / "backbone.safetensors")
    judged = evaluate.evaluate(copy, videos / "labels.csv", percents=(100,), device="cpu")
    scores = {row.backbone: row.macro_f1_of_seeds for row in judged.rows}
    assert scores["vicreg"] == pytest.approx(scores["random init"], abs=0.01)
    # One file where they are the same to the bit.
    first, *others = (np.load(path) for path in (copy / "evaluation").glob("features-*.npy"))
    for other in others:
        np.testing.assert_allclose(first, other, rtol=1e-3, atol=1e-4)


def test_the_whole_report(run, shards, videos, tmp_path, capsys):
    out = tmp_path / "report"
    out.mkdir()
    (out / "features-0123456789abcdef.npy").write_bytes(b"of other weights")
    command = ["evaluate", str(run), "--labels", str(videos / "labels.csv"), "-o", str(out)]
    assert main([*command, "--fractions", "10,100", "--seeds", "2", "--device", "cpu"]) == 0
    assert len(list(out.glob("features-*.npy"))) == 2
    assert not (out / "features-0123456789abcdef.npy").exists()
    shown = capsys.readouterr().out
    assert "random init" in shown and "majority class" in shown and "4 folds by patient" in shown
    assert f"\nNext: sslus train {shards} --method" in shown
    results = json.loads((out / "results.json").read_text())
    rows = {(r["backbone"], r["percent"]): r for r in results["rows"]}
    assert set(rows) == {(b, p) for b in ("vicreg", "random init") for p in (10, 100)} | {
        ("majority class", 100)
    }
    for row in rows.values():
        # Every number has its n; every frame is tested once a seed.
        assert (row["num_test_frames"], row["num_test_videos"]) == (108, 18)
        assert row["num_test_patients"] == 12 and row["num_seeds"] == 2
        assert np.sum(row["confusion"]) == pytest.approx(108)
        assert len(row["macro_f1_of_seeds"]) == 2
    assert rows["vicreg", 10]["num_train_videos"] == 3  # one of each class
    assert rows["vicreg", 100]["num_train_videos"] == 13.5  # three of four folds of 18
    assert rows["random init", 100]["macro_f1"] > 0.7  # classes that a look tells apart
    majority = rows["majority class", 100]
    assert majority["balanced_accuracy"] == pytest.approx(1 / 3)
    assert majority["auroc"] == majority["auroc_per_video"] == 0.5
    assert max(map(len, shown.partition("protocol")[0].splitlines())) <= 100
    for name in ("report.md", "confusion.png"):
        assert (out / name).stat().st_size > 500
    assert "± " in (out / "report.md").read_text()
    assert results["warnings"] == []
    assert results["run"]["weights_sha256"] == (
        hashlib.sha256((run / "backbone.safetensors").read_bytes()).hexdigest()
    )


def test_what_is_written_names_no_one(clip, pattern, run, tmp_path, monkeypatch):
    """Folders, files and patients may be called after people; a report is passed on."""
    home = tmp_path / "Schmidt"
    videos, copy = home / "Schmidt-videos", home / "Schmidt-run"
    rows = ["path,label,patient"]
    for i in range(8):
        videos.mkdir(parents=True, exist_ok=True)
        clip(videos / f"Schmidt-{i}.avi", pattern(3, 64, 64, seed=i))
        rows.append(f"Schmidt-{i}.avi,{'ab'[i % 2]},Schmidt-{i}")
    (videos / "Schmidt-bad.avi").write_bytes(b"junk")
    rows += ["Schmidt-bad.avi,a,Schmidt-8"]
    (home / "Schmidt.csv").write_text("\n".join([rows[0], *(f"{videos}/{r}" for r in rows[1:])]))
    shards = home / "Schmidt-shards"
    shard([videos], shards, ShardSettings(size=32, stride=1), device="cpu", jobs=1)
    copy.mkdir()
    shutil.copy(run / "backbone.safetensors", copy)
    config = json.loads((run / "config.json").read_text())
    config["shards"] |= {"path": str(shards), "digest": "of others"}
    (copy / "config.json").write_text(json.dumps(config))

    drawn = []
    save = Figure.savefig

    def spied(figure, *args, **options):
        drawn.extend(text.get_text() for text in figure.findobj(Text))
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spied)
    for protocol in report.PROTOCOLS:
        evaluate.evaluate(
            copy, home / "Schmidt.csv", protocol=protocol, percents=(100,), num_seeds=1, steps=1,
            device="cpu",
        )  # fmt: skip
    out = copy / "evaluation"
    files = [path for path in out.rglob("*") if path.is_file()]
    written = {str(path.relative_to(out)): path.read_bytes() for path in files}
    names = {"results.json", "report.md", "confusion.png", "predictions.csv"}
    assert {f"{p}{n}" for p in ("", "knn/", "finetune/") for n in names} < set(written)
    for content in (*written.values(), " ".join(written).encode(), " ".join(drawn).encode()):
        assert b"schmidt" not in content.lower() and str(tmp_path).encode() not in content
    results = json.loads(written["results.json"])
    assert "1 labelled videos gave no frame" in results["warnings"][0]  # which had a path in it
    assert results["shards_digest"] == FrameStore.open(shards).digest  # of those that were used


def test_several_runs_are_compared(run, videos, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("evaluation"))
    tail = f"--labels {videos / 'labels.csv'} --fractions 100 --seeds 1 --device cpu".split()
    both = ["evaluate", str(run), str(other), *tail, "--protocol", "knn", "-o"]
    out = tmp_path / "reports"
    assert main([*both, str(out)]) == 0
    results = [
        json.loads((out / r.name / "knn" / "results.json").read_text()) for r in (run, other)
    ]
    assert results[0]["rows"] == results[1]["rows"]
    table = capsys.readouterr().out.rpartition("confusion.png")[2]
    f1 = f"{results[0]['rows'][0]['macro_f1']:.3f}"
    lines = [line.split() for line in table.splitlines() if "knn" in line]
    assert [line[1:5] for line in lines] == [["knn", "100", "%", f1]] * 2
    assert main(["evaluate", str(run), str(run), *tail, "-o", str(out)]) == 1
    assert "folders of the same name" in capsys.readouterr().err
    assert main(["evaluate", str(run), str(tmp_path), *tail]) == 1
    shown = capsys.readouterr()
    assert "has no config.json" in shown.err and not shown.out  # told before the first one runs


@pytest.mark.parametrize("num", [2, 30, 300])
def test_a_confusion_matrix_of_many_classes_can_be_drawn(num, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    row = SimpleNamespace(backbone="x", percent=100.0, confusion=np.eye(num), macro_f1=1.0)
    result = SimpleNamespace(rows=[row] * 3, names=[f"class {i}" for i in range(num)])
    report.draw(result, tmp_path / "confusion.png")
    inches = figures[0].get_size_inches()
    assert inches.prod() * 150**2 < 2e8  # pixels
    cell = 72 * inches[1] / num  # points, for two lines of text
    assert all(2 * label.get_fontsize() < cell for label in figures[0].axes[0].get_yticklabels())
    assert len(figures[0].axes[0].texts) == (num**2 if num < 31 else 0)


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.parametrize("length", [20, 45, 300])
def test_long_names_leave_the_confusion_matrix_its_room(length, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    row = SimpleNamespace(backbone="x", percent=100.0, confusion=np.eye(2), macro_f1=1.0)
    names = [f"{c} {100 * 'APICAL '}"[:length] for c in "ab"]
    report.draw(SimpleNamespace(rows=[row] * 3, names=names), tmp_path / "confusion.png")
    (figure,) = figures
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert min(box.width, box.height) > 0.8 * figure.dpi  # inches, of 1.6 for two classes


def test_every_number_of_the_table_is_in_its_column():
    row = SimpleNamespace(
        backbone="x", percent=10.0, macro_f1=0.1, macro_f1_std=0.01, macro_f1_per_video=0.2,
        macro_f1_per_video_std=0.02, balanced_accuracy=0.3, balanced_accuracy_std=0.03,
        auroc_per_video=0.4, auroc_per_video_std=None, num_train_videos=7.0, num_train_patients=3.0,
    )  # fmt: skip
    _, (cells,) = report.table(SimpleNamespace(rows=[row]))
    scores = ["0.100 ± 0.010", "0.200 ± 0.020", "0.300 ± 0.030", "0.400"]
    assert cells == ["x", "10 %", *scores, "7 (3)"]


def test_a_confusion_matrix_has_the_truth_in_its_rows(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    row = SimpleNamespace(backbone="x", percent=100.0, confusion=[[6, 2], [0, 4]], macro_f1=1.0)
    few = SimpleNamespace(**vars(row) | {"percent": 10.0, "confusion": [[0, 8], [4, 0]]})
    names = ["dark", "$bright"]
    report.draw(SimpleNamespace(rows=[few, row, row, row], names=names), tmp_path / "confusion.png")
    axes, _ = figures[0].axes  # of two backbones at the largest share; the last row is no backbone
    assert np.allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "75 %", (1, 0): "25 %", (0, 1): "0 %", (1, 1): "100 %"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "truth")
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["dark\n8 frames", "$bright\n4 frames"]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())


@pytest.mark.parametrize("columns", ["60", "80"])
def test_a_narrow_terminal_shows_every_runs_name(columns, monkeypatch, capsys):
    names = ["runs/all/barlowtwins", "runs/all/inpainting", "runs/x[lr=1]", "runs/[/]:x:"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    score = "0.123 ± 0.010"
    _print(
        ["run", "protocol", "labels", "macro-F1", "random init", "AUROC"],
        [[name, "linear", "100 %", *[score] * 3] for name in names],
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    width = next(line for line in lines if "linear" in line).index("linear")
    assert "".join(line[:width].strip() for line in lines).endswith("".join(names))


def frames_asked_for(index, unsettled, cache):
    """What is read to compute features, and the file in which they are kept."""
    backbone = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten())
    asked = []

    def pictures(some):
        asked.extend(some)
        return torch.zeros(len(some), 1, 2, 2)

    vars(pictures).update(
        store=SimpleNamespace(digest=""), size=2, mean=0.0, std=1.0, device=torch.device("cpu")
    )
    options = unsettled, "", pictures, index, cache, {}, lambda done: None
    return asked, features._features(backbone, *options)[1]


def test_batch_norm_settles_by_frames_of_the_whole_store(tmp_path):
    """Not by the first ones, which are those of a few videos."""
    index = np.arange(0, 6000, 2)
    assert frames_asked_for(index, True, tmp_path)[0] == [*index[::3], *index]


def test_kept_features_are_those_of_the_same_frames(tmp_path):
    """Other labels may be those of as many frames."""
    asked, path = frames_asked_for(np.arange(5), False, tmp_path)
    assert asked == [0, 1, 2, 3, 4]
    assert frames_asked_for(np.arange(5), False, tmp_path) == ([], path)
    assert frames_asked_for(np.arange(5) + 1, False, tmp_path)[0] == [1, 2, 3, 4, 5]
    np.save(path, np.zeros(()))
    assert frames_asked_for(np.arange(5), False, tmp_path)[0] == asked


def test_what_runs_have_in_common_is_computed_once(run, videos, tmp_path, monkeypatch):
    """The second run has other weights than the first; the third, other random weights, too."""
    runs = [shutil.copytree(run, tmp_path / name) for name in ("first", "second", "third")]
    for seed, one in enumerate(runs[1:], start=8):
        backbones.save(backbones.build("test_resnet", 32, seed), one / "backbone.safetensors", {})
    config = json.loads((runs[2] / "config.json").read_text())
    config["settings"]["seed"] = 1
    (runs[2] / "config.json").write_text(json.dumps(config))
    met = []

    def spy(module, name):
        real = getattr(module, name)

        def spied(*args, **options):
            met.append(name if name != "tune" else f"tune {args[0].backbone}")
            return real(*args, **options)

        monkeypatch.setattr(module, name, spied)

    for module, name in (
        (features, "settle_batch_norm"), (evaluate, "probe"), (evaluate, "votes"),
        (finetune, "tune"),
    ):  # fmt: skip
        spy(module, name)
    monkeypatch.setattr(evaluate, "draw", lambda *a: None)

    def split(rows):
        return [r | {"split": "test" if int(r["patient"][1:]) < 3 else "train"} for r in rows]

    labels = rewrite(videos, tmp_path, split)

    def judge(one, shared, out):
        met.clear()
        for protocol in report.PROTOCOLS:
            evaluate.evaluate(
                one, labels, protocol=protocol, percents=(1, 10), num_seeds=2, steps=1,
                device="cpu", out=out, shared=shared,
            )  # fmt: skip
        names = ("predictions.csv", "results.json", "report.md", "*.npy")
        files = {p.relative_to(out): p.read_bytes() for n in names for p in out.rglob(n)}
        return files, Counter(met)

    shared = {}
    # Two seeds; the two shares keep the same videos, so that one fit is enough for both.
    own = {"probe": 2, "votes": 2, "tune vicreg": 2}
    both = {"settle_batch_norm": 1, "probe": 4, "votes": 4, "tune vicreg": 2, "tune random init": 2}
    for one, calls in zip(runs, (both, own, both), strict=True):
        together, num = judge(one, shared, one / "together")
        assert num == calls
        # To the bit what it is alone, with all that a later evaluation can reuse.
        assert judge(one, None, one / "alone") == (together, both)
        assert len(list(one.glob("together/**/*.npy"))) == 6


def test_a_fit_that_stopped_early_counts_once(run, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 1)
    monkeypatch.setattr(evaluate, "draw", lambda *a: None)

    def split(rows):
        return [r | {"split": "test" if int(r["patient"][1:]) < 3 else "train"} for r in rows]

    labels, shared = rewrite(videos, tmp_path, split), {}
    for out in ("one", "again"):  # then the random backbone's are known
        result = evaluate.evaluate(
            run, labels, percents=(1, 10), num_seeds=2, device="cpu", out=tmp_path / out,
            shared=shared,
        )  # fmt: skip
        # Two backbones and seeds; the two shares keep the same videos.
        assert result.warnings[-1].startswith("4 fits stopped at")


def test_what_does_not_fit_on_a_gpu_is_done_by_the_cpu_and_told(monkeypatch):
    frames, asked, found = big(), [], evaluate.votes
    names = ["vicreg", features.RANDOM]
    tasks = list(evaluate._tasks(frames, names, [10, 100], [splits.folds(frames, 0)]))
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(len(frames), 8)).astype(np.float32) for name in names}

    def votes(*args, device, report):
        asked.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found(*args, device=device, report=report)

    monkeypatch.setattr(evaluate, "votes", votes)
    on_cpu, on_gpu = (
        evaluate._fit_all("knn", tasks, frames, x, torch.device(d), {}, lambda *a: None)
        for d in ("cpu", "cuda")
    )
    assert asked.count("cuda") == 1 and not on_cpu[1]
    assert len(on_gpu[1]) == 1 and "the CPU found them" in on_gpu[1][0]
    for a, b in zip(on_cpu[0], on_gpu[0], strict=True):
        assert np.array_equal(a.probability, b.probability)


def test_each_protocol_has_its_own_report(run, videos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    command = ["evaluate", str(run), "--labels", str(videos / "labels.csv"), "-o", str(out)]
    command += "--fractions 10,100 --seeds 1 --device cpu".split()
    assert main(command) == 0
    linear = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main([*command, "--protocol", "knn,finetune", "--steps", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("majority class") == 2 and shown.out.count("\nNext: ") == 1
    assert "fine-tuning: 32/32 steps" in shown.err
    # Those of the linear probe are as they were, and its features served both.
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == linear
    for protocol, title, settings in (
        ("knn", "Nearest neighbours", {"neighbours": 20, "temperature": 0.07}),
        ("finetune", "Fine-tuning", {"steps": 2, "batch_size": 32, "num_trainings": 16}),
    ):
        results = json.loads((out / protocol / "results.json").read_text())
        page = (out / protocol / "report.md").read_text()
        assert results["protocol"] == protocol and settings.items() <= results["settings"].items()
        assert page.startswith(f"# {title} of vicreg: test_resnet at 32 px\n")
        theirs = json.loads(linear["results.json"])["rows"]
        for row, other in zip(results["rows"], theirs, strict=True):
            same = [key for key in row if key.startswith("num_")] + ["backbone", "percent"]
            assert [row[key] for key in same] == [other[key] for key in same]
            assert np.sum(row["confusion"]) == np.sum(other["confusion"]) == 108
        assert results["rows"][-1] == theirs[-1]
    assert "for 2 steps of 32 frames" in page and "16 trainings." in page
    # Again, from what is kept; with other settings nothing is.
    monkeypatch.setattr(finetune, "tune", None)
    files = {path.name: path.read_bytes() for path in (out / "finetune").iterdir()}
    assert main([*command, "--protocol", "finetune", "--steps", "2"]) == 0
    assert {path.name: path.read_bytes() for path in (out / "finetune").iterdir()} == files
    assert main([*command, "--protocol", "finetune", "--steps", "3"]) == 70
    for wrong, line in (
        (
            ["--protocol", "linear,kn"],
            "--protocol 'linear,kn': want one of linear, knn, finetune, or several, separated by"
            " commas",
        ),
        (["--steps", "3"], "--steps: are those of --protocol finetune, which is not given"),
    ):
        capsys.readouterr()
        assert main([*command, *wrong]) == 1
        assert capsys.readouterr().err == f"Error: {line}\n"


def test_all_work_is_done_by_the_threads_that_are_asked_for(run, videos, tmp_path, monkeypatch):
    met, before = [], torch.get_num_threads()

    def spy(module, name):
        real = getattr(module, name)

        def spied(*args, **options):
            pools = [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]
            # The probe is the work of numpy and scikit-learn, all else that of PyTorch.
            met.append((name, {*pools} if name == "probe" else {torch.get_num_threads()}))
            return real(*args, **options)

        monkeypatch.setattr(module, name, spied)

    for module, name in (
        (evaluate, "probe"), (evaluate, "votes"), (views, "whole"), (finetune, "tune"),
    ):  # fmt: skip
        spy(module, name)
    command = f"evaluate {run} --labels {videos / 'labels.csv'} --fractions 100 --seeds 1 --steps 1"
    command += f" --protocol linear,knn,finetune --device cpu -o {tmp_path} --threads"
    try:
        for num in (3, 2):
            assert main([*command.split(), str(num)]) == 0
            shutil.rmtree(tmp_path)
            assert {name for name, _ in met} == {"probe", "votes", "whole", "tune"}
            assert all(pools == {num} for _, pools in met), met
            met.clear()
    finally:
        torch.set_num_threads(before)


def test_fine_tuning_keeps_patients_apart(run, videos, frames, tmp_path, monkeypatch):
    met = []

    def spied(job, start, pictures, settings, tick):
        place = {frame: i for i, frame in enumerate(frames.index)}
        train, test = ([place[i] for i in part] for part in (job.train, job.test))
        assert not set(frames.patient[train]) & set(frames.patient[test])
        assert np.array_equal(job.y, frames.y[train]) and set(job.y) == {0, 1, 2}
        met.append((job.backbone, job.seed, len(train), tuple(test)))
        return np.eye(3, dtype=np.float32)[frames.y[test]]

    monkeypatch.setattr(finetune, "tune", spied)
    judged = evaluate.evaluate(
        run, videos / "labels.csv", out=tmp_path, protocol="finetune", num_seeds=2,
        percents=(1, 5, 10, 25, 50, 100), device="cpu",
    )  # fmt: skip
    assert [row.macro_f1 for row in judged.rows[:-1]] == [1.0] * 12
    # 1, 5 and 10 % are the same video of each class, and are learned once.
    assert len(met) == len(set(met)) == judged.settings["num_trainings"] <= 2 * 2 * 4 * 4
    for name in ("vicreg", "random init"):
        for seed in (0, 1):
            tests = {test for backbone, s, _, test in met if (backbone, s) == (name, seed)}
            assert sorted(i for test in tests for i in test) == list(range(108))


@pytest.mark.parametrize("protocol", report.PROTOCOLS)
def test_the_labels_of_the_test_part_reach_no_training(protocol, run, videos, tmp_path):
    """Whatever they are, the same is predicted."""
    found = []
    for wrong in (False, True):

        def split(rows, wrong=wrong):
            for row in rows:
                patient = int(row["patient"][1:])
                row["split"] = "test" if patient < 6 else "train"
                if wrong and patient < 6:
                    row["label"] = CLASSES[min(patient, 2)]
            return rows

        out = tmp_path / str(wrong)
        out.mkdir()
        judged = evaluate.evaluate(
            run, rewrite(videos, out, split), out=out, protocol=protocol, percents=(100,),
            num_seeds=1, steps=2, device="cpu",
        )  # fmt: skip
        kept = {path.name: path.read_bytes() for path in judged.out.glob("logits-*")}
        found.append((kept, np.array(judged.rows[0].confusion)))
    (first, confusion), (second, other) = found
    assert first == second and len(first) == (2 if protocol == "finetune" else 0)
    assert np.array_equal(confusion.sum(0), other.sum(0))
    assert not np.array_equal(confusion, other)


def test_progress_rises_to_its_total(run, videos, tmp_path, monkeypatch):
    """Fit by fit, and block by block of a search for neighbours; also over equal fits."""
    monkeypatch.setattr(neighbours, "BLOCK", 200)
    told = {}

    @contextlib.contextmanager
    def stage(label, unit):
        yield lambda done, total, note: told.setdefault(label, []).append((done, total))

    for protocol in ("linear", "knn"):
        evaluate.evaluate(
            run, videos / "labels.csv", out=tmp_path, protocol=protocol, percents=(10, 90, 100),
            num_seeds=2, device="cpu", stage=stage,
        )  # fmt: skip
    for name in ("probe", "knn"):
        done, totals = zip(*told[name], strict=True)
        assert done == tuple(sorted(done)) and {done[-1]} == set(totals)
    assert set(told["probe"]) < set(told["knn"])


def test_two_processes_do_not_write_one_report(run, videos, tmp_path):
    def judge(out, stage=None):
        return evaluate.evaluate(
            run, videos / "labels.csv", out=out, percents=(100,), num_seeds=1, device="cpu",
            stage=stage,
        )  # fmt: skip

    met = []

    def stage(label, unit):
        with pytest.raises(InputError, match="another `sslus evaluate` is writing here; wait"):
            judge(tmp_path / "one")
        met.append(label)
        return contextlib.nullcontext(lambda *a: None)

    judge(tmp_path / "one", stage)
    assert met == ["features", "probe"]
    judge(tmp_path / "one")  # which is free again


@pytest.mark.filterwarnings("error:Glyph")
def test_the_report_has_every_class_at_the_largest_share(run, videos, tmp_path):
    """Whatever the shares, and whatever a class is called."""
    odd = {"dark": "a|<b>", "bright": "$\\no{$", "striped": "50 $ or 四腔"}

    def call_them(rows):
        first, *rest = ({**r, "label": odd[r["label"]]} for r in rows)
        return [first | {"label": "<alone>"}, *rest]

    labels = rewrite(videos, tmp_path, call_them)
    judged = evaluate.evaluate(
        run, labels, out=tmp_path / "out", percents=(20, 10, 20 + 1e-9), num_seeds=1, device="cpu"
    )
    assert [(r.backbone, r.percent) for r in judged.rows] == [
        ("vicreg", 10), ("vicreg", 20), ("random init", 10), ("random init", 20),
        ("majority class", 100),
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.md").read_text()
    _, per_class = page.split("F1 of each class")
    assert r"| $\\no{$ | 50 $ or 四腔 | a\|\<b> |" in per_class
    assert r"Warning: class '\<alone>' is left out: it has 1 patient" in page
    assert [line.split(" |")[:2] for line in per_class.splitlines() if " % |" in line] == [
        ["| vicreg", " 20 %"], ["| random init", " 20 %"], ["| majority class", " 100 %"],
    ]  # fmt: skip


def test_what_the_probe_learns_from_are_the_labels_that_are_kept(
    run, videos, tmp_path, monkeypatch
):
    """Standardisation and class weights too: of the share, never of the full set."""
    sizes, probe = [], evaluate.probe

    def spied(x, y, test, num_classes):
        sizes.append((len(x), len(y)))
        return probe(x, y, test, num_classes)

    monkeypatch.setattr(evaluate, "probe", spied)
    evaluate.evaluate(
        run, videos / "labels.csv", out=tmp_path / "out", percents=(10,), num_seeds=1, device="cpu"
    )
    assert set(sizes) == {(18, 18)}  # three videos of six frames


def test_a_fixed_split_is_kept(run, videos, tmp_path):
    def split(rows):
        return [row | {"split": "test" if int(row["patient"][1:]) < 3 else "train"} for row in rows]

    labels = rewrite(videos, tmp_path, split)
    result = evaluate.evaluate(
        run, labels, out=tmp_path / "out", percents=(10, 100), num_seeds=2, device="cpu"
    )
    assert result.split == "the split of labels.csv, the same for each seed"
    assert {row.num_test_patients for row in result.rows} == {3}
    assert {row.num_train_patients for row in result.rows} == {3, 9}
    # All labels: both seeds make the same fit, which is no measure of a spread.
    assert all((r.num_seeds == 1) == (r.macro_f1_std is None) for r in result.rows)
    assert {r.percent: r.num_seeds for r in result.rows} == {10: 2, 100: 1}
    assert "numbers without ± are those of one seed" in result.spread


def test_videos_of_val_are_neither_trained_nor_tested_on(run, videos, tmp_path):
    def split(rows, parts=("test", "val", "train", "train")):
        """Of each class, a patient for each part."""
        return [row | {"split": parts[int(row["patient"][1:]) // 3]} for row in rows]

    def judge(change):
        return evaluate.evaluate(
            run, rewrite(videos, tmp_path, change), out=tmp_path / "out", protocol="knn",
            percents=(100,), device="cpu",
        )  # fmt: skip

    result = judge(split)
    assert result.split.endswith("for each seed; 5 videos of its part val are not used")
    assert result.split in (result.out / "report.md").read_text()
    without = judge(lambda rows: [row for row in split(rows) if row["split"] != "val"])
    assert result.rows == without.rows and result.num_patients == without.num_patients == 9
    with pytest.raises(InputError, match="is train for all videos but those of val; want some for"):
        judge(lambda rows: split(rows, ("val", "val", "train", "train")))


def test_a_split_with_one_side_is_refused(run, videos, tmp_path):
    labels = rewrite(videos, tmp_path, lambda rows: [row | {"split": "train"} for row in rows])
    with pytest.raises(InputError, match="split is train for all videos; want some for test too"):
        evaluate.evaluate(run, labels, out=tmp_path / "out", num_seeds=1, device="cpu")


def test_a_class_with_one_patient_is_left_out_loudly(run, videos, tmp_path):
    def one(rows):
        return [row for row in rows if row["label"] != "dark" or row["patient"] == "p0"]

    result = evaluate.evaluate(
        run, rewrite(videos, tmp_path, one), out=tmp_path / "out", percents=(100,), num_seeds=1,
        device="cpu",
    )  # fmt: skip
    assert result.names == ["bright", "striped"]
    assert any("'dark' is left out: it has 1 patient" in line for line in result.warnings)


def test_one_video_under_two_patients_is_named(run, videos, clip, tmp_path):
    """The copies have other names and, the last, another container; two grey ones are no copies."""
    folder = tmp_path / "copies"
    shutil.copytree(videos, folder)
    shutil.copy(videos / "0-0.avi", folder / "again.avi")
    with av.open(videos / "4-0.avi") as source, av.open(folder / "again.mkv", "w") as remuxed:
        stream = remuxed.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                remuxed.mux(packet)
    for name in ("grey.avi", "grey too.avi"):
        clip(folder / name, np.full((6, 64, 64), 90, np.uint8))
    with (folder / "labels.csv").open("a") as f:
        f.write("again.avi,dark,p3\nagain.mkv,bright,p1\n")  # of p0 and p4
        f.write("grey.avi,dark,p0\ngrey too.avi,bright,p1\n")
    out = tmp_path / "shards"
    shard([folder], out, ShardSettings(size=32, stride=1), device="cpu", jobs=1)
    lines = [json.loads(line) for line in (out / "local" / "ledger.jsonl").open()]
    ids = {Path(line["source"]).name: line["id"] for line in lines}
    pairs = {frozenset({ids["0-0.avi"], ids["again.avi"]})}
    pairs.add(frozenset({ids["4-0.avi"], ids["again.mkv"]}))
    result = evaluate.evaluate(
        run, folder / "labels.csv", shards=out, out=tmp_path / "out", num_seeds=1, protocol="knn"
    )
    (warning,) = [line for line in result.warnings if "under several patients" in line]
    found = re.findall(r"(\w+) = (\w+)", warning)
    assert warning.startswith("4 videos are 2 videos") and set(map(frozenset, found)) == pairs
    before = evaluate.evaluate(
        run, videos / "labels.csv", out=tmp_path / "before", num_seeds=1, protocol="knn"
    )
    assert not any("under several patients" in line for line in before.warnings)
    other = [any("trained on other shards" in x for x in r.warnings) for r in (before, result)]
    assert other == [False, True]


def test_videos_that_only_begin_alike_are_no_copies():
    """As those of a machine that shows its maker's name first."""
    frames = small((0, 1), (2, 3))  # a video of two frames each
    pictures = np.random.default_rng(0).integers(0, 256, (8, 4, 4), np.uint8)
    pictures[::2] = pictures[0]
    store = SimpleNamespace(frames=pictures, video_ids=list("abcd"))
    assert splits.copies(store, frames) == []
    pictures[5] = pictures[1]
    assert splits.copies(store, frames) == [["a", "c"]]


def test_what_the_table_rests_on_is_told():
    frames = small((0, 1), (2, 3))
    every, blank = np.arange(len(frames)), np.zeros((len(frames), 2, 2), np.uint8)
    tasks = [scores.Task("vicreg", 100.0, 0, every, every)]

    def told(digest: str, step: int, label: int, **facts) -> list[str]:
        settings = {"dual_task": 0.5, "max_steps": 9}
        config = {"settings": settings, "shards": {"digest": "that of the run"}}
        run = Run(Path("run"), config, save({}, {"step": str(step)}))
        labels = np.full(len(frames), label)
        store = SimpleNamespace(digest=digest, label=labels, frames=blank, video_ids=None)
        return list(evaluate._warnings(run, store, dataclasses.replace(frames, **facts), tasks))

    assert not told("that of the run", 9, label=-1)
    (learnt,) = told("that of the run", 9, label=0)
    assert "learned the labels of 8 of the 8 frames that it is tested on" in learnt
    found = told("another", 3, label=0, moved=True, num_without_frames=2)
    for line, words in zip(
        found,
        ("found by their positions relative to labels.csv", "2 labelled videos gave no frame",
         "was trained on other shards (digest that of ; these have another)",
         "its backbone is from step 3 of 9"),
        strict=True,
    ):  # fmt: skip
        assert words in line


def test_a_class_that_some_fold_cannot_learn_is_named(run, videos, tmp_path):
    patients = {"dark": "ab", "bright": "bc", "striped": "ca"}  # two of three are in one fold

    def ring(rows):
        seen = dict.fromkeys(CLASSES, 0)
        for row in rows:
            row["patient"] = patients[row["label"]][seen[row["label"]] % 2]
            seen[row["label"]] += 1
        return rows

    result = evaluate.evaluate(
        run, rewrite(videos, tmp_path, ring), out=tmp_path / "out", percents=(100,), num_seeds=1,
        device="cpu",
    )  # fmt: skip
    assert result.split.startswith("2 folds")
    (line,) = result.warnings
    assert "some folds have no training patient with it" in line
    assert sum(repr(name) in line for name in CLASSES) == 1


def test_what_cannot_be_judged_is_one_line(run, shards, videos, tmp_path):
    def judge(labels, run=run, **options):
        return evaluate.evaluate(run, labels, out=tmp_path / "out", device="cpu", **options)

    good = videos / "labels.csv"

    def added(rows):
        return [*rows, {"path": "gone.mp4", "label": "dark", "patient": "p0"}]

    with pytest.raises(InputError, match=r"1 of 19 videos are not in .*gone.mp4; shard them too"):
        judge(rewrite(videos, tmp_path, added))
    with pytest.raises(InputError, match="want at least two classes .* all videos have one label"):
        judge(rewrite(videos, tmp_path, lambda rows: [r | {"label": "x"} for r in rows]))
    with pytest.raises(InputError, match="two patients each, got 0 of 3; class 'bright' is left"):
        judge(rewrite(videos, tmp_path, lambda rows: rows[:4]))
    with pytest.raises(InputError, match="has no config.json; give the folder of a run"):
        judge(good, run=tmp_path)
    with pytest.raises(InputError, match="protocol 'svm': want one of linear, knn, finetune"):
        judge(good, protocol="svm")
    for percents in ((), (0.0,), (101.0,)):
        with pytest.raises(InputError, match="fractions above 0 and up to 100"):
            judge(good, percents=percents)
    damaged = tmp_path / "damaged"
    for name in ("backbone.safetensors", "config.json"):
        shutil.copytree(run, damaged, dirs_exist_ok=True)
        (damaged / name).write_bytes(b"\xff\x00" * 99)
        with pytest.raises(InputError, match=rf"{name}: .*damaged \(.*train it again") as e:
            judge(good, run=damaged)
        assert "\n" not in str(e.value)
    config = json.loads((run / "config.json").read_text())
    del config["settings"]["image_size"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"damaged \(KeyError: 'image_size'\).*train it again"):
        judge(good, run=damaged)
    config["settings"]["image_size"] = "32"
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"damaged \(.*image_size is '32', not int\).*train it"):
        judge(good, run=damaged)
    config = json.loads((run / "config.json").read_text())
    config["shards"]["path"] = "https://example.org/shards"
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="org/shards: is a URL.*name them with --shards"):
        judge(good, run=damaged)
    shared = tmp_path / "shared"  # shards as they are passed on: without local/
    shared.mkdir()
    for path in shards.iterdir():
        if path.is_file() or path.name == "store":
            (shared / path.name).symlink_to(path)
    with pytest.raises(InputError, match=r"ledger.jsonl: is missing.*copy the local/ folder"):
        judge(good, shards=shared)
    (shared / "local").mkdir()
    for line in ("{", '{"source": "a.mp4"}', '{"id": "a"}', "[]", '{"source": 1.5, "id": "a"}'):
        (shared / "local" / "ledger.jsonl").write_text(line + "\n")
        with pytest.raises(InputError, match=r"ledger.jsonl: damaged \(.*make the shards again"):
            judge(good, shards=shared)


def test_a_full_disk_is_one_line_and_nothing_is_half_written(run, videos, small_disk, capsys):
    (small_disk / "filler").write_bytes(bytes((4 << 20) - 16384))  # the features take more
    command = ["evaluate", str(run), "--labels", str(videos / "labels.csv"), "--device", "cpu"]
    assert main([*command, "-o", str(small_disk / "report")]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("Error: no space left on the disk") and "run the same command" in last
    assert [path.name for path in (small_disk / "report").iterdir()] == [".lock"]


def test_unlabelled_and_refused_videos_are_counted(shards, videos, tmp_path):
    store = FrameStore.open(shards)
    labels = rewrite(videos, tmp_path, lambda rows: rows[2:])
    frames = splits.label_frames(store, shards, labels)
    assert frames.num_unlabelled == 2 and len(frames) == 16 * 6
    fewer = dataclasses.replace(store, video_ids=["other", *store.video_ids[1:]])
    frames = splits.label_frames(fewer, shards, videos / "labels.csv")
    assert frames.num_without_frames == 1


def test_the_online_probe_keeps_patients_apart(monkeypatch):
    """It learns from Online.train and is scored on Online.test, and they share no patient."""
    frames = big()
    label, patient = frames.y.copy(), frames.patient.copy()
    label[::7], patient[::5] = -1, -1  # unlabelled, and of nobody knows whom
    store = SimpleNamespace(
        label=label, patient=patient, video=frames.video, label_names=frames.names
    )
    for seed in range(5):
        look = online.Online(store, 32, seed, torch.device("cpu"))
        used = look.frames.index
        assert (label[used] >= 0).all() and (patient[used] >= 0).all()
        train_part, test = set(patient[used[look.train]]), set(patient[used[look.test]])
        assert train_part and test and not train_part & test
        assert len(look.train) + len(look.test) == len(used)

        # The feature of a frame is its number: what knn and probe are given shows where it is from.
        met = []

        def spied(x, y, query, num, look=look, met=met):
            at = look.frames.index
            assert np.array_equal(x[:, 0], at[look.train]) and np.array_equal(y, label[x[:, 0]])
            assert np.array_equal(query[:, 0], at[look.test])
            met.append(num)
            return label[query[:, 0]]

        monkeypatch.setattr(look, "features", lambda backbone, stop, used=used: used[:, None])
        monkeypatch.setattr(online, "knn", spied)
        monkeypatch.setattr(online, "probe", lambda *a, spied=spied: (spied(*a), None, True))
        assert look(None) == {"knn_accuracy": 1.0, "knn_macro_f1": 1.0, "probe_macro_f1": 1.0}
        assert met == [4, 4]
    monkeypatch.setattr(online, "NUM_FRAMES", 60)
    some = np.searchsorted(used, online.Online(store, 32, 0, torch.device("cpu")).frames.index)
    assert 30 < len(some) <= 60 and len({*np.diff(some)}) == 1  # from all of the videos


def test_the_online_probe_tests_every_class_if_a_fold_has_them_all():
    """A class without a test frame has an F1 of 0, which would pull the mean down for ever."""
    frames = small((0, 4, 5), (0, 2, 3), (1, 3, 4))
    store = SimpleNamespace(
        label=frames.y, patient=frames.patient, video=frames.video, label_names=frames.names
    )
    for seed in range(20):
        look = online.Online(store, 32, seed, torch.device("cpu"))
        assert set(frames.y[look.test]) == {0, 1, 2}
