"""From launch to the first training step on a warm cache, ours against stock, and how fast a command answers.

    python benchmarks/startup.py --data ../shared/data/pusht --threads 2

The first step is done when its optimizer step is; batch 8 of the default ACT unless `--policy` says otherwise. Stock
runs with the flags that pusht-act prints for the same job. The sides run in turn; a first turn of each, which fills
caches, is not counted. Prints a table and writes it as JSON.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import Clocked, data_overrides, record, spread, stock_arguments, told, turn

ANSWERS = {
    "--help": (["pusht-act", "--help"], ["lerobot-train", "--help"]),
    "--cfg job": (["pusht-act", "--cfg", "job"], None),
    "a config error": (
        ["pusht-act", "policy.dim_mode=64"],
        ["lerobot-train", "--dataset.repo_id=lerobot/pusht", "--policy.type=act", "--policy.dim_mode=64"],
    ),
}


def first_step(side: str, overrides: list[str], folder: Path, threads: int | None) -> float:
    """Seconds from the launch of `side` to the end of its first step."""
    overrides = [*overrides, f"output_dir={folder / 'run'}"]
    program, arguments = ("pusht-act", overrides) if side == "ours" else ("lerobot-train", stock_arguments(*overrides))
    return turn(Clocked(program, arguments, folder, steps=1, threads=threads), warm_up=0).first_step_s


def answer(command: list[str], folder: Path) -> float:
    """Seconds that a command takes which trains nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(sys.executable).with_name(command[0])
    start = time.monotonic()
    subprocess.run([sys.executable, script, *command[1:]], cwd=folder, capture_output=True, check=False)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a LeRobotDataset v3.0 on disk; without it only the quick answers")
    parser.add_argument("--policy", nargs="*", default=[], help="more overrides, for both sides")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--warm-up", type=int, default=1, help="turns of each side before them")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of both sides; else that of the environment")
    parser.add_argument("--ours-only", action="store_true", help="leave stock out, which takes half a minute a turn")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/startup.json"))
    args = parser.parse_args()
    found = record(args)
    sides = ["ours"] if args.ours_only else ["ours", "stock"]
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for repeat in range(-args.warm_up, args.repeats):
            turns: dict[tuple[str, str], float] = {}
            if args.data is not None:
                overrides = [
                    *data_overrides(args.data), "policy.pretrained_backbone_weights=null", "steps=1", "log_freq=1",
                    f"batch_size={args.batch_size}", "eval_freq=0", "save_checkpoint=false", "wandb.enable=false",
                    *args.policy,
                ]  # fmt: skip
                for side in sides:
                    folder = Path(temporary) / f"{side}-{repeat}"
                    turns["first step", side] = first_step(side, overrides, folder, args.threads)
            for name, commands in ANSWERS.items():
                for side, command in zip(sides, commands, strict=False):
                    if command is not None:
                        turns[name, side] = answer(command, Path(temporary) / "empty")
            for (name, side), took in turns.items():
                print(f"turn {repeat + 1}, {name}, {side}: {took:.2f} s", file=sys.stderr)
                if repeat >= 0:
                    seconds.setdefault(name, {}).setdefault(side, []).append(took)
    table = []
    for name, by_side in seconds.items():
        row: dict[str, Any] = {"from launch to": name}
        for side, turns_s in by_side.items():
            row |= {f"{side}, s": median(turns_s), f"{side}, lowest to highest": spread(turns_s)}
        if "stock" in by_side:
            row["stock / ours"] = median(by_side["stock"]) / median(by_side["ours"])
        table.append(row)
    told(found, table, args.output)


if __name__ == "__main__":
    main()
