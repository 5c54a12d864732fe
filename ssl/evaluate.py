"""What is a backbone worth? Linear probe, nearest neighbours, fine-tuning; split by patient.

The trained backbone, the same backbone at random initialisation and the majority class are
evaluated on the same frames, folds and subsets of labels.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError
from sslus.engine.lock import alone
from sslus.engine.store import FrameStore
from sslus.ssl import backbones, finetune, predictions
from sslus.ssl.features import RANDOM, Pictures, Stage, build, features_of_both
from sslus.ssl.linear import INVERSE_REGULARISATION, MAX_ITERATIONS, probe
from sslus.ssl.neighbours import NEIGHBOURS, TEMPERATURE, votes
from sslus.ssl.predictions import Guess, Videos
from sslus.ssl.report import PROTOCOLS, Evaluation, draw, markdown
from sslus.ssl.runs import Run, check, check_evaluation
from sslus.ssl.scores import Task, rows
from sslus.ssl.splits import (
    LabelledFrames,
    copies,
    folds,
    label_frames,
    num_folds,
    share,
    testable,
)
from sslus.ssl.versions import versions
from sslus.ssl.world import pick_device

SETTINGS = {
    "linear": {
        "inverse_regularisation": INVERSE_REGULARISATION, "max_iterations": MAX_ITERATIONS,
    },
    "knn": {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE},
}  # fmt: skip


def evaluate(
    run: Path,
    labels: Path,
    *,
    out: Path | None = None,
    shards: str | Path | None = None,
    protocol: str = "linear",
    percents: tuple[float, ...] = (1, 10, 100),
    num_seeds: int = 3,
    steps: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    shared: dict | None = None,
    stage: Stage | None = None,
) -> Evaluation:
    """Evaluate the backbone of `run` by one of PROTOCOLS and write the report.

    Features are computed once, from whole frames at the run's image size, with the backbone in
    eval mode. The random backbone's BatchNorm gets the statistics of these frames.
    linear: logistic regression on features standardised over the training frames, with balanced
    class weights. knn: see sslus.ssl.neighbours. finetune: the backbone is trained too, see
    sslus.ssl.finetune; `steps` is that of each training (default: 100 on a CPU, 1000 on a GPU).
    Split: the column `split` of `labels`; without it, for each seed, stratified folds by patient,
    whose predictions are pooled. No patient is ever on both sides. Videos of val are not used,
    since nothing is chosen by their scores. A share of p percent keeps ceil(p/100 x videos), so at
    least one, of each class's training videos, patient by patient in random order; smaller shares
    are subsets of larger ones. The seed determines both the folds and the order.

    A video is predicted as the class with the highest mean probability over its frames. The
    probabilities are those of the logistic regression, shares of the votes, or the softmax.

    `threads`: of the CPU (default: one per core); PyTorch keeps this number after the call. It
    changes the order of summation: what is fine-tuned on a CPU depends on it as a run does,
    features in their last digits, so that scores may differ a little. What earlier calls have left
    is reused anyway.
    `shared`: give the calls for several runs the same dict, empty at first; what they have in
    common, which is the random backbone if the runs agree in backbone, image size, seed and
    zero_init_residual, is then computed only once. The results are the same, bit for bit.

    Writes results.json, report.md, confusion.png and predictions.csv, with a line for each tested
    video: for the linear probe to `out`, for another protocol to the subfolder of its name.
    Results that the next call can reuse stay beside them: features in `out`, logits of each
    fine-tuning in finetune/. Reports are meant to be shared: they contain the class names and the
    shards' ids of videos, but no path, file name or patient.
    `shards` defaults to those the run was trained on; their local/ folder must exist. Raises
    InputError for a run, labels or shards that cannot be used, and while another process writes
    to `out`; Interrupted after Ctrl-C or SIGTERM while fine-tuning.
    """
    run = Path(run)
    shared = {} if shared is None else shared
    stage = stage or (lambda label, unit: contextlib.nullcontext(lambda *a: None))
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}: want one of {', '.join(PROTOCOLS)}")
    check_evaluation(percents, num_seeds)
    source, shards = check(run, shards)
    shares = sorted({float(f"{p:g}") for p in percents})  # as they are printed
    settings = source.config["settings"]
    if threads:
        torch.set_num_threads(threads)
    store = FrameStore.open(shards, threads=threads)
    frames = label_frames(store, shards, Path(labels))
    frames, notes = testable(frames)
    out = Path(out or run / "evaluation")
    folder = out if protocol == "linear" else out / protocol
    where, said = pick_device(device), []
    names = [settings["method"], RANDOM]
    how = finetune.Settings.of(steps, where, settings["backbone"], settings["image_size"])
    with _alone_in(out):
        folder.mkdir(exist_ok=True)
        deals = [folds(frames, seed) for seed in range(num_seeds)]
        tasks = list(_tasks(frames, names, shares, deals))
        if protocol == "finetune":
            guesses, num = _finetune(
                source, store, frames, tasks, how, where, folder, shared, stage
            )
            about = dataclasses.asdict(how) | {"num_trainings": num}
        else:
            features = features_of_both(source, store, frames, where, out, shared, stage)
            name = "probe" if protocol == "linear" else protocol
            with stage(name, "frames") as report, threadpool_limits(threads):
                guesses, said = _fit_all(protocol, tasks, frames, features, where, shared, report)
            about = SETTINGS[protocol]
        table, videos = rows(frames, tasks, guesses, deals)

        notes += [*_warnings(source, store, frames, tasks), *said]
        if frames.test is None:
            split = f"{num_folds(frames)} folds by patient, drawn anew for each seed"
        else:
            split = "the split of labels.csv, the same for each seed"
            if frames.num_val:
                split += f"; {frames.num_val} videos of its part val are not used"
        result = Evaluation(
            protocol=protocol,
            settings=about,
            rows=table,
            out=folder,
            shards=shards,
            names=frames.names,
            num_frames=len(frames),
            num_videos=len(np.unique(frames.video)),
            num_patients=len(np.unique(frames.patient)),
            split=split,
            warnings=notes,
        )
        _write(result, videos, frames, store, source)
    return result


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Create the folder and hold its lock, since two processes would write the same files."""
    out.mkdir(parents=True, exist_ok=True)
    busy = "another `sslus evaluate` is writing here; wait for it, or choose another folder with -o"
    with alone(out / ".lock", f"{out}: {busy}"):
        yield


def _tasks(frames: LabelledFrames, names: list[str], percents, deals) -> Iterator[Task]:
    """deals: the `folds` of each seed."""
    for seed, pairs in enumerate(deals):
        for train, test in pairs:
            kept = {p: share(frames, train, p, seed) for p in percents}
            for name in names:
                for p in percents:
                    yield Task(name, p, seed, kept[p], test)


def _fit_all(
    protocol: str,
    tasks: list[Task],
    frames: LabelledFrames,
    features,
    device: torch.device,
    shared: dict,
    report,
) -> tuple[list[Guess], list[str]]:
    """Each task's predictions, and what a reader of the table has to know about them.

    Equal fits are done only once: two small shares may keep the same videos. Those of the random
    backbone go to `shared`, by a digest of everything they depend on.
    """
    guesses, num_seeds, num_classes = [], tasks[-1].seed + 1, len(frames.names)
    slow, on_cpu = set(), False
    num_done, num_all = 0, sum(len(t.test) for t in tasks)
    digests = {name: hashlib.sha256(x).digest() for name, x in features.items()}
    own: dict[bytes, tuple[Guess, bool]] = {}
    for t in tasks:
        x, y, note = features[t.backbone], frames.y[t.train], f"seed {t.seed + 1} of {num_seeds}"
        digest = hashlib.sha256(f"{protocol} {num_classes} {len(y)}".encode())
        for part in (digests[t.backbone], t.train, y, t.test):
            digest.update(part)
        known, key = shared if t.backbone == RANDOM else own, digest.digest()
        if key not in known:
            job = protocol, x[t.train], y, x[t.test], num_classes

            def tell(done: int, before: int = num_done, note: str = note) -> None:
                report(before + done, num_all, note)

            try:
                known[key] = _fit(*job, device, tell)
            except torch.OutOfMemoryError:  # of a GPU
                device, on_cpu = torch.device("cpu"), True
                known[key] = _fit(*job, device, tell)
        guess, converged = known[key]
        guesses.append(guess)
        if not converged:
            slow.add((t.backbone, key))
        num_done += len(t.test)
        report(num_done, num_all, note)
    said = []
    if slow:
        said.append(
            f"{len(slow)} fits stopped at {MAX_ITERATIONS} iterations, before they converged"
        )
    if on_cpu:
        said.append("the GPU has too little memory for the nearest neighbours: the CPU found them")
    return guesses, said


def _fit(
    protocol: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    num_classes: int,
    device: torch.device,
    report: Callable[[int], None],
) -> tuple[Guess, bool]:
    """The predictions, and whether the fit converged."""
    if protocol == "knn":
        found = votes(x_train, y_train, x_test, num_classes, device=device, report=report)
        return Guess(found.argmax(1), found / found.sum(1, keepdims=True)), True
    guess, probability, converged = probe(x_train, y_train, x_test, num_classes)
    return Guess(guess, probability), converged


def _finetune(
    run: Run,
    store: FrameStore,
    frames: LabelledFrames,
    tasks: list[Task],
    settings: finetune.Settings,
    device: torch.device,
    cache: Path,
    shared: dict,
    stage: Stage,
) -> tuple[list[Guess], int]:
    """Each task's predictions, and how many trainings that took."""
    starts = {name: build(run, name) for name in dict.fromkeys(t.backbone for t in tasks)}
    pictures = Pictures.of(run, store, device)
    index, num_classes = frames.index, len(frames.names)
    jobs = [
        finetune.Job(
            t.backbone, t.seed, num_classes, index[t.train], frames.y[t.train], index[t.test]
        )
        for t in tasks
    ]
    with stage("fine-tuning", "steps") as report:
        logits, num = finetune.finetune(jobs, starts, pictures, settings, cache, shared, report)
    softmax = [torch.from_numpy(each).double().softmax(1).numpy() for each in logits]
    return [Guess(x.argmax(1), p) for x, p in zip(logits, softmax, strict=True)], num


def _some(items: list[str], joint: str = ", ") -> str:
    return joint.join(items[:4] + ["..."] * (len(items) > 4))


def _warnings(
    run: Run, store: FrameStore, frames: LabelledFrames, tasks: list[Task]
) -> Iterator[str]:
    """What a reader of the table has to know."""
    settings, shards = run.config["settings"], run.config["shards"]
    unseen = [
        repr(name)
        for c, name in enumerate(frames.names)
        if not all(np.any(frames.y[t.train] == c) for t in tasks)
    ]
    if unseen:
        yield (
            f"class {_some(unseen)}: some folds have no training patient with it, which"
            " lowers its scores; it has too few patients, or they share other classes: label more"
        )
    same = copies(store, frames)
    if same:
        yield (
            f"{sum(map(len, same))} videos are {len(same)} videos under several patients, who may"
            " be on both sides of the split, which raises all scores: give each one patient in"
            " labels.csv (local/ledger.jsonl of the shards has the names of"
            f" {_some([_some(ids, ' = ') for ids in same])})"
        )
    tested = np.unique(np.concatenate([t.test for t in tasks]))
    num = np.count_nonzero(store.label[frames.index[tested]] >= 0)
    if num and settings["dual_task"] and store.digest == shards["digest"]:
        yield (
            f"the run learned the labels of {num} of the {len(tested)} frames that it is tested on"
            " (--dual-task), so its scores do not hold for new patients: train it on shards made"
            " with a labels.csv that lacks these patients, or whose column split says test"
        )
    if frames.moved:
        yield (
            "the videos are not where they were sharded; they were found by their positions"
            " relative to labels.csv, so make sure that these are the labels of those shards"
        )
    if frames.num_without_frames:
        yield (
            f"{frames.num_without_frames} labelled videos gave no frame when they were sharded"
            " (see local/ledger.jsonl of the shards)"
        )
    if store.digest != shards["digest"]:
        yield (
            f"the run was trained on other shards (digest {shards['digest'][:8]}; these have"
            f" {store.digest[:8]}); if their frames were made with other options, such as --size,"
            " that changes the scores"
        )
    done, steps = backbones.step_in(run.weights), settings["max_steps"]
    if done is not None and done < steps:
        yield f"the run is not finished: its backbone is from step {done} of {steps}"


def _write(result: Evaluation, videos: list[Videos], frames, store: FrameStore, run: Run) -> None:
    settings = run.config["settings"]
    facts = {
        "format": 2,
        "protocol": result.protocol,
        "run": {k: settings[k] for k in ("method", "backbone", "image_size", "seed")}
        | {"weights_sha256": hashlib.sha256(run.weights).hexdigest()},
        "settings": {
            "num_seeds": max(row.num_seeds for row in result.rows),
            **result.settings,
            "split": result.split,
        },
        "shards_digest": store.digest,
        "num_frames": result.num_frames,
        "num_videos": result.num_videos,
        "num_patients": result.num_patients,
        "num_unlabelled_videos": frames.num_unlabelled,
        "classes": result.names,
        "rows": [dataclasses.asdict(row) for row in result.rows],
        "warnings": result.warnings,
        "versions": versions(),
    }
    with atomic_file(result.out / "results.json", "w") as f:
        json.dump(facts, f, indent=2)
        f.write("\n")
    with atomic_file(result.out / "report.md", "w") as f:
        f.write(markdown(result, settings))
    predictions.write(result.out / "predictions.csv", videos, store.video_ids, result.names)
    draw(result, result.out / "confusion.png")
