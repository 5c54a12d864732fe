"""Do the methods learn? Trains all of them with the same budget and evaluates their features.

    python bench/learn.py videos/ --labels videos/labels.csv -o learn/ --steps 300 --seeds 3

For each seed, every method trains the same backbone for the same number of steps on the same
frames; a linear probe, with no patient in both training and test data, evaluates the features.
Writes learn/table.md (mean and standard deviation over the training seeds) and
learn/results.json. If stopped, the same command resumes with the run that was in progress.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from sslus.engine.atomic import atomic_file
from sslus.engine.errors import InputError, Interrupted
from sslus.engine.shard import Settings as ShardSettings
from sslus.engine.shard import shard
from sslus.ssl import methods
from sslus.ssl.evaluate import evaluate
from sslus.ssl.train import Settings, train


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--labels", type=Path, required=True, help="path,label,patient")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--methods", nargs="+", default=methods.names(), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--backbone", default=None, help="default: that of `sslus train`")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--fractions", default="1,10,100", help="percent of the labels")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def one(args, shards: Path, method: str, seed: int) -> list[dict]:
    """Train and evaluate. Returns a line for each share of the labels and each backbone: the
    trained one and a random one."""
    run = args.out / f"{method}-{seed}"
    done = run / "evaluation" / "lines.json"
    if done.exists():
        return json.loads(done.read_text())
    values, config = methods.recipe(method, "default")
    settings = Settings(
        method=method, seed=seed, max_steps=args.steps, backbone=args.backbone,
        image_size=args.image_size, batch_size=args.batch_size, **values,
    )  # fmt: skip
    start = time.monotonic()
    resume = (run / "config.json").exists()
    result = train(
        shards, settings, config, run, resume=resume, device=args.device, threads=args.threads
    )
    percents = [float(p) for p in args.fractions.split(",")]
    judged = evaluate(run, args.labels, percents=percents, num_seeds=3, device=args.device)
    lines = [
        {
            "method": row.backbone, "seed": seed, "percent": row.percent,
            "macro_f1": row.macro_f1, "balanced_accuracy": row.balanced_accuracy,
            "loss": result.metrics[-1]["loss"],
        }
        for row in judged.rows if row.backbone in (method, "random init")
    ]  # fmt: skip
    with atomic_file(done, "w") as f:
        json.dump(lines, f)
    print(f"{method}, seed {seed}: {time.monotonic() - start:,.0f} s", file=sys.stderr)
    return lines


def table(lines: list[dict]) -> str:
    percents = sorted({x["percent"] for x in lines})
    rows = ["| backbone | " + " | ".join(f"{p:g} % of labels" for p in percents) + " |"]
    rows.append("|---" * (len(percents) + 1) + "|")
    for method in dict.fromkeys(x["method"] for x in lines):
        cells = []
        for p in percents:
            found = {
                x["seed"]: x["macro_f1"]
                for x in lines if x["method"] == method and x["percent"] == p
            }  # fmt: skip
            values = list(found.values())
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> int:
    args = arguments()
    shards = args.out / "shards"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        shard([args.videos], shards, ShardSettings(), labels=args.labels)
        lines = []
        for seed in range(args.seeds):
            for method in args.methods:
                lines += one(args, shards, method, seed)
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
