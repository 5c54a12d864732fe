"""Measure sslus against bare libraries on the same input in the same run.

    python bench/run.py                          every stage, half an hour
    python bench/run.py --stage decode store     only these
    python bench/run.py --quick                  tiny inputs timed once, under a minute
    python bench/run.py --json out.json          also writes the rows as JSON

A stage is a file in bench/stages with a docstring and measure(bench); adding the file is enough.
Videos: --data FOLDER, else $SSLUS_REAL_DATA, else those in shared/data beside the checkout, else
generated clips of speckle; --quick generates them unless --data is given. Each work is warmed up,
then all are timed in turns; the table shows median, lowest and highest.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from harness import ROOT, Bench

STAGES = Path(__file__).resolve().parent / "stages"
# A public set of 44 lung ultrasound clips: its path in a folder of data sets.
POCUS = Path("pocus-ccby/pocus_videos")


def main() -> int:
    names = sorted(path.stem for path in STAGES.glob("*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"any of: {' '.join(names)}")  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="tiny generated inputs, timed once: does it work?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten as rows come in")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="videos to measure with")
    options = parser.parse_args()
    data = options.data or (None if options.quick else real_data())
    failed = []

    def save(bench: Bench) -> None:
        if options.json:
            write(options.json, bench.content())

    with tempfile.TemporaryDirectory(prefix="sslus-bench-") as scratch:
        bench = Bench(options.quick, options.device, data, Path(scratch), save)
        for name in options.stage:
            module = importlib.import_module(f"stages.{name}")
            bench.stage = name
            print(f"\n{name}: {module.__doc__.splitlines()[0]}", flush=True)
            try:
                module.measure(bench)
            except Exception:
                traceback.print_exc()
                failed.append(name)
            failed += bench.failed
            bench.failed.clear()
            show(bench)
            save(bench)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def real_data() -> Path | None:
    """Videos in $SSLUS_REAL_DATA (a folder of videos or of data sets), or next to the checkout."""
    given = os.environ.get("SSLUS_REAL_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if (folder / POCUS).is_dir():
        return folder / POCUS
    return folder if given else None


def show(bench: Bench) -> None:
    """Print the stage's rows, then its ratios with their targets."""
    rows = [r for r in bench.rows if r.stage == bench.stage]
    lines = [("what", "implementation", "case", "threads", "median", "low", "high", "unit", "MiB")]
    for r in rows:
        peak = "" if r.peak_mib is None else f"{r.peak_mib:,.0f}"
        lines.append((r.name, r.implementation, r.case, str(r.threads), number(r.median),
                      number(r.low), number(r.high), r.unit, peak))  # fmt: skip
    print_table(lines, right={3, 4, 5, 6, 8})
    ratios = [r for r in bench.ratios if r.stage == bench.stage]
    lines = [("ratio", "is", "want", "")]
    lines += [(r.text, f"{r.value:.2f}", r.want, r.verdict) for r in ratios]
    if ratios:
        print_table(lines, right={1})


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def print_table(lines: list[tuple[str, ...]], right: set[int]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
    print(flush=True)


def write(path: Path, content: dict) -> None:
    from sslus.engine.atomic import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w") as f:
        json.dump(content, f, indent=1)
        f.write("\n")


# Worker processes import this file again.
if __name__ == "__main__":
    sys.exit(main())
