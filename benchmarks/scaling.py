"""Step time and memory as the data set grows and as runs share a machine.

    python benchmarks/scaling.py --data ../shared/data/pusht_keypoints --threads 1

The data set is repeated until it has 200, 2,000 and 20,000 episodes and is decoded into the cache like any other; then
1, 2 and 4 runs at once train on 200 episodes out of one cache. Memory is read while all runs stand at their last step:
RSS counts a page that two of them share twice, PSS once in all. 20,000 episodes with pictures take 69 GB of disk: what
would take more than half of what is free is left out, and said. The sizes run in turn. Prints a table and writes it as
JSON.
"""

import argparse
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import Clocked, TimedRun, data_overrides, on_cuda, record, spread, told, turn_of
from pusht_act.data.cache import cache_root

SMALL = ["policy=act_small", "policy.chunk_size=16"]


def overrides(args: argparse.Namespace, folder: Path, steps: int) -> list[str]:
    data = data_overrides(args.data) if args.data else ["env=pusht_keypoints", "dataset=demos"]
    return [
        *data, *SMALL, f"batch_size={args.batch_size}", f"steps={steps}", "log_freq=50", "eval_freq=0",
        "save_checkpoint=false", "wandb.enable=false", *args.policy, f"output_dir={folder / 'run'}",
    ]  # fmt: skip


def together(args: argparse.Namespace, runs: int, episodes: int, steps: int, folder: Path) -> list[TimedRun]:
    """`runs` runs at once on `episodes` episodes."""
    clocks = []
    for i in range(runs):
        own = folder / str(i)
        arguments = overrides(args, own, steps)
        options = {"episodes": episodes}
        clocks.append(Clocked("pusht-act", arguments, own, steps, args.every, args.threads, options))
    reports = [clocked.wait() for clocked in clocks]
    memory = [clocked.memory() for clocked in clocks]
    for clocked in clocks:
        clocked.finish()
    warm_up = min(args.warm_up, steps - 2)
    return [turn_of(*each, warm_up) for each in zip(clocks, reports, memory, strict=True)] if steps > 2 else []


def build(args: argparse.Namespace, episodes: int, folder: Path) -> str | None:
    """Fill the cache with so many episodes; why not, if the disk has no room for them."""
    try:
        together(args, 1, episodes, 1, folder)
    except SystemExit as error:
        reason = next((line for line in str(error).splitlines() if "MB free" in line), None)
        if reason is None:
            raise
        return reason
    return None


def row(
    args: argparse.Namespace, runs: int, episodes: int, done: list[list[TimedRun]], base: list[list[TimedRun]]
) -> Any:
    """Medians over all turns; memory of all runs together."""
    step_s = median(s for turns in done for t in turns for s in t.step_s)
    base_s = median(s for turns in base for t in turns for s in t.step_s)
    ratios = [
        median(t.median_s for t in turns) / median(t.median_s for t in first)
        for turns, first in zip(done, base, strict=True)
    ]
    return {
        "runs": runs,
        "episodes": f"{episodes:,}",
        "step of each, ms": 1000 * step_s,
        "samples/s of all": runs * args.batch_size / step_s,
        "launch to first step, s": median(t.first_step_s for turns in done for t in turns),
        "RSS of all, MB": median(sum(t.memory.rss for t in turns) for turns in done),
        "PSS of all, MB": median(sum(t.memory.pss for t in turns) for turns in done),
        "step / the first row's": step_s / base_s,
        "of single turns": spread(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a LeRobotDataset v3.0 on disk; without it the embedded keypoints")
    parser.add_argument("--episodes", type=int, nargs="+", default=[200, 2000, 20_000])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4], help="at once, on the first of --episodes")
    parser.add_argument("--policy", nargs="*", default=[], help="more overrides")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="a turn")
    parser.add_argument("--warm-up", type=int, default=20, help="steps of each turn that are left out")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each size")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of each run")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/scaling.json"))
    args = parser.parse_args()
    args.every = 5 if on_cuda() else 1
    found = record(args)
    before = set(cache_root().glob("repeated-*"))
    turns: dict[tuple[int, int], list[list[TimedRun]]] = defaultdict(list)
    left_out: dict[int, str] = {}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for episodes in args.episodes:
                if reason := build(args, episodes, Path(temporary) / f"build-{episodes}"):
                    left_out[episodes] = reason
                    print(f"{episodes:,} episodes are left out: {reason}", file=sys.stderr)
            sizes = [(1, episodes) for episodes in args.episodes if episodes not in left_out]
            sizes += [(runs, args.episodes[0]) for runs in args.runs if runs > 1]
            for repeat in range(args.repeats):
                for runs, episodes in sizes:
                    folder = Path(temporary) / f"{runs}-{episodes}-{repeat}"
                    turns[runs, episodes].append(together(args, runs, episodes, args.steps, folder))
                    step_ms = 1000 * median(t.median_s for t in turns[runs, episodes][-1])
                    print(f"turn {repeat + 1}, runs {runs}, {episodes:,} episodes: {step_ms:.1f} ms", file=sys.stderr)
    finally:
        for path in set(cache_root().glob("repeated-*")) - before:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    table = [row(args, *size, done, turns[sizes[0]]) for size, done in turns.items()]
    table += [{"runs": 1, "episodes": f"{episodes:,}", "step of each, ms": "no room"} for episodes in left_out]
    told(found | {"left_out": left_out}, table, args.output)


if __name__ == "__main__":
    main()
