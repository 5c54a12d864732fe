"""Does it learn: each method for some seconds on the phantom, through the loop that users run.

Afterwards a linear probe tells which of 40 clips a frame belongs to that it sees changed, as a
method's views are; its training part holds other frames of the clips. Random features reach a
macro-F1 of about 0.12, chance is 0.03. Losses broken on purpose stayed at or below them, one seed
each, runs of 100 to 200 steps: SimCLR's with its sign flipped 0.07, MoCo's without its queue 0.12,
BYOL's without teacher and predictor 0.10, BYOL's with views of different frames as pairs 0.10.
"""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sslus.engine.phantom import Settings as PhantomSettings
from sslus.engine.phantom import synth
from sslus.engine.shard import Settings as ShardSettings
from sslus.engine.shard import shard
from sslus.engine.store import FrameStore
from sslus.kernels.augment import views
from sslus.ssl import backbones, methods
from sslus.ssl.evaluate import probe, scores
from sslus.ssl.loader import Batch, Loader
from sslus.ssl.loop import Options
from sslus.ssl.state import State
from sslus.ssl.train import Settings, train
from sslus.ssl.views import draw, parse
from sslus.ssl.world import World

SIZE = 32
COPIES = 3  # changed views of each frame: three times the frames, a third less noise
SMALL = Settings(
    backbone="test_resnet", image_size=SIZE, batch_size=64, max_steps=150, lr=2e-3,
    warmup_steps=10, weight_decay=0.05,
)  # fmt: skip
# Heads for 96 features; a teacher that follows within a run of 150 steps.
CHANGES = {
    "barlowtwins": {"projector": "512-512-512"},
    "byol": {"projector": "512-64", "predictor": 512, "momentum": 0.95},
    "moco": {"projector": "256-64", "queue": 256, "momentum": 0.95},
    "simclr": {"projector": "256-256-64"},
    "vicreg": {"projector": "512-512-512"},
}
MARGIN = 0.05
# Inpainting's features are no better than random ones after so few steps: its task is tested.
NAMES = [n for n in methods.names() if n != "inpainting"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    settings = PhantomSettings(videos=40, patients=14, size=96, seconds=(0.4, 0.4))
    synth(folder / "videos", settings)
    shard(
        [folder / "videos"], folder / "shards", ShardSettings(size=48, stride=1),
        device="cpu", jobs=1,
    )  # fmt: skip
    return folder / "shards"


def recognises(backbone, store) -> float:
    """Macro-F1 of a linear probe for the clip, on every second frame, seen changed."""
    backbone.eval()
    frames = torch.from_numpy(np.array(store.frames))
    index = np.arange(len(store))
    config = parse("ultrasound")[0]
    found = []
    with torch.no_grad():
        for epoch in range(COPIES):
            table = torch.from_numpy(draw(config, index, 0, epoch, 7, store.size, SIZE))
            grey = {"mean": store.mean, "std": store.std}
            x = views(frames, torch.from_numpy(index), table, size=SIZE, **grey)
            found.append(backbone(x).numpy())
    x, clip = np.stack(found), np.array(store.video)
    train_part = index % 2 == 0
    fit, seen = (x[:, part].reshape(-1, x.shape[-1]) for part in (train_part, ~train_part))
    truth = np.tile(clip[~train_part], COPIES)
    guess, _ = probe(fit, np.tile(clip[train_part], COPIES), seen)
    confusion = np.zeros((clip.max() + 1,) * 2, int)
    np.add.at(confusion, (truth, guess), 1)
    return scores(confusion)[0]


@pytest.fixture(scope="module")
def random_features(shards):
    return recognises(backbones.build("test_resnet", SIZE, seed=0), FrameStore.open(shards))


def trained(name, shards, run):
    """The run, its settings and its Config."""
    values, config = methods.recipe(name, "default")
    settings = dataclasses.replace(SMALL, method=name, **values)
    config = dataclasses.replace(config, **CHANGES.get(name, {}))
    train(shards, settings, config, run, device="cpu", threads=1, options=Options(log_every=100))
    return settings.resolved(torch.device("cpu"), 1000), config


@pytest.mark.parametrize("name", NAMES)
def test_a_method_beats_random_features(name, shards, random_features, tmp_path):
    trained(name, shards, tmp_path / "run")
    backbone = backbones.build("test_resnet", SIZE, seed=0)
    backbone.load_state_dict(load_file(tmp_path / "run" / "backbone.safetensors"))
    f1 = recognises(backbone, FrameStore.open(shards))
    print(f"{name}: macro-F1 {f1:.3f}, random features {random_features:.3f}")
    assert f1 > random_features + MARGIN


def test_inpainting_restores_what_is_hidden_in_frames_it_has_not_seen(shards, tmp_path):
    settings, config = trained("inpainting", shards, tmp_path / "run")
    synth(
        tmp_path / "videos",
        PhantomSettings(videos=5, patients=5, size=96, seconds=(0.4, 0.4), seed=9),
    )
    shard(
        [tmp_path / "videos"], tmp_path / "shards", ShardSettings(size=48, stride=1),
        device="cpu", jobs=1,
    )  # fmt: skip
    store = FrameStore.open(tmp_path / "shards")
    state = State.build(settings, config, World(torch.device("cpu")), grey=(store.mean, store.std))
    before = hidden_error(state.method, store)
    state.load(tmp_path / "run" / "checkpoint.pt")
    after = hidden_error(state.method, store)
    print(f"inpainting: squared error {before:.3f} -> {after:.3f}, a constant grey has 1")
    assert before > 0.8 and after < 0.55


@torch.no_grad()
def hidden_error(method, store) -> float:
    """In the holes alone, of all frames; BatchNorm by its running statistics."""
    frames = np.arange(len(store))
    with Loader(
        store, iter(()), parse("inpainting"), size=SIZE, seed=3, device=torch.device("cpu")
    ) as loader:
        return method.eval()(loader.at_once(Batch(0, frames, frames))).loss.item()
