"""Features of the frozen backbone of a run, and of the same one at random initialisation."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.engine.store import FrameStore
from sslus.ssl import backbones, views
from sslus.ssl.runs import Run
from sslus.ssl.splits import LabelledFrames
from sslus.ssl.versions import versions

RANDOM = "random init"  # the same backbone, never trained
FEATURE_BATCH = 64
SETTLED_BY = 1024  # most frames from which a random backbone gets its BatchNorm statistics

# stage(label, unit) -> a context that yields report(done, total, note)
Stage = Callable[[str, str], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Pictures:
    """Whole frames as input for the backbone of a run, normalised as in training."""

    store: FrameStore
    size: int
    mean: float
    std: float
    device: torch.device

    @classmethod
    def of(cls, run: Run, store: FrameStore, device: torch.device) -> "Pictures":
        shards = run.config["shards"]
        size = run.config["settings"]["image_size"]
        return cls(store, size, shards["mean"], shards["std"], device)

    def __call__(self, index: np.ndarray) -> torch.Tensor:
        """(n, 1, size, size) float32 on `device`; index: (n,) into the store."""
        frames = self.store.frames[index]
        return views.whole(frames, self.size, self.mean, self.std).to(self.device)


def features_of_both(
    run: Run,
    store: FrameStore,
    frames: LabelledFrames,
    device: torch.device,
    cache: Path,
    shared: dict,
    stage: Stage,
) -> dict[str, np.ndarray]:
    """The features of the trained and the random backbone, by their names in the table.

    They are kept in the folder `cache`; shared: see `read_kept`.
    """
    pictures = Pictures.of(run, store, device)
    num, features, used = len(frames), {}, set()
    with stage("features", "frames") as report:
        for i, name in enumerate([run.config["settings"]["method"], RANDOM]):
            features[name], path = _features(
                build(run, name), name == RANDOM, run.config["settings"]["backbone"], pictures,
                frames.index, cache, shared, lambda done, i=i: report(i * num + done, 2 * num, ""),
            )  # fmt: skip
            used.add(path)
    for old in set(cache.glob("features-*.npy")) - used:  # of weights or labels before these
        old.unlink()
    return features


def build(run: Run, name: str) -> nn.Module:
    """The backbone of the run or, for RANDOM, the same with random weights from the run's seed."""
    s = run.config["settings"]
    zero = s.get("zero_init_residual", False)  # runs of earlier versions do not record it
    backbone = backbones.build(s["backbone"], s["image_size"], s["seed"], zero)
    if name == RANDOM:
        return backbone
    try:
        backbone.load_state_dict(safetensors.torch.load(run.weights))
    except (SafetensorError, RuntimeError) as e:
        why = str(e).splitlines()[-1].strip()
        raise InputError(
            f"{run.path / 'backbone.safetensors'}: not this run's weights, or damaged ({why});"
            " copy the run again, or train it again"
        ) from e
    return backbone


def settle_batch_norm(backbone: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Give BatchNorm the mean statistics of `batches` instead of initial ones; weights stay.

    The initial ones, mean 0 and variance 1, make random features so poor that a backbone would
    look trained if only its statistics had changed. Leaves the backbone in eval mode.
    """
    backbone.eval()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
    with torch.no_grad():
        for x in batches:
            backbone(x)
    backbone.eval()


def _features(
    backbone: nn.Module,
    unsettled: bool,
    name: str,
    pictures: Pictures,
    index: np.ndarray,
    cache: Path,
    shared: dict,
    report: Callable[[int], None],
) -> tuple[np.ndarray, Path]:
    """(n, F) float32, the frozen backbone's output for each frame; and the file in `cache`.

    unsettled: its BatchNorm gets the statistics of these frames first. name: timm's.
    """
    p = pictures
    facts = f"{p.store.digest} {name} {p.size} {p.mean} {p.std} {p.device.type} {unsettled}"
    key = hashlib.sha256(facts.encode())
    key.update(json.dumps(versions()).encode())
    key.update(index.astype(np.int64).tobytes())
    backbones.add_to_digest(key, backbone)
    path = cache / f"features-{key.hexdigest()[:16]}.npy"
    known = read_kept(path, shared)
    if known is not None and known.ndim == 2 and len(known) == len(index):
        report(len(index))
        return known, path
    backbone.to(p.device)
    if unsettled:
        seen = index[:: -(-len(index) // SETTLED_BY)]
        batches = np.array_split(seen, max(1, len(seen) // FEATURE_BATCH))
        settle_batch_norm(backbone, map(pictures, batches))
    parts, num = [], 0
    for part in computed(backbone, pictures, index):
        parts.append(part)
        num += len(part)
        report(num)
    features = np.concatenate(parts)
    keep(path, features, shared)
    return features, path


def computed(backbone: nn.Module, pictures: Pictures, index: np.ndarray) -> Iterator[np.ndarray]:
    """The frozen backbone's output for frames `index`, (n, F) float32 for some of them at a time.

    Raises InputError if it is not finite.
    """
    # Eval mode: BatchNorm uses its running statistics and leaves them as they are.
    backbone.eval().to(pictures.device, memory_format=torch.channels_last)
    for start in range(0, len(index), FEATURE_BATCH):
        with torch.inference_mode():
            part = backbone(pictures(index[start : start + FEATURE_BATCH])).float().cpu().numpy()
        if not np.isfinite(part).all():
            raise InputError("the backbone's features are not finite; train it again")
        yield part


def keep(path: Path, array: np.ndarray, shared: dict) -> None:
    """Write what a later evaluation will read, to a file named by a digest of all it depends on."""
    content = io.BytesIO()
    np.save(content, array)  # in memory: on a full disk, np.save would not name the cause
    with atomic_file(path) as f:
        f.write(content.getbuffer())
    shared[path.name] = path


def read_kept(path: Path, shared: dict) -> np.ndarray | None:
    """The array that an earlier evaluation has left at `path`, or copied there from the file of
    this name that `shared` knows: one that another evaluation with the same `shared` has left.

    None if it is missing, or cut short, as by a copy that was stopped.
    """
    for place in (path, shared.get(path.name, path)):
        try:
            array = np.load(place, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            continue
        if place != path:
            keep(path, array, shared)
        shared[path.name] = path
        return array
    return None
