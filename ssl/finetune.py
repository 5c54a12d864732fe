"""Fine-tuning: train backbone and linear head on labelled frames, test on other patients.

    L = mean over the batch of w_y * cross-entropy(W h + b, y),    w_c = n / (classes * n_c)

This is the probe's loss, but the backbone is trained too. Every training has the same number of
steps and of frames per step, however few labels it uses. Results are cached, so that an interrupted
evaluation can resume.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslus.engine.errors import InputError, Interrupted
from sslus.engine.plan import Plan
from sslus.kernels.augment import views
from sslus.ssl import backbones, optimizers
from sslus.ssl.features import Pictures, keep, read_kept
from sslus.ssl.memory import keep_freed_memory
from sslus.ssl.signals import Signals
from sslus.ssl.versions import versions
from sslus.ssl.views import ViewConfig, draw, parse
from sslus.ssl.world import pays_bf16

BATCH_SIZE = 32
# Mild, because strong crops or blur may remove what a label depends on.
VIEWS = "ultrasound,min_area=0.6,p_blur=0,p_speckle=0"
TEST_BATCH = 64
CHECK_EVERY = 10  # most steps between checks of the loss, each of which waits for the GPU


@dataclass(frozen=True)
class Settings:
    """Settings, the same for every backbone, share of the labels, fold and seed."""

    backbone: str
    steps: int
    warmup_steps: int
    precision: str
    batch_size: int = BATCH_SIZE
    views: str = VIEWS
    optimizer: str = "adamw"
    lr: float = optimizers.default_lr("adamw", BATCH_SIZE)
    weight_decay: float = optimizers.default_weight_decay("adamw")
    final_lr: float = 0.001  # where the cosine ends, as a share of the peak

    @classmethod
    def of(
        cls, steps: int | None, device: torch.device, backbone: str, image_size: int
    ) -> "Settings":
        """steps: None for 100 on a CPU (half a minute for a ResNet-18), 1000 on a GPU."""
        if steps is None:
            steps = 1000 if device.type == "cuda" else 100
        if steps < 1:
            raise InputError(f"--steps {steps}: want at least 1")
        precision = "bf16" if pays_bf16(device, backbone, image_size) else "fp32"
        return cls(backbone, steps, steps // 10, precision)


@dataclass(frozen=True)
class Job:
    """One training and its test; it does not contain the labels of the test."""

    backbone: str  # the weights to start from
    seed: int
    num_classes: int
    train: np.ndarray  # (n,) int64 indices into the frame store
    y: np.ndarray  # (n,) int64 classes of `train`
    test: np.ndarray  # (T,) int64 indices into the frame store


def finetune(
    jobs: list[Job],
    starts: dict[str, nn.Module],
    pictures: Pictures,
    settings: Settings,
    cache: Path,
    shared: dict,
    report: Callable[[int, int, str], None],
) -> tuple[list[np.ndarray], int]:
    """The logits of each job's test frames, (T, classes) float32, and how many trainings it took.

    starts: the backbones by name; they are not changed. The logits of each training are kept
    in the folder `cache`, under a digest of everything they depend on; equal jobs are done only
    once (two small shares may keep the same videos), also by evaluations with the same `shared`,
    see features.read_kept. Ctrl-C and SIGTERM lose the training under way and raise Interrupted.
    Raises InputError if a loss or a logit is not finite.
    """
    if pictures.device.type == "cpu":
        keep_freed_memory()
    names = _names(jobs, starts, pictures, settings)
    trainings = dict(zip(names, jobs, strict=True))
    todo = [name for name in trainings if read_kept(cache / name, shared) is None]
    num, steps = len(trainings), settings.steps
    report((num - len(todo)) * steps, num * steps, "")
    with Signals() as signals:
        for done, name in enumerate(todo, start=num - len(todo)):

            def tick(step: int, done: int = done) -> None:
                if signals.seen:
                    raise Interrupted(
                        f"stopped after {done} of {num} trainings, which are kept; the same"
                        " command resumes",
                        signals.seen,
                    )
                report(done * steps + step, num * steps, f"training {done + 1} of {num}")

            job = trainings[name]
            logits = tune(job, starts[job.backbone], pictures, settings, tick)
            keep(cache / name, logits, shared)
    return [np.load(cache / name, allow_pickle=False) for name in names], num


def _names(
    jobs: list[Job], starts: dict[str, nn.Module], pictures: Pictures, settings: Settings
) -> list[str]:
    """The file of each job, named by a digest of everything its result depends on."""
    p, common = pictures, {}
    for start, backbone in starts.items():
        facts = [
            p.store.digest, p.size, p.mean, p.std, p.device.type, dataclasses.asdict(settings),
            repr(parse(settings.views)), versions(),
        ]  # fmt: skip
        common[start] = hashlib.sha256(json.dumps(facts).encode())
        backbones.add_to_digest(common[start], backbone)
    names = []
    for job in jobs:
        key = common[job.backbone].copy()
        key.update(f" {job.seed} {job.num_classes} {len(job.train)} ".encode())
        for array in (job.train, job.y, job.test):
            key.update(array.astype(np.int64).tobytes())
        names.append(f"logits-{key.hexdigest()[:16]}.npy")
    return names


def tune(
    job: Job,
    start: nn.Module,
    pictures: Pictures,
    settings: Settings,
    tick: Callable[[int], None],
) -> np.ndarray:
    """The fine-tuned model's logits for the job's test frames, (T, classes) float32.

    tick(step) is called after every step and every batch of the test.
    """
    if len(np.unique(job.y)) == 1:  # the other classes have no patient in this fold
        logits = np.full((len(job.test), job.num_classes), -np.inf, np.float32)
        logits[:, job.y[0]] = 0
        return logits
    device, s = pictures.device, settings
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(job.seed)  # for the head, and for dropout if there is any
        model = nn.Sequential(
            copy.deepcopy(start), nn.Linear(start.num_features, job.num_classes)
        ).to(device, memory_format=torch.channels_last)
        _train(model, job, pictures, settings, tick)
    model.eval()
    parts = []
    with torch.inference_mode():
        for first in range(0, len(job.test), TEST_BATCH):
            x = pictures(job.test[first : first + TEST_BATCH])
            parts.append(model(x).float().cpu().numpy())
            tick(s.steps)
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        raise InputError(
            f"fine-tuning of {job.backbone}: the model's outputs are not finite after the last"
            f" step of seed {job.seed + 1}; train the backbone again, with a lower --lr"
        )
    return logits


def _train(
    model: nn.Module,
    job: Job,
    pictures: Pictures,
    settings: Settings,
    tick: Callable[[int], None],
) -> None:
    device, s = pictures.device, settings
    preset, _ = parse(s.views)
    model.train()
    optimizer = optimizers.make(s.optimizer, model, s.lr, s.weight_decay)
    weight = class_weights(job.y, job.num_classes).to(device)
    at, epoch = batches(len(job.train), s.batch_size, s.steps, job.seed)
    total = torch.zeros((), device=device)  # the sum of the losses, in which a NaN persists
    for step in range(s.steps):
        x = augmented(pictures, job.train[at[step]], epoch[step], preset, job.seed)
        y = torch.from_numpy(job.y[at[step]]).to(device)
        rate = optimizers.learning_rate(step, s.steps, s.warmup_steps, s.lr, s.lr * s.final_lr)
        optimizers.set_lr(optimizer, rate)
        with torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
            logits = model(x).float()
        loss = (weight[y] * F.cross_entropy(logits, y, reduction="none")).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        done = step + 1
        if (done % CHECK_EVERY == 0 or done == s.steps) and not total.isfinite():
            raise InputError(
                f"fine-tuning of {job.backbone}: the loss is no longer finite (by step {done} of"
                f" seed {job.seed + 1}); if it is finite for random weights, train the backbone"
                " again, with a lower --lr"
            )
        tick(done)


def augmented(
    pictures: Pictures, frames: np.ndarray, epoch: np.ndarray, preset: ViewConfig, seed: int
) -> Tensor:
    """Views of the frames, different for a frame in every epoch; frames, epoch: (B,)."""
    p = pictures
    table = draw(preset, frames, 0, epoch, seed, p.store.size, p.size)
    stored = torch.from_numpy(np.ascontiguousarray(p.store.frames[frames]))
    inputs = stored, torch.arange(len(frames)), torch.from_numpy(table)
    # Computed on the device: it receives uint8 frames, not float32 views.
    inputs = (t.to(p.device) for t in inputs)
    return views(*inputs, size=p.size, mean=p.mean, std=p.std)


def class_weights(y: np.ndarray, num_classes: int) -> Tensor:
    """The probe's class weights, (num_classes,) float32; 0 for a class missing in `y`."""
    count = np.bincount(y, minlength=num_classes)
    weight = np.where(count > 0, len(y) / np.maximum(count, 1) / np.count_nonzero(count), 0)
    return torch.from_numpy(weight.astype(np.float32))


def batches(
    num_frames: int, batch_size: int, num_steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The frames of each step and their epochs: (num_steps, batch_size) int64 each.

    Epochs follow each other without a gap, so that even a few frames fill every batch, with
    different views each time.
    """
    place = np.arange(num_steps * batch_size).reshape(num_steps, batch_size)
    epoch = place // num_frames
    plan = Plan(num_frames, 2, seed)
    orders = np.stack([plan.order(e) for e in range(epoch[-1, -1] + 1)])
    return orders[epoch, place % num_frames], epoch
