"""What a small ACT learns from which demonstrations, everything else equal: people's, the planner's, DAgger's.

    python benchmarks/learnability.py --human ../shared/data/pusht_keypoints --output outputs/learnability

Every cell is `pusht-act experiment=quickstart` on one thread with its own data set and seed, then 200 episodes on the
seeds of mode=eval. What is finished is not run again, so the same command goes on after a stop. Prints a table and
writes learnability.json beside it. `--jobs` runs side by side.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pusht_act.run_dir import git_commit, package_versions
from pusht_act.statistics import wilson_interval

NOISE = 8.0  # px
ROUNDS = 3


@dataclass(frozen=True)
class Data:
    """One row of the table."""

    name: str
    overrides: list[str]
    rounds: int = 0
    """Of DAgger, after the first training; each has its share of the steps."""


def rows(human: Path, noisy: Path) -> list[Data]:
    def local(root: Path, count: int) -> list[str]:
        chosen = ",".join(map(str, range(count)))
        return [
            "dataset=pusht_keypoints", f"dataset.repo_id=local/{root.name}", f"dataset.root={root}",
            f"dataset.episodes=[{chosen}]",
        ]  # fmt: skip

    return [
        Data("206 of people", local(human, 206)),
        *(Data(f"{n:,} of ours", [f"demos.n_episodes={n}"]) for n in (206, 500, 2000)),
        *(Data(f"{n:,} of ours, {NOISE:g} px of noise", local(noisy, n)) for n in (206, 500, 2000)),
        Data(f"500 of ours, then {ROUNDS} rounds of DAgger", ["demos.n_episodes=500"], rounds=ROUNDS),
    ]


def pusht_act(*overrides: str) -> None:
    """The command, on one thread; what it printed is shown only when it fails."""
    command = [sys.executable, "-m", "pusht_act", *overrides]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)[:400]}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def success(data: Data, seed: int, steps: int, output: Path) -> tuple[int, int]:
    """Train and evaluate one cell unless that was done: (successes, episodes)."""
    run = output / data.name.replace(" ", "_").replace(",", "") / f"seed-{seed}"
    trained = run / f"round-{data.rounds}" if data.rounds else run
    common = ["experiment=quickstart", f"seed={seed}", "eval_freq=0", f"output_dir={run}", *data.overrides]
    evaluated = trained / "eval" / f"step-{steps // (data.rounds + 1):06d}_seeds-200000-200199" / "metrics.json"
    if not evaluated.exists():
        if data.rounds:
            rounds = [f"steps={steps // (data.rounds + 1)}", f"dagger.rounds={data.rounds}", "dagger.n_rollouts=50"]
            pusht_act("mode=dagger", *rounds, "dagger.workers=1", *common)
        elif not (run / "checkpoints" / "last").exists():
            pusht_act(*common, f"steps={steps}", "overwrite=true")
        pusht_act("mode=eval", f"checkpoint={trained}", "eval.n_episodes=200", "eval.n_videos=0")
    metrics = json.loads(evaluated.read_text())
    print(f"{data.name}, seed {seed}: {metrics['pc_success']:.1f} %", file=sys.stderr, flush=True)
    return round(metrics["pc_success"] * metrics["n_episodes"] / 100), int(metrics["n_episodes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--human", type=Path, required=True, help="lerobot/pusht_keypoints on disk")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    noisy = args.output / f"noise_{NOISE:g}"
    if not noisy.exists():
        pusht_act(
            "mode=demos", "env=pusht_keypoints", "demos.n_episodes=2000", "demos.start_seed=1000000",
            f"demos.action_noise={NOISE}", f"output_dir={noisy}",
        )  # fmt: skip
    table = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for data in rows(args.human, noisy):
            cells = [pool.submit(success, data, seed, args.steps, args.output) for seed in args.seeds]
            table[data.name] = cells
        found = {name: [cell.result() for cell in cells] for name, cells in table.items()}
    record = {"commit": git_commit(), "versions": package_versions(), "steps": args.steps, "rows": {}}
    print(f"| demonstrations | success, mean of {len(args.seeds)} seeds | each seed | 95 % of all episodes |")
    print("| --- | --- | --- | --- |")
    for name, cells in found.items():
        rates = [100 * successes / episodes for successes, episodes in cells]
        low, high = wilson_interval(sum(s for s, _ in cells), sum(n for _, n in cells))
        record["rows"][name] = {"pc_success": rates, "low": 100 * low, "high": 100 * high}
        each = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"| {name} | {np.mean(rates):.1f} % | {each} | {100 * low:.1f} to {100 * high:.1f} |")
    (args.output / "learnability.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
