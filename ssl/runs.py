"""What `sslus evaluate` and `sslus features` are asked, checked before PyTorch is imported, which
takes seconds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sslus.engine.errors import InputError, naming
from sslus.engine.manifest import read_manifest
from sslus.engine.urls import is_url, shown

USED = {  # of config.json, and of which type
    "settings": {
        "method": str, "backbone": str, "image_size": int, "seed": int, "max_steps": int,
        "dual_task": float,
    },
    "shards": {"path": str, "digest": str, "mean": float, "std": float},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is evaluated, read once: a training under way may write other weights meanwhile."""

    path: Path
    config: dict
    weights: bytes  # of backbone.safetensors


def check_type(name: str, value: object, kind: type) -> None:
    """Raise TypeError for a value of another type: a config.json may have been edited by hand."""
    kinds = get_args(kind) or (kind,)  # of `int | None`
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise TypeError(f"{name} is {value!r:.40}, not {wanted}")


def read_run(run: Path) -> Run:
    """Raises InputError if it is not the folder of a run, or damaged."""
    for name in ("config.json", "backbone.safetensors"):
        if not (run / name).is_file():
            raise InputError(
                f"{run}: has no {name}; give the folder of a run of `sslus train`"
                " (--resume finishes an unfinished one)"
            )
    try:
        with naming(run / "config.json"):
            config = json.loads((run / "config.json").read_text())
        for part, kinds in USED.items():
            for name, kind in kinds.items():
                check_type(name, config[part][name], kind)  # KeyError if missing
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(
            f"{run / 'config.json'}: damaged ({type(e).__name__}: {e}); copy the run again, or"
            " train it again"
        ) from e
    with naming(run / "backbone.safetensors"):
        return Run(run, config, (run / "backbone.safetensors").read_bytes())


def check(run: Path, shards: str | Path | None) -> tuple[Run, Path]:
    """The run, and the folder of its shards or, if given, `shards`.

    Raises InputError for what cannot be read.
    """
    source = read_run(run)
    folder = shards or source.config["shards"]["path"]
    if is_url(folder):
        raise InputError(
            f"{shown(folder)}: is a URL, from which only training reads frames; copy the shards to"
            " a disk and name them with --shards"
        )
    if not Path(folder).exists():
        raise InputError(f"{folder}: no such folder; name the shards of the run with --shards")
    read_manifest(Path(folder))
    return source, Path(folder)


def check_evaluation(percents: tuple[float, ...], num_seeds: int) -> None:
    """Raise InputError for numbers with which `evaluate` cannot do anything."""
    if num_seeds < 1 or not percents or not all(0 < p <= 100 for p in percents):
        raise InputError(
            "evaluate: want at least one seed, and fractions above 0 and up to 100 percent"
        )


def check_table(out: Path, per: str) -> None:
    """Raise InputError for a table of features that cannot be written."""
    if per not in ("video", "frame"):
        raise InputError(f"--per {per!r}: want video or frame")
    if out.suffix not in (".csv", ".npz"):
        raise InputError(f"-o {out}: want a name that ends in .csv or .npz")
    if out.exists() and not out.is_file():
        raise InputError(f"-o {out}: is no file; name one, such as features.csv")
    if not out.parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {out.parent}")
