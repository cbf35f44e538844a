"""Is this checkout slower than another one? The same commands in both, in turn, ten times.

    python benchmarks/regression.py --other ../pusht-act-7926df9 --data ../shared/data/pusht --turns 10

Each checkout runs by its own environment (.venv/bin/python). Prints, for each command, the median of this checkout over
that of the other and the quartiles of the ratios turn by turn, and writes them as JSON. A ratio above 1 is slower.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import record, told

HERE = Path(__file__).resolve().parents[1]
KEYPOINTS = ["mode=test", "experiment=quickstart", "demos.n_episodes=200", "eval_freq=0", "save_checkpoint=false"]
DEFAULT_ACT = [
    *("mode=test", "policy.pretrained_backbone_weights=null", "batch_size=8", "eval_freq=0", "save_checkpoint=false"),
    *("logging=local", "train.precision=bf16"),
]


class Checkout:
    """The command `pusht-act` of one checkout."""

    def __init__(self, root: Path, folder: Path, data: Path) -> None:
        self._root, self._folder, self._data = root, folder, data
        self._runs = 0

    def run(self, *arguments: str, code: int = 0) -> float:
        """Run the command and return its seconds.

        Raises:
            SystemExit: it came to another exit code.
        """
        command = [str(self._root / ".venv" / "bin" / "python"), "-m", "pusht_act", *arguments]
        environment = {**os.environ, "PUSHT_ACT_CACHE": str(self._folder / "cache"), "PYTHONPATH": ""}
        start = time.monotonic()
        done = subprocess.run(command, cwd=self._root, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        if done.returncode != code:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        return seconds

    def train(self, *arguments: str) -> Path:
        """Train and return the run directory."""
        self._runs += 1
        output = self._folder / f"run-{self._runs}"
        self.run(*arguments, f"output_dir={output}")
        return output

    def step_s(self, *arguments: str) -> float:
        """Return the seconds of a step, by the last line of metrics."""
        output = self.train(*arguments)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        # The first window warms up.
        _, *rates = (line["train/samples_per_s"] for line in lines if "train/samples_per_s" in line)
        batch_size = 256 if "experiment=quickstart" in arguments else 8
        rate: float = median(rates)
        return batch_size / rate

    def evaluation_s(self) -> float:
        """Return the seconds of 500 episodes of a keypoints policy, start-up included."""
        if not hasattr(self, "_trained"):
            trained = ["save_checkpoint=true", "steps=50"]
            self._trained = self.train(*[each for each in KEYPOINTS if not each.startswith("save")], *trained)
        # A stored result would be printed at once; 7926df9 stored none.
        again = ["overwrite=true"] if self._root == HERE else []
        return self.run("mode=eval", f"checkpoint={self._trained}", "eval.n_videos=0", *again)

    def measures(self) -> dict[str, Callable[[], float]]:
        """Return what is measured, by its name in the table."""
        # Frozen norms on both sides: the default of random weights is batch norm now, which is another computation.
        norms = ["train.backbone_norm=frozen"] if self._root == HERE else []
        pictures = [*DEFAULT_ACT, *norms, f"dataset.root={self._data}"]
        return {
            "--cfg job": lambda: self.run("--cfg", "job"),
            "a refused key": lambda: self.run("polcy.chunk_size=8", code=1),
            "to the end of the first step": lambda: self.run(
                *KEYPOINTS, "steps=1", "overwrite=true", f"output_dir={self._folder / 'first'}"
            ),
            "a step of the quickstart": lambda: self.step_s(*KEYPOINTS, "steps=120", "log_freq=30"),
            "a step of the default ACT, batch 8, bf16": lambda: self.step_s(*pictures, "steps=40", "log_freq=10"),
            "mode=eval, 500 episodes": self.evaluation_s,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--data", type=Path, required=True, help="lerobot/pusht on disk")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the measures' names")
    parser.add_argument("--output", type=Path, default=Path("outputs/regression.json"))
    args = parser.parse_args()
    found = record(args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        roots = (HERE, args.other.resolve())
        ours, other = (Checkout(root, Path(folder) / str(i), args.data.resolve()) for i, root in enumerate(roots))
        for name, measure in ours.measures().items():
            if args.only and not any(part in name for part in args.only):
                continue
            against = other.measures()[name]
            # Caches fill and bytecode is compiled in a turn that does not count.
            measure(), against()
            turns = [
                (measure(), against()) if turn % 2 == 0 else (against(), measure())[::-1] for turn in range(args.turns)
            ]
            mine, theirs = zip(*turns, strict=True)
            low, _, high = quantiles([a / b for a, b in turns], n=4)
            rows.append(
                {
                    "measure": name,
                    "this": f"{median(mine):.3g} s",
                    "other": f"{median(theirs):.3g} s",
                    "ratio of medians": f"{median(mine) / median(theirs):.3f}",
                    "quartiles": f"{low:.3f} to {high:.3f}",
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    told(found, rows, args.output)


if __name__ == "__main__":
    main()
