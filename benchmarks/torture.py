"""Training that is killed again and again comes to the same bits: how often, where, and what each kill cost.

    python benchmarks/torture.py --kills 200
    python benchmarks/torture.py --kills 50 --images

A small run is killed (SIGKILL) at random moments and at chosen ones, such as in a save or when a link is switched, and
the same command is given again (resume.auto=true) until it is done; then the next run begins, until all kills are
spent. `--signal TERM` stops it instead, and `--stops 50` adds runs that SIGTERM stops at such moments. Weights,
optimizer, random streams, loop state, metrics (but times), evaluations and links must be those of a run that was left
alone, and no more may be lost than what came after the last save. Prints a table by moment and writes it as JSON;
leaves with 1 at the first thing that is not so.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import record, told
from pusht_act.checkpoints.manifest import find_corruption
from tests.helpers.commands import Commands

STEPS = 30
COMMAND = [
    *("mode=test", "env=pusht_keypoints", "dataset=demos", "demos.n_episodes=4", "policy=act_small"),
    *("policy.chunk_size=8", "policy.n_action_steps=8", "policy.dim_model=32", "batch_size=4", f"steps={STEPS}"),
    *("log_freq=1", "save_freq=2", "checkpoints.keep_last=2", "eval_freq=5", "eval.n_episodes=4", "eval.batch_size=4"),
    *("eval.n_videos=0", "env.episode_length=16", "policy.optimizer_lr=1e-2", "wandb.enable=false"),
    "resume.auto=true",
]
"""Of seconds, every part of it real: saves, prunings, links and evaluations beside training all the time."""
IMAGES = [
    *("env=pusht", "policy.pretrained_backbone_weights=null", "train.backbone_norm=batch", "train.precision=bf16"),
    *("train.mirror=0.5", "train.random_shift=4", "train.state_noise=2", "train.chunk_discount=0.9", "ema.enable=true"),
    *("save_freq=5", "eval_freq=10", "+scheduler.type=cosine_annealing_with_warmup", "+scheduler.num_warmup_steps=5"),
]
"""The same from images, with every option that draws random numbers or keeps a state of its own."""
MOMENTS = {
    "any": "",
    "save": r"\.\d+\.part",
    "removal": r"\.\d+\.old",
    "link last": r"\.last\.new",
    "link best": r"\.best\.new",
    "evaluation": r"\.step-.*\.part",
    "start": "",
}
"""When a run is killed, and the name that appears then."""
LONGEST, LONGEST_IMAGES = 0.8, 8.0
"""Seconds of training, at most, before a kill at any moment."""


@dataclass(frozen=True)
class Plan:
    """`kills` signals `number` to `command`, at moments drawn by `chance`."""

    command: list[str]
    longest: float
    kills: int
    chance: random.Random
    number: int


@dataclass
class Tally:
    """What has happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    lost: dict[str, list[int]] = field(default_factory=dict)
    """By moment, how many steps had to be done again."""
    runs: int = 0


def torture(folder: Path, plan: Plan) -> Tally:
    """Runs in `folder` until all kills were spent.

    Raises:
        AssertionError: something is not as in the run that was left alone.
    """
    tally = Tally()
    with Commands() as commands:
        output = folder / "output"
        assert commands.run([*plan.command, f"output_dir={folder / 'whole'}"], output) == 0, output.read_text()
        expected = outcome(folder / "whole")
        while sum(tally.kills.values()) < plan.kills:
            run = folder / f"run-{tally.runs}"
            one_run(commands, run, expected, plan, tally)
            tally.runs += 1
    return tally


def one_run(commands: Commands, run: Path, expected: dict[str, Any], plan: Plan, tally: Tally) -> None:
    """One run, killed until it is done or no kill is left."""
    output = run.with_suffix(".output")
    saved, reached, moment = 0, 0, ""
    while True:
        pid = commands.start([*plan.command, f"output_dir={run}"], output)
        killed = ""
        if sum(tally.kills.values()) < plan.kills:
            killed = kill(pid, run, output, plan)
        code = commands.wait(pid)
        printed = output.read_text(errors="replace")
        began = resumed_at(printed)
        if began is not None and moment:
            assert began >= saved, f"{run}: step {saved} was saved, the run went on from {began}\n{printed}"
            tally.lost.setdefault(moment, []).append(reached - began)
            moment = ""
        if code == 0:
            break
        assert killed, f"{run}: left with {code}\n{printed}"
        not_heard = plan.number == signal.SIGKILL or not printed  # or sent before the command listened
        expected_code = -plan.number if not_heard and code < 0 else 128 + plan.number
        assert code == expected_code, f"{run}: left with {code}\n{printed}"
        tally.kills[killed] += 1
        moment, saved, reached = killed, last_step(run), max(reached, progress(run))
        if plan.number != signal.SIGKILL and "stopped by" in printed and "after step" in printed:
            assert saved == reached, f"{run}: stopped at {reached}, saved {saved}"
        for path in run.glob("checkpoints/*"):
            assert not path.name.isdigit() or find_corruption(path) is None, f"{path}: {find_corruption(path)}"
    found = outcome(run)
    for key, value in expected.items():
        assert found[key] == value, f"{run}: {key} differ:\n{found[key]}\n{value}"


def kill(pid: int, run: Path, output: Path, plan: Plan) -> str:
    """Send the signal at a moment drawn by chance; return the moment's name, or none if the process ended before."""
    moment = plan.chance.choice([*MOMENTS])
    after, nth = plan.chance.uniform(0, plan.longest), plan.chance.randint(1, 3)
    pattern, began = re.compile(MOMENTS[moment] or "never"), 0.0
    if moment == "start":
        time.sleep(after)
    seen, there = 0, False
    while moment != "start" and not ended(pid):
        if not MOMENTS[moment]:
            if not began and "step " in output.read_text(errors="replace"):
                began = time.monotonic()
            if began and time.monotonic() > began + after:
                break
            time.sleep(0.001)
            continue
        names = [*_names(run / "checkpoints"), *_names(run / "eval")]
        was, there = there, any(pattern.fullmatch(name) for name in names)
        seen += there and not was
        if seen == nth:
            break
    if ended(pid):
        return ""
    os.kill(pid, plan.number)
    return moment


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  (a hundred times faster than paths)
    except OSError:
        return []


def ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def resumed_at(printed: str) -> int | None:
    """The step that a command went on from; None when it was killed before it had told."""
    if "is finished" in printed:
        return STEPS
    if found := re.search(r"resuming from \S*/(\d+)$", printed, flags=re.MULTILINE):
        return int(found[1])
    return 0 if "run directory" in printed and "step " in printed else None


def last_step(run: Path) -> int:
    last = run / "checkpoints" / "last"
    return int(last.readlink().name) if last.is_symlink() else 0


def progress(run: Path) -> int:
    """The newest step in metrics.jsonl."""
    return max((line["step"] for line in lines(run)), default=0)


def lines(run: Path) -> list[dict[str, Any]]:
    if not (run / "metrics.jsonl").exists():
        return []
    texts = (run / "metrics.jsonl").read_text().split("\n")
    assert texts[-1] == "" or len(texts) == 1, "a line is torn"
    return [json.loads(text) for text in texts[:-1]]


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves behind but times."""
    last = run / "checkpoints" / "last"
    tensors = {
        f"{path.name} {key}": (str(tensor.dtype), tensor.shape, tensor.tobytes())
        for path in last.rglob("*.safetensors")
        for key, tensor in load_file(path).items()
    }
    timed = ("dataloading_s", "samples_per_s", "elapsed_s", "time")
    metrics = sorted(
        (line["step"], sorted((key, value) for key, value in line.items() if not key.endswith(timed)))
        for line in lines(run)
    )
    groups = Counter((step, next(key for key, _ in values if "/" in key)) for step, values in metrics)
    assert set(groups.values()) == {1}, "a step's group is there twice"
    # What is to be removed at a later save depends on when an evaluation beside training was over.
    files = {
        path: re.sub(r'"spare": \[[^]]*\]|"elapsed_s": [0-9.]*', "", path.read_text())
        for path in last.rglob("*.json")
        if path.name != "manifest.json"
    }
    files |= {path: path.read_text() for path in run.glob("eval/*/episodes.csv")}
    return {
        "tensors": tensors,
        "files": {str(path.relative_to(run)): text.replace(str(run), "") for path, text in files.items()},
        "metrics": metrics,
        "folders": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "links": [(run / "checkpoints" / name).readlink().name for name in ("last", "best")],
        "others": sorted(path.name for path in (run / "eval").iterdir()),
    }


def table(tally: Tally, number: str) -> list[dict[str, Any]]:
    """The rows of one kind of signal, by moment."""
    rows: list[dict[str, Any]] = []
    for moment in MOMENTS:
        lost = max(tally.lost.get(moment, []), default=0)
        rows.append({"signal": number, "at": moment, "times": tally.kills[moment], "steps lost, at most": lost})
    total = sum(tally.kills.values())
    rows.append({"signal": number, "at": f"all, {tally.runs} runs the same to the bit", "times": total})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=0, help="graceful stops after the kills, each by SIGTERM")
    parser.add_argument("--images", action="store_true", help="from images, with all options of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--output", type=Path, default=Path("outputs/torture.json"))
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = record(args)
    began = time.monotonic()
    rows = []
    command, longest = ([*COMMAND, *IMAGES], LONGEST_IMAGES) if args.images else (COMMAND, LONGEST)
    for signalled, count in ((args.signal, args.kills), ("TERM", args.stops)):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                number = getattr(signal, f"SIG{signalled}")
                plan = Plan(command, longest, count, random.Random(args.seed), number)
                try:
                    tally = torture(Path(folder), plan)
                except AssertionError as error:
                    sys.exit(str(error))
            rows += table(tally, f"SIG{signalled}")
    found["seconds"] = time.monotonic() - began
    told(found, rows, args.output)


if __name__ == "__main__":
    main()
