r"""Training steps a second: ours against stock lerobot-train, and against the compute-only step.

    python benchmarks/train_throughput.py --data ../shared/data/pusht --threads 2
    python benchmarks/train_throughput.py --data ../shared/data/pusht_keypoints --case small_keypoints --threads 1 \
        --cpus 0

Sides, in turn:
    ours        pusht-act, its own loop and data
    stock       lerobot-train with the flags that pusht-act prints for the same job: its own loop and DataLoader workers
    compute     our step on one batch over and over
    eager       (small_keypoints) policy.forward, backward, clip, torch's plain AdamW, zero_grad in fp32, on batches
                made beforehand

A step's time is that from the end of one optimizer step to the end of the next, everything between them included: the
median, and the mean for a side whose steps wait for batches now and then. Stock's workers have 16 batches ready before
its first step: a `--warm-up` beyond them shows it as it goes on. The time for data is what each program logs of itself
(stock to 1 ms). Neither evaluates nor saves. The ResNet begins with random weights on both sides: ImageNet's cannot be
downloaded everywhere, and cost the same. bf16 is policy.use_amp=true on both sides, for which stock takes fp16 on a
GPU. --compile is train.compile=true, for ours and compute; without it they take the device's default. Prints a table
and writes it as JSON.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import Clocked, TimedRun, data_overrides, on_cuda, record, spread, stock_arguments, told, turn

SMALL = [
    "policy=act_small", "policy.chunk_size=16", "+policy.n_decoder_layers=2", "+policy.use_vae=false",
    "+policy.dropout=0.0",
]  # fmt: skip
"""Width 64, 2 + 2 layers; without VAE and dropout, which keypoints do not need (conf/experiment/quickstart.yaml)."""
CASES: dict[str, dict[str, Any]] = {
    "act": {"sides": ["ours", "stock", "compute"], "batch_sizes": [8, 32, 64], "policy": []},
    "small_keypoints": {"sides": ["ours", "eager", "compute", "stock"], "batch_sizes": [64], "policy": SMALL},
}
PROGRAMS = {"ours": "pusht-act", "stock": "lerobot-train", "compute": "compute", "eager": "eager"}


def job(args: argparse.Namespace, batch_size: int) -> list[str]:
    """The overrides that both sides are made from."""
    return [
        *data_overrides(args.data), *CASES[args.case]["policy"], "policy.pretrained_backbone_weights=null",
        f"batch_size={batch_size}", f"steps={args.steps}", f"log_freq={args.log_freq}", "eval_freq=0",
        "save_checkpoint=false", "wandb.enable=false",
        *(["+policy.use_amp=true"] if args.precision == "bf16" else []), *args.policy,
    ]  # fmt: skip


def run(args: argparse.Namespace, side: str, batch_size: int, folder: Path) -> tuple[TimedRun, float | None]:
    """One turn of `side`, and what it says a step's data took, in seconds."""
    output = folder / "run"
    overrides = [*job(args, batch_size), f"output_dir={output}"]
    if side == "stock":
        workers = [f"--num_workers={args.num_workers}"] if args.num_workers is not None else []
        arguments = [*stock_arguments(*overrides), *workers]
    else:
        compiled = ["train.compile=true"] if args.compile else []
        arguments = [*overrides, *([*compiled, *args.ours] if side in ("ours", "compute") else [])]
    options = {"cpus": args.cpus}
    clocked = Clocked(PROGRAMS[side], arguments, folder, args.steps, args.every, args.threads, options)
    done = turn(clocked, args.warm_up)
    if side == "stock":
        logged = [float(value) for value in re.findall(r"data_s:([\d.]+)", done.output)]
    elif side == "ours":
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        logged = [line["train/dataloading_s"] for line in lines if "train/dataloading_s" in line]
    else:
        return done, None
    return done, median(logged[1:] or logged) if logged else None


def rows(batch_size: int, turns: dict[str, list[tuple[TimedRun, float | None]]]) -> list[dict[str, Any]]:
    """One a side: medians over all steps of all turns, and ours against it."""
    medians = {side: median(s for t, _ in done for s in t.step_s) for side, done in turns.items()}
    means = {side: fmean(s for t, _ in done for s in t.step_s) for side, done in turns.items()}
    found = []
    for side, done in turns.items():
        step_s = medians[side]
        data = [seconds for _, seconds in done if seconds is not None]
        ratios = [theirs.median_s / ours.median_s for (theirs, _), (ours, _) in zip(done, turns["ours"], strict=True)]
        first = median(t.first_step_s for t, _ in done)
        found.append(
            {
                "batch": batch_size,
                "side": side,
                "step, ms": 1000 * step_s,
                "mean, ms": 1000 * means[side],
                "steps/s": 1 / step_s,
                "samples/s": batch_size / step_s,
                "data, ms": 1000 * median(data) if data else "",
                "launch to first step, s": first if side in ("ours", "stock") else "",
                "peak RSS, MB": max(t.memory.peak_rss for t, _ in done),
                "PSS, MB": max(t.memory.pss for t, _ in done),
                **({"GPU, MB": max(t.cuda_mb for t, _ in done)} if any(t.cuda_mb for t, _ in done) else {}),
                "its step / ours": step_s / medians["ours"],
                "of single turns": spread(ratios),
                "its mean / ours": means[side] / means["ours"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="act")
    parser.add_argument("--data", type=Path, required=True, help="a LeRobotDataset v3.0 on disk, pictures or keypoints")
    parser.add_argument("--policy", nargs="*", default=[], help="more overrides, for all sides: policy.dim_model=256")
    parser.add_argument("--ours", nargs="*", default=[], help="overrides of ours and compute, which stock has not")
    parser.add_argument("--sides", nargs="+", choices=PROGRAMS, help="the case's when not given; ours is always there")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="8 32 64, or the case's")
    parser.add_argument("--steps", type=int, default=40, help="a turn")
    parser.add_argument("--warm-up", type=int, default=10, help="steps of each turn that are left out")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--compile", action="store_true", help="compile our step, which takes its first a minute or more"
    )
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of all sides; else that of the environment")
    parser.add_argument("--cpus", type=int, nargs="+", default=[], help="keep each side to these cores")
    parser.add_argument("--num-workers", type=int, help="of stock's DataLoader; its default is 4")
    parser.add_argument("--log-freq", type=int, default=10)
    parser.add_argument(
        "--output", type=Path, help="default: outputs/benchmarks/train_throughput_CASE_PRECISION[_compile].json"
    )
    args = parser.parse_args()
    if args.steps <= args.warm_up + 1:
        sys.exit(f"--steps {args.steps} leaves no step after --warm-up {args.warm_up}: give more steps")
    args.every = 5 if on_cuda() else 1
    found = record(args)
    sides = list(dict.fromkeys(["ours", *(args.sides or CASES[args.case]["sides"])]))
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        for batch_size in args.batch_sizes or CASES[args.case]["batch_sizes"]:
            turns: dict[str, list[tuple[TimedRun, float | None]]] = defaultdict(list)
            for repeat in range(args.repeats):
                for side in sides:
                    folder = Path(temporary) / f"{side}-{batch_size}-{repeat}"
                    turns[side].append(run(args, side, batch_size, folder))
                    step_ms = 1000 * turns[side][-1][0].median_s
                    print(f"batch {batch_size}, turn {repeat + 1}, {side}: {step_ms:.1f} ms", file=sys.stderr)
            table += rows(batch_size, turns)
    way = f"{args.precision}_compile" if args.compile else args.precision
    default = Path(f"outputs/benchmarks/train_throughput_{args.case}_{way}.json")
    told(found, table, args.output or default)


if __name__ == "__main__":
    main()
