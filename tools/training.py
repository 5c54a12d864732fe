"""What `sslus train` runs: one method, or all of them, in one process or several."""

import contextlib
import gc
import json
import os
import shlex
import time
from dataclasses import fields
from pathlib import Path

import torch

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError, Interrupted
from sslus.engine.urls import HIDDEN, is_url, shown
from sslus.ssl import methods
from sslus.ssl.health import NotFinite
from sslus.ssl.loader import open_store
from sslus.ssl.runs import check_type
from sslus.ssl.settings import (
    WHERE,
    WHERE_KINDS,
    Options,
    Settings,
    how,
    of_new_run,
    of_resumed_run,
    recorded_how,
)
from sslus.ssl.train import TrainResult, open_run, train
from sslus.ssl.world import enter
from sslus.tools.cli import EXIT_CODE_FILE
from sslus.tools.screen import argument, progress, summary, tell
from sslus.tools.train import SHARDS

OF_PAIRS = ("pairs", "pair_weights", "views")
# Options that hold for one call: for --method all, they are not recorded in all.json.
OF_ONE_CALL = ("shards", "method", "recipe", "resume", "rebuild_store", "time_limit")


def _resume(run, asked: dict, how: str = "") -> str:
    """The command that continues a run, which has recorded all but the number of processes, and
    what `shown` hides of a URL."""
    run, size = argument(run), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and EXIT_CODE_FILE not in os.environ:
        return f"the same torchrun command with --resume --run {run}"
    shards, more = asked.get("shards", ""), f" --gpus {size}" if size > 1 else ""
    if is_url(shards) and shown(shards) != shards:
        how += f" {shlex.quote(shown(shards))}"
        more += f"  # {HIDDEN} hides a part of the URL: name it whole"
    return f"sslus train{how} --resume --run {run}{more}"


def _recorded(shards: str, going: str) -> str:
    """The shards that a run was started with; raises InputError if they must be named again."""
    again = f"as SHARDS: {going.replace('sslus train', 'sslus train SHARDS', 1)}"
    if is_url(shards) and HIDDEN in shards:
        raise InputError(
            f"--resume: the run's shards are at {shards}, whose password or query is not recorded;"
            f" name the whole URL {again}"
        )
    if not is_url(shards) and not Path(shards).exists():
        raise InputError(
            f"--resume: the run's shards were in {shards}, which is gone; if they were moved, name"
            f" the new folder {again}"
        )
    return shards


def train_one(run: Path, asked: dict) -> None:
    """Train one method and print the summary. `asked`: see sslus.ssl.settings."""
    # A file has to be named again, see settings_from.
    method = asked.get("method", "")
    going = _resume(run, asked, f" --method {argument(method)}" if methods.is_file(method) else "")
    try:
        result = _train(run, asked, going)
    except Interrupted as e:
        raise Interrupted(f"{e}. Continue with: {going}", e.signum) from None
    going = going if result.stopped else _evaluate(result.run, result.shards)
    if _is_main():
        summary(_rows(result), warnings=result.warnings, next_command=going)


def _train(run: Path, asked: dict, going: str) -> TrainResult:
    """One run, which the command `going` continues."""
    resume, recipe = asked.get("resume", False), asked.get("recipe", "default")
    where, options = how(asked, recorded_how(run) if resume else None)
    # Before the frame store is built, so that processes waiting for it hear if that fails.
    world = enter(where["device"])
    if EXIT_CODE_FILE in os.environ and world.device.type == "cpu" and where["device"] == "auto":
        raise InputError(
            "--gpus: there is no GPU here that PyTorch can use (`sslus doctor` says why); add"
            " --device cpu to start processes without GPUs"
        )
    recorded = open_run(run, resume, world)
    if recorded is None:
        settings, method_config = of_new_run(asked, recipe)
        settings.resolved(world.device, num_frames=2**40)  # raises before the store is built
        shards = asked.get("shards", SHARDS)
    elif recipe != "default":
        raise InputError("--recipe: a resumed run already has its values; leave the option out")
    else:
        settings, method_config = of_resumed_run(asked, recorded)
        shards = asked.get("shards") or _recorded(recorded["shards"]["path"], going)

    if _is_main() and not is_url(shards):
        rebuild, tier, threads = asked.get("rebuild_store", False), where["tier"], where["threads"]
        with progress("frame store", "frames") as report:
            open_store(
                shards, tier, settings.pairs, rebuild=rebuild, threads=threads, report=report
            )
    # Only the first process shows its progress.
    with progress("train", "samples") if _is_main() else contextlib.nullcontext() as report:
        return train(
            shards,
            settings,
            method_config,
            run,
            resume=resume,
            options=options,
            report=report,
            say=tell,
            **where,
        )


def train_all(folder: Path, asked: dict) -> None:
    """Train the methods one after the other, each in its own folder; skip finished ones."""
    going = _resume(folder, asked, " --method all")
    asked = _asked_of_all(folder, asked, going)
    rows, warnings, limit, start = {}, [], asked.get("time_limit"), time.monotonic()
    failed = []
    for name in methods.names():
        run = folder / name
        mine = _part_of(name, asked)
        mine["resume"] = asked.get("resume", False) and (run / "config.json").exists()
        asked.pop("rebuild_store", None)  # once for all
        if limit is not None:
            mine["time_limit"] = max(0.0, limit - (time.monotonic() - start))
        if _is_main():
            left = " ".join(f"--{x.replace('_', '-')}" for x in sorted(asked.keys() - mine.keys()))
            note = f"; it learns from single frames, so without {left}" if left else ""
            tell(f"{name} -> {run}{note}")
        try:
            result = _train(run, mine, going)
        except Interrupted as e:
            raise Interrupted(f"{name}: {e}. Continue with: {going}", e.signum) from None
        except NotFinite as e:
            if os.environ.get("WORLD_SIZE", "1") != "1":  # the others may hear of it a step later
                raise
            failed.append(name)
            tell(f"Error: {name}: {e}")
            _free_memory()
            continue
        _free_memory()
        if result.signum and not result.stopped and name != methods.names()[-1]:
            raise Interrupted(f"{name} is finished. Continue with: {going}", result.signum)
        warnings += [f"{name}: {line}" for line in result.warnings]
        facts = _facts(result)
        if "loss" in facts:
            facts["loss"] = f"loss {facts['loss']}"
        rows[name] = "; ".join([f"{result.step:,} steps", *facts.values()])
        if result.stopped:
            break
    if _is_main() and rows:
        summary(
            rows,
            warnings=warnings,
            next_command=going
            if result.stopped
            else _evaluate([folder / name for name in rows], asked["shards"]),
        )
    if failed:
        raise InputError(f"{', '.join(failed)}: failed, as told above")


def _part_of(name: str, asked: dict) -> dict:
    """What is asked of the method `name`: nothing about pairs of views if it has none."""
    pairs = getattr(methods.load(name), "PAIRS", True)
    mine = {k: v for k, v in asked.items() if pairs or k not in OF_PAIRS}
    return mine | {"method": name}


def _asked_of_all(folder: Path, asked: dict, going: str) -> dict:
    """What is asked of all methods, with `shards`.

    It is kept in <folder>/all.json, so that after a resume the methods that had not begun get the
    same options.
    """
    if asked.get("recipe", "default") != "default":
        raise InputError("--method all: leave --recipe out, since the recipes differ in length")
    record = folder / "all.json"
    if asked.get("resume"):
        try:
            before = json.loads(record.read_text())
            shards, options = before["shards"], dict(before["options"])
            if before.get("format") != 2:
                raise ValueError("written by another version of sslus")
            check_type("shards", shards, str)
            kinds = WHERE_KINDS | {f.name: f.type for k in (Settings, Options) for f in fields(k)}
            for name, value in options.items():
                if name not in kinds or name in OF_ONE_CALL:
                    raise ValueError(f"{name!r:.40}: no such option")
                check_type(name, value, kinds[name])
        except FileNotFoundError as e:
            raise InputError(f"--resume: {folder} holds no run of --method all") from e
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(f"{record}: cannot be used ({e}); start another --run DIR") from e
        if "shards" not in asked:
            shards = _recorded(shards, going)
        asked = {"shards": shards} | options | asked
        # What does not change the methods' results may be changed when resuming.
        free = {*WHERE, *(f.name for f in fields(Options))} - {*OF_ONE_CALL}
        options |= {k: v for k, v in asked.items() if k in free}
    else:
        begun = any((folder / name / "config.json").exists() for name in methods.names())
        if begun and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            raise InputError(f"{folder} already exists; continue it with: {going}")
        options = {k: v for k, v in asked.items() if k not in OF_ONE_CALL}
        # Defaults that depend on the device stay the same for all methods, wherever they resume.
        # All are resolved, so that a wrong option is told before the first method is trained.
        device = enter(how(asked)[0]["device"]).device
        for name in methods.names():
            chosen = of_new_run(_part_of(name, asked))[0].resolved(device, num_frames=2**40)
        for name in ("backbone", "image_size", "batch_size", "precision"):
            options[name] = getattr(chosen, name)
        asked = {"shards": SHARDS} | asked | options
    if _is_main():
        folder.mkdir(parents=True, exist_ok=True)
        shards = asked["shards"]
        where = shown(shards) if is_url(shards) else str(Path(shards).resolve())
        with atomic_file(record, "w") as f:
            json.dump({"format": 2, "shards": where, "options": options}, f, indent=2)
    return asked


def _free_memory() -> None:
    """Give back what the last method used: its weights are part of a cycle of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_main() -> bool:
    """One process alone is, whatever RANK a scheduler has left in its environment."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def _evaluate(runs, shards: str) -> str:
    there = " --shards shards/" if is_url(shards) else ""  # evaluation needs them on a disk
    named = " ".join(map(argument, runs if isinstance(runs, list) else [runs]))
    return f"sslus evaluate {named}{there} --labels {_labels(shards)}"


def _labels(shards: str) -> str:
    """labels.csv as a command line needs it: beside the videos or above, where there is one."""
    try:
        with (Path(shards) / "local" / "ledger.jsonl").open() as f:
            video = Path(json.loads(next(f))["source"])
        for folder in video.parents[:3]:
            if (folder / "labels.csv").is_file():
                return argument(folder / "labels.csv")
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        pass  # shards at a URL, or without local/
    return "labels.csv"


def _facts(result) -> dict[str, str]:
    """Speed, loss and features, as far as they are known: a short run may lack some."""
    lines = [m for m in result.metrics if "loss" in m]
    looks = [m for m in result.metrics if "rankme" in m]
    facts = {}
    if lines:
        first, last = lines[0], lines[-1]
        speed, wait = (
            sorted(m[key] for m in lines)[len(lines) // 2]
            for key in ("samples_per_second", "data_wait")
        )
        facts["speed"] = f"{speed:,.1f} samples/s, {100 * wait:.0f} % of the time waiting for data"
        facts["loss"] = (
            f"{first['loss']:.3f} (steps 1-{first['step']}) -> {last['loss']:.3f}"
            f" (to step {last['step']})"
        )
    if looks:
        look = looks[-1]
        facts["features"] = f"RankMe {look['rankme']:.1f}, mean std {look['feature_std']:.3g}"
    return facts


def _rows(result) -> dict[str, str]:
    rows = {"run": str(result.run)}
    if result.was_finished:
        rows["state"] = f"already finished ({result.step} steps); nothing was done"
    if result.stopped:
        rows["state"] = f"time limit reached at step {result.step}; everything is saved"
    rows |= {
        "trained": f"{result.step:,} steps, {result.epoch:.1f} epochs",
        "time": f"{result.seconds:,.0f} s",
        **_facts(result),
        "curves": str(result.run / "curves.png"),
        "backbone": str(result.run / "backbone.safetensors"),
    }
    return rows
