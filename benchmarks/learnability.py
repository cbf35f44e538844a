"""What a small ACT learns from which demonstrations, everything else equal: people's or the planner's.

    python benchmarks/learnability.py --human ../shared/data/pusht_keypoints --output outputs/learnability

Every cell is `pusht-act experiment=quickstart` on one thread with its own data set and seed, then 200 episodes on the
seeds of mode=eval. What is finished is not run again, so the same command goes on after a stop. Prints a table and
writes it as learnability.json in the same folder. `--jobs` runs side by side.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import pusht_act, record, told
from pusht_act.evaluation.stats import wilson_interval

NOISE = 3.0  # px; a demonstration then takes 2.5 times as long, with 8 px five times


@dataclass(frozen=True)
class Data:
    """One row of the table."""

    name: str
    overrides: list[str]


def rows(human: Path, noisy: Path, n_noisy: int) -> list[Data]:
    def local(root: Path, count: int) -> list[str]:
        chosen = ",".join(map(str, range(count)))
        return [
            "dataset=pusht_keypoints", f"dataset.repo_id=local/{root.name}", f"dataset.root={root}",
            f"+dataset.episodes=[{chosen}]",
        ]  # fmt: skip

    return [
        Data("206 of people", local(human, 206)),
        *(Data(f"{n:,} of ours", [f"demos.n_episodes={n}"]) for n in (206, 500, 2000)),
        *(
            Data(f"{n:,} of ours, {NOISE:g} px of noise", local(noisy, n))
            for n in dict.fromkeys((206, 500, n_noisy))
            if n <= n_noisy
        ),
    ]


def success(data: Data, seed: int, steps: int, output: Path) -> tuple[int, int]:
    """Train and evaluate one cell unless that was done: (successes, episodes)."""
    run = output / data.name.replace(" ", "_").replace(",", "") / f"seed-{seed}"
    common = ["experiment=quickstart", f"seed={seed}", "eval_freq=0", f"output_dir={run}", *data.overrides]
    evaluated = f"eval/step-{steps:06d}_seeds-200000-200199*/metrics.json"
    if not any(run.glob(evaluated)):
        if not (run / "checkpoints" / "last").exists():
            pusht_act(*common, f"steps={steps}", "overwrite=true", threads=1)
        pusht_act("mode=eval", f"checkpoint={run}", "eval.n_episodes=200", "eval.n_videos=0", threads=1)
    metrics = json.loads(next(run.glob(evaluated)).read_text())
    print(f"{data.name}, seed {seed}: {metrics['pc_success']:.1f} %", file=sys.stderr, flush=True)
    return round(metrics["pc_success"] * metrics["n_episodes"] / 100), int(metrics["n_episodes"])


def row(name: str, cells: list[tuple[int, int]]) -> dict[str, Any]:
    """The table's row of one data set, from (successes, episodes) of each seed."""
    rates = [100 * successes / episodes for successes, episodes in cells]
    low, high = wilson_interval(sum(s for s, _ in cells), sum(n for _, n in cells))
    return {
        "demonstrations": name,
        "success, mean": f"{mean(rates):.1f} %",
        "of each seed": ", ".join(f"{rate:.1f}" for rate in rates),
        "95 % of all episodes": f"{100 * low:.1f} to {100 * high:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--human", type=Path, required=True, help="lerobot/pusht_keypoints on disk")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--noisy", type=int, default=2000, help="demonstrations planned with noise, a second each")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    noisy = args.output / f"noise_{NOISE:g}_{args.noisy}"
    if not noisy.exists():
        pusht_act(
            "mode=demos", "env=pusht_keypoints", f"demos.n_episodes={args.noisy}", "demos.start_seed=1000000",
            f"demos.action_noise={NOISE}", f"output_dir={noisy}",
        )  # fmt: skip
    found = record(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        cells = {
            data.name: [pool.submit(success, data, seed, args.steps, args.output) for seed in args.seeds]
            for data in rows(args.human, noisy, args.noisy)
        }
        table = [row(name, [cell.result() for cell in made]) for name, made in cells.items()]
    told(found, table, args.output / "learnability.json")


if __name__ == "__main__":
    main()
