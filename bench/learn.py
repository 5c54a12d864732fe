"""Do the methods learn? Trains all of them with the same budget and evaluates their features.

    python bench/learn.py videos/ --labels videos/labels.csv -o learn/ --steps 300 --seeds 3

For each seed, every method trains the same backbone for the same number of steps on the same
frames; a linear probe, with no patient in both training and test data, evaluates the features, in
as many draws of labels and folds as --draws says. Writes learn/table.md (see `NOTE`) and
learn/results.json, with every draw. If stopped, the same command resumes with the run that was in
progress; with other --draws, --fractions or labels, it evaluates the finished runs again.

The draws depend on the videos' ids, and so on the key of the shards. Tables can be compared if they
are made from the same shards:

    python bench/learn.py --shards learn/shards --labels videos/labels.csv -o later/ \\
        --methods vicreg my_method.py
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError, Interrupted
from sslus.engine.shard import Settings as ShardSettings
from sslus.engine.shard import shard
from sslus.ssl import methods
from sslus.ssl.evaluate import evaluate
from sslus.ssl.features import RANDOM
from sslus.ssl.train import Settings, train

NOTE = """
Macro-F1: mean over training seeds and draws of labels and folds. Gain: the mean difference to
the random weights that the run began with, in the same draw, ± its standard error, which is the
root of (variance of the seeds' mean gains / seeds + variance of the draws' mean gains / draws);
with one seed or one draw, without that term. The draws are the same for all methods and seeds,
and are of the same videos: the methods' errors are not independent, and other videos may differ
by more.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="?", help="folder of videos")
    parser.add_argument("--shards", type=Path, help="shards to use, instead of making some")
    parser.add_argument("--labels", type=Path, required=True, help="path,label,patient")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for all results")
    parser.add_argument(
        "--methods", nargs="+", default=methods.names(), metavar="METHOD",
        help="names, and paths of .py files with methods of your own",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--draws", type=int, default=12, help="draws of labels and folds")
    parser.add_argument("--backbone", default=None, help="default: that of `sslus train`")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--fractions", default="1,10,100", help="percent of the labels")
    parser.add_argument(
        "--zero-init-residual", action=argparse.BooleanOptionalAction, default=None,
        help="default: each method's",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if (args.videos is None) == (args.shards is None):
        parser.error("want a folder of videos, or --shards")
    if not args.labels.is_file():
        parser.error(f"--labels {args.labels}: no such file")
    return args


def one(args, shards: Path, method: str, seed: int, shared: dict) -> list[dict]:
    """Train and evaluate. Returns a line for each share of the labels and each backbone: the
    trained one and the random one that it began as, which other methods may share."""
    name = methods.name_of(method)
    run = args.out / f"{name}-{seed}"
    values, config = methods.recipe(method, "default")
    if args.zero_init_residual is not None:
        values["zero_init_residual"] = args.zero_init_residual
    settings = Settings(
        method=method, seed=seed, max_steps=args.steps, backbone=args.backbone,
        image_size=args.image_size, batch_size=args.batch_size, **values,
    )  # fmt: skip
    start = time.monotonic()
    resume = (run / "config.json").exists()
    result = train(  # refuses other settings than those of a run that is there
        shards, settings, config, run, resume=resume, device=args.device, threads=args.threads
    )
    percents = sorted({float(p) for p in args.fractions.split(",")})
    done = run / "evaluation" / "lines.json"
    labels = hashlib.sha256(args.labels.read_bytes()).hexdigest()[:16]
    if done.exists():
        lines = json.loads(done.read_text())
        found = {(x["draws"], x.get("labels"), x["percent"]) for x in lines}
        if found == {(args.draws, labels, p) for p in percents}:
            return lines
    judged = evaluate(
        run, args.labels, percents=percents, num_seeds=args.draws, device=args.device, shared=shared
    )
    start_of = RANDOM + (", blocks at 0" if settings.zero_init_residual else "")
    lines = [
        {
            "method": name if row.backbone == name else start_of, "start": start_of,
            "seed": seed, "percent": row.percent,
            "macro_f1": row.macro_f1, "balanced_accuracy": row.balanced_accuracy,
            "loss": result.metrics[-1]["loss"], "draws": args.draws, "labels": labels,
            "macro_f1_of_draws": row.macro_f1_of_seeds,
        }
        for row in judged.rows if row.backbone in (name, RANDOM)
    ]  # fmt: skip
    with atomic_file(done, "w") as f:
        json.dump(lines, f)
    print(f"{name}, seed {seed}: {time.monotonic() - start:,.0f} s", file=sys.stderr)
    return lines


def gain(trained: np.ndarray, random: np.ndarray) -> tuple[float, float | None]:
    """Mean of trained - random, both (seeds, draws), and its standard error; see `NOTE`.

    Variance between seeds and between draws both contain that of a single fit, which is so counted
    twice: the error is rather too large. None for one fit.
    """
    each = trained - random
    means = [each.mean(axis=axis) for axis in (0, 1)]
    squares = [np.var(m, ddof=1) / len(m) for m in means if len(m) > 1]
    return float(each.mean()), float(np.sqrt(sum(squares))) if squares else None


def table(lines: list[dict]) -> str:
    percents = sorted({x["percent"] for x in lines})
    found = {(x["method"], x["percent"], x["seed"]): x["macro_f1_of_draws"] for x in lines}
    start = {x["method"]: x.get("start", RANDOM) for x in lines}  # older rows lack it
    header = ["backbone", *(f"{p:g} % of labels | gain" for p in percents)]
    rows = [header, ["---"] * (1 + 2 * len(percents))]
    for method in dict.fromkeys(x["method"] for x in lines):
        row = [method]
        for p in percents:
            seeds = sorted(s for m, q, s in found if (m, q) == (method, p))
            pair = (method, start[method])
            own, random = (np.array([found[m, p, s] for s in seeds]) for m in pair)
            mean, error = gain(own, random)
            gained = f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")
            row += [f"{own.mean():.3f}", "" if method == start[method] else gained]
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + NOTE


def main() -> int:
    args = arguments()
    shards = args.shards or args.out / "shards"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.videos:
            shard([args.videos], shards, ShardSettings(), labels=args.labels)
        lines = []
        for seed in range(args.seeds):
            shared = {}
            for method in args.methods:
                lines += one(args, shards, method, seed, shared)
                with atomic_file(args.out / "results.json", "w") as f:
                    json.dump(lines, f, indent=1)
                with atomic_file(args.out / "table.md", "w") as f:
                    f.write(table(lines))
    except (InputError, Interrupted) as e:
        print(f"Error: {e}", file=sys.stderr)
        return 1
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
