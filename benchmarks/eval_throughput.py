"""Episodes a second of an evaluation: ours against stock lerobot-eval, on the same checkpoint and seeds.

    python benchmarks/eval_throughput.py --checkpoint outputs/act_pusht/train --episodes 20

Sides, in turn: ours (`pusht-act mode=eval`) and stock with its environments in one process: its default, each in a
process of its own, fails on PushT in LeRobot 0.6.1 (the workers do not know gym_pusht; when they do, the first look for
a task's name closes them). Both run without videos and with those of the first 10 episodes. Stock always writes them
and has no flag against it (eval.recording=true leaves them out and writes data sets in their place), so "without" calls
its own evaluation function with max_episodes_rendered=0, the rest of the command untouched.

The time is that of the evaluation, its videos included, without imports and the loading of the policy; the whole
command's is beside it. Successes and rewards are compared seed by seed. Prints a table and writes it as JSON.
"""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import Clocked, pusht_act, record, spread, stock_arguments, told

VIDEOS = 10
"""How many lerobot-eval writes."""
SIDES = ("ours", "stock")
Episodes = list[tuple[bool, float, float]]
"""Success, maximum and sum of the rewards, by seed."""


def run(args: argparse.Namespace, side: str, videos: bool, folder: Path) -> tuple[float, float, Episodes]:
    """One turn: seconds of the evaluation, of the whole command, and its episodes."""
    output = folder / "run"
    job = [
        "mode=eval", f"checkpoint={args.checkpoint}", f"eval.n_episodes={args.episodes}",
        f"eval.batch_size={args.batch_size}", f"eval.start_seed={args.start_seed}", *args.overrides,
    ]  # fmt: skip
    if side == "ours":
        n_videos = min(VIDEOS, args.episodes) if videos else 0
        arguments = [*job, f"eval.n_videos={n_videos}", f"output_dir={output}", *args.ours]
        clocked = Clocked("pusht-act", arguments, folder, threads=args.threads, options={})
    else:
        arguments = [*stock_arguments(*job), "--eval.use_async_envs=false", f"--output_dir={output}"]
        options = {"timed": True, "videos": videos}
        clocked = Clocked("lerobot-eval", arguments, folder, threads=args.threads, options=options)
    whole = clocked.finish()
    if side == "ours":  # to be clocked from outside it would be imported before its workers are started, unlike in use
        seconds = float(json.loads(next(output.rglob("metrics.json")).read_text())["eval_s"])
    else:
        seconds = float(clocked.wait()["seconds"])
    made = len(list(output.rglob("*.mp4")))
    if made < min(VIDEOS, args.episodes) if videos else made:
        sys.exit(f"{side} wrote {made} videos\n{clocked.output[-2000:]}")
    return seconds, whole, our_episodes(output) if side == "ours" else stock_episodes(output)


def our_episodes(output: Path) -> Episodes:
    with next(output.rglob("episodes.csv")).open() as file:
        return [
            (row["success"] == "True", float(row["max_reward"]), float(row["sum_reward"]))
            for row in csv.DictReader(file)
        ]


def stock_episodes(output: Path) -> Episodes:
    metrics = json.loads((output / "eval_info.json").read_text())["per_task"][0]["metrics"]
    return list(zip(metrics["successes"], metrics["max_rewards"], metrics["sum_rewards"], strict=True))


def agreement(ours: Episodes, theirs: Episodes) -> dict[str, Any]:
    """Of how many seeds the success is the same, and the largest difference of a reward."""
    same = sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True))
    return {
        "same success": f"{same} of {len(ours)}",
        "max reward verify_manifest by": max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)),
        "sum of rewards by": max(abs(a[2] - b[2]) for a, b in zip(ours, theirs, strict=True)),
    }


def checkpoint(folder: Path) -> Path:
    """Of a policy that has hardly learnt: its episodes all take their 300 steps."""
    pusht_act(
        "dataset=demos", "demos.n_episodes=4", "policy=act_small", "policy.n_action_steps=16", "batch_size=8",
        "steps=2", "eval_freq=0", "wandb.enable=false", f"output_dir={folder}",
    )  # fmt: skip
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a run directory or checkpoint; else an untrained policy's")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=10, help="environments side by side")
    parser.add_argument("--start-seed", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--videos", choices=("with", "without", "both"), default="both")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of all sides; else that of the environment")
    parser.add_argument("--overrides", nargs="*", default=[], help="for all sides: policy.n_action_steps=16")
    parser.add_argument("--ours", nargs="*", default=[], help="overrides of ours alone")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/eval_throughput.json"))
    args = parser.parse_args()
    found = record(args)
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        args.checkpoint = args.checkpoint or checkpoint(Path(temporary) / "untrained")
        for videos in {"with": [True], "without": [False], "both": [False, True]}[args.videos]:
            turns: dict[str, list[tuple[float, float, Episodes]]] = {side: [] for side in SIDES}
            for repeat in range(args.repeats):
                for side in SIDES:
                    folder = Path(temporary) / f"{side}-{videos}-{repeat}"
                    turns[side].append(run(args, side, videos, folder))
                    seconds = turns[side][-1][0]
                    print(f"videos {videos}, turn {repeat + 1}, {side}: {seconds:.2f} s", file=sys.stderr)
            ours_s = median(seconds for seconds, _, _ in turns["ours"])
            for side, done in turns.items():
                seconds = median(evaluation for evaluation, _, _ in done)
                row: dict[str, Any] = {
                    "videos": min(VIDEOS, args.episodes) if videos else 0,
                    "side": side,
                    "episodes/s": args.episodes / seconds,
                    "evaluation, s": seconds,
                    "whole command, s": median(whole for _, whole, _ in done),
                    "its time / ours": seconds / ours_s,
                    "of single turns": spread([a[0] / b[0] for a, b in zip(done, turns["ours"], strict=True)]),
                    **agreement(turns["ours"][0][2], done[0][2]),
                }
                table.append(row)
    told(found, table, args.output)


if __name__ == "__main__":
    main()
