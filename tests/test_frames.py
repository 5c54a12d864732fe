"""Frames as a Dataset: what is in the shards, each frame once, in workers too."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from sslus.engine.errors import InputError
from sslus.engine.shard import Settings, shard
from sslus.ssl.frames import Frames

SETTINGS = Settings(size=64, stride=2)


@pytest.fixture
def shards(clips, tmp_path):
    # The labels of all but u and v.
    labels = tmp_path / "labels.csv"
    rows = (clips / "labels.csv").read_text().splitlines()[:-2]
    labels.write_text("\n".join([rows[0], *(f"{clips}/{row}" for row in rows[1:])]))
    shard([clips], tmp_path / "shards", SETTINGS, labels=labels, device="cpu", jobs=1)
    return tmp_path / "shards"


@pytest.fixture
def facts(shards, by_hand) -> dict[bytes, dict]:
    """The json of each frame, by its pixels: no two are the same."""
    return {image.tobytes(): fact for image, fact in by_hand(shards)}


@pytest.mark.filterwarnings("error")  # that the memory map cannot be written to
def test_a_frame_is_what_the_shards_hold(shards, facts):
    frames, want = Frames(shards), facts
    names, store = [*frames.store.label_names, None], frames.store
    assert len(frames) == len(want) > 90 and names == ["left", "right", None]
    patients, seen = {}, set()
    for i, (image, label) in enumerate(frames):  # ends where they end
        assert image.shape == (1, 64, 64) and image.dtype == torch.uint8
        fact = want[image.numpy().tobytes()]
        seen.add((fact["video"], fact["frame"]))
        assert names[label] == fact["label"] and type(label) is int
        assert store.video_ids[store.video[i]] == fact["video"]
        assert store.time_seconds[i] == pytest.approx(fact["time_seconds"], abs=1e-5)
        assert patients.setdefault(int(store.patient[i]), fact["patient"]) == fact["patient"]
    assert len(seen) == len(frames) and len(set(patients.values())) == len(patients) == 3
    before = frames[-1][0].clone()
    frames[-1][0].zero_()  # a copy
    assert torch.equal(frames[-1][0], before)
    with pytest.raises(IndexError):
        frames[len(frames)]


def negative(image: torch.Tensor) -> torch.Tensor:
    return 255 - image


class OnlyBatches(Frames):
    def __getitem__(self, index):
        raise AssertionError("a frame was read alone")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_every_frame_once(method, shards, facts):
    frames, want = OnlyBatches(shards, negative), facts
    assert len(pickle.dumps(frames)) < 1000  # without the frames
    loader = DataLoader(
        Subset(frames, np.arange(len(frames))), batch_size=16, shuffle=True, num_workers=2,
        multiprocessing_context=method,
    )  # fmt: skip
    names, seen = [*frames.store.label_names, None], []
    for images, labels in loader:
        for image, label in zip(images, labels, strict=True):
            fact = want[negative(image).numpy().tobytes()]
            assert names[label] == fact["label"]
            seen.append((fact["video"], fact["frame"]))
    assert sorted(seen) == sorted((f["video"], f["frame"]) for f in want.values())


def test_replaced_shards_are_not_taken_for_those_that_were_opened(clips, shards):
    before = pickle.dumps(Frames(shards))
    assert len(pickle.loads(before)) > 90
    shard([clips], shards, SETTINGS, device="cpu", jobs=1, force=True)
    Frames(shards)
    with pytest.raises(InputError, match="shards: were replaced after this dataset was opened"):
        pickle.loads(before)
