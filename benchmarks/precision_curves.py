"""Loss curves of the ways to train, beside fp32 with other seeds, whose spread is the noise they are judged by.

    python benchmarks/precision_curves.py --steps 500 --overrides experiment=quickstart batch_size=64

Each row is `pusht-act` with `--overrides` and its own train.precision, train.compile or seed, without evaluations; its
columns are the means of train/loss over fifths of the run, and the last one's distance from the mean of fp32's seeds in
their standard deviations. What is finished in --folder is not run again. Prints a table and writes it as JSON.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import record, told

WAYS = {
    "bf16": ["train.precision=bf16"],
    "fast dropout": ["train.fast_dropout=true"],
    "compiled": ["train.compile=true"],
    "bf16, compiled": ["train.precision=bf16", "train.compile=true"],
}
FIFTHS = 5


def losses(folder: Path, overrides: list[str]) -> list[float]:
    """train/loss at every line that `overrides` logged."""
    if not (folder / "finished").exists():
        command = [sys.executable, "-m", "pusht_act", *overrides, f"output_dir={folder}", "overwrite=true"]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shlex.join(command)}\n{done.stderr[-3000:]}")
        (folder / "finished").touch()
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def fifths(values: list[float]) -> list[float]:
    """Means over FIFTHS equal parts."""
    bounds = [i * len(values) // FIFTHS for i in range(FIFTHS + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(bounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrides", nargs="*", default=["experiment=quickstart"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3, help="of fp32, two or more; the ways take the first")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/precision_curves"))
    parser.add_argument("--output", type=Path, help="default: precision_curves.json in the folder")
    args = parser.parse_args()
    if args.steps < FIFTHS or args.seeds < 2:
        sys.exit(f"--steps {args.steps} --seeds {args.seeds}: give {FIFTHS} or more steps and two or more seeds")
    found = record(args)
    common = [
        *args.overrides, f"steps={args.steps}", f"log_freq={max(1, args.steps // 50)}", "eval_freq=0",
        "save_checkpoint=false", "wandb.enable=false",
    ]  # fmt: skip
    curves = {
        f"fp32, seed {seed}": fifths(
            losses(
                args.folder / f"fp32-{seed}", [*common, "train.precision=fp32", "train.compile=false", f"seed={seed}"]
            )
        )
        for seed in range(1, args.seeds + 1)
    }
    ends = [curve[-1] for curve in curves.values()]
    for way in args.ways:
        given = WAYS[way] if "train.compile=true" in WAYS[way] else [*WAYS[way], "train.compile=false"]
        curves[way] = fifths(losses(args.folder / way.replace(", ", "-"), [*common, *given, "seed=1"]))
    rows: list[dict[str, Any]] = [
        {
            "": name,
            **{f"loss, fifth {i + 1}": value for i, value in enumerate(curve)},
            "standard deviations from fp32": (curve[-1] - fmean(ends)) / stdev(ends),
        }
        for name, curve in curves.items()
    ]
    told(found, rows, args.output or args.folder / "precision_curves.json")


if __name__ == "__main__":
    main()
