"""Jobs of a sweep that a real SLURM preempts again and again come to the bits of runs that were left alone.

    python benchmarks/cluster_torture.py --preemptions 50          (as root, with Debian's slurm-wlm installed)

A job array of small runs; its jobs are preempted some time after each start, in turn by SIGUSR2 (as near the time
limit), `scontrol requeue` and a job of a partition that goes before. In the end the launcher must come back with all
jobs done, and weights, optimizer, random streams, metrics and evaluations must be those of runs that were left alone.
Tells what a preemption cost, seconds to a checkpoint and to the next start, and what the launcher adds before a first
step. Prints tables and writes them as JSON.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import record, table, told
from benchmarks.torture import last_step, outcome, progress
from tests.helpers.commands import Commands
from tests.helpers.slurm import KILL_WAIT_S, Slurm, missing

RUN = [
    *("mode=test", "env=pusht_keypoints", "dataset=demos", "demos.n_episodes=4", "policy=act_small"),
    *("policy.chunk_size=8", "policy.n_action_steps=8", "policy.dim_model=32", "batch_size=4", "log_freq=1"),
    *("save_freq=1000", "eval_freq=1500", "eval.n_episodes=4", "eval.batch_size=4", "eval.n_videos=0"),
    *("env.episode_length=16", "wandb.enable=false"),
]
WAYS = ("SIGUSR2", "scontrol requeue", "partition")
LONGEST = 3.0
"""Seconds of training, at most, before a preemption."""


@dataclass
class Preemption:
    """A job's way from a signal to its next start."""

    way: str
    at: float
    tries: int
    saved: int
    """Step of the newest checkpoint at that moment."""
    save_s: float | None = None
    restart_s: float | None = None


@dataclass
class Sweep:
    """The array under torture."""

    slurm: Slurm
    folder: Path
    preemptions: int
    """To come to, at least."""
    chance: random.Random
    under_way: dict[int, Preemption] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    due: dict[int, float] = field(default_factory=dict)
    done: list[Preemption] = field(default_factory=list)
    ordered: int = 0

    def watch(self, job: int) -> None:
        """Note what became of `job`, and preempt it if it is time."""
        run, now = self.folder / str(job), time.monotonic()
        state, tries, pid = self._state(job)
        if tries > self.tries.setdefault(job, tries):  # begun again
            before = self.under_way.pop(job, None) or Preemption("partition", now, tries - 1, 0)
            before.restart_s = now - before.at
            self.done.append(before)
            self.tries[job] = tries
            self.due.pop(job, None)
        elif (preemption := self.under_way.get(job)) is not None:
            if preemption.save_s is None and last_step(run) > preemption.saved:
                preemption.save_s = now - preemption.at
        elif (
            state == "running" and len(self.done) < self.preemptions and progress_of(run) > last_step(run)
            and self.due.setdefault(job, now + self.chance.uniform(0, LONGEST)) <= now
        ):  # fmt: skip
            self._preempt(job, run, tries, pid)

    def _state(self, job: int) -> tuple[str, int, int]:
        try:
            content = json.loads((self.folder / "jobs" / f"{job}.json").read_text())
        except FileNotFoundError:
            return "waiting", 0, 0
        return content["state"], content["tries"], content["holder"]["pid"]

    def _preempt(self, job: int, run: Path, tries: int, pid: int) -> None:
        way = WAYS[self.ordered % len(WAYS)]
        self.ordered += 1
        del self.due[job]
        if way == "partition":  # which job it takes the place of is SLURM's choice
            self.slurm.run("sbatch", "-p", "high", "-o", "/dev/null", "--wrap", "sleep 0.5")
            return
        self.under_way[job] = Preemption(way, time.monotonic(), tries, last_step(run))
        with suppress(ProcessLookupError):  # it may have ended meanwhile
            if way == "SIGUSR2":  # by ourselves, as slurmstepd does: tests/sweeps/test_slurm.py says why not by scancel
                os.kill(pid, signal.SIGUSR2)
            else:
                (script,) = (self.folder / ".submitit").rglob("*_submission.sh")
                self.slurm.run("scontrol", "requeue", f"{script.name.partition('_')[0]}_{job}", check=False)


def progress_of(run: Path) -> int:
    try:
        return progress(run)
    except (AssertionError, ValueError):  # a line is just being written
        return 0


def came_to(run: Path) -> dict[str, Any]:
    """What must be the same: neither the launcher, which is part of the configuration, nor saves on a signal."""
    found = outcome(run)
    del found["folders"]
    found["files"] = {path: text for path, text in found["files"].items() if "pretrained_model" not in path}
    return found


def launcher_seconds(slurm: Slurm, folder: Path, command: list[str]) -> dict[str, float]:
    """From launch to the first step: the command alone, and as a job of a sweep on the empty cluster."""
    found = {}
    sweep = [f"hydra.sweep.dir={folder / 'single'}", *cluster()]
    for way, arguments, run in (
        ("alone", [f"output_dir={folder / 'first'}"], folder / "first"),
        ("SLURM", sweep, folder / "single" / "0"),
    ):
        began = time.monotonic()
        multirun = ["-m"] if way == "SLURM" else []
        words = [sys.executable, "-m", "pusht_act", *multirun, *command, "steps=2", *arguments]
        with (folder / "printed").open("w") as printed:
            process = subprocess.Popen(words, env=slurm.environment, stdout=printed, stderr=printed)
        while not progress_of(run):
            assert process.poll() in (None, 0), (folder / "printed").read_text()
            time.sleep(0.02)
        found[way] = time.monotonic() - began
        assert process.wait() == 0, (folder / "printed").read_text()
        found[f"{way}, to the end"] = time.monotonic() - began
    return found


def cluster() -> list[str]:
    asked_for = {"gpus_per_node": "null", "cpus_per_task": 1, "mem_gb": 1, "max_num_timeout": 1000}
    return ["cluster=slurm", *(f"hydra.launcher.{key}={value}" for key, value in asked_for.items())]


def rows(done: list[Preemption]) -> list[dict[str, Any]]:
    found = []
    for way in WAYS:
        each = [preemption for preemption in done if preemption.way == way]
        saves = [preemption.save_s for preemption in each if preemption.save_s is not None]
        restarts = [preemption.restart_s for preemption in each if preemption.restart_s and way != "partition"]
        found.append(
            {
                "preempted by": way,
                "times": len(each),
                "to a checkpoint, s": median(saves) if saves else "",
                "to the next start, s": median(restarts) if restarts else "",
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preemptions", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/cluster_torture.json"))
    args = parser.parse_args()
    if (reason := missing()) is not None:
        sys.exit(reason)
    os.environ["OMP_NUM_THREADS"] = "1"  # a job's threads would wait for those of others
    found = record(args)
    command = [*RUN, f"steps={args.steps}"]
    with (
        tempfile.TemporaryDirectory() as temporary,
        Slurm(Path(temporary) / "slurm", cpus=os.cpu_count() or 1) as slurm,
    ):
        folder = Path(temporary)
        overhead = launcher_seconds(slurm, folder, command)
        seeds = ",".join(str(seed + 1) for seed in range(args.jobs))
        words = [sys.executable, "-m", "pusht_act", "-m", *command, f"seed={seeds}", *cluster()]
        sweep = Sweep(slurm, folder / "sweep", args.preemptions, random.Random(args.seed))
        with (folder / "printed").open("w") as printed:
            launcher = subprocess.Popen(
                [*words, f"hydra.sweep.dir={sweep.folder}"], env=slurm.environment, stdout=printed, stderr=printed
            )
        while launcher.poll() is None:
            for job in range(args.jobs):
                sweep.watch(job)
            time.sleep(0.05)
        print((folder / "printed").read_text()[-1500:], file=sys.stderr)
        assert launcher.returncode == 0, f"the launcher left with {launcher.returncode}"
        with Commands() as commands:
            for job in range(args.jobs):
                alone, output = folder / f"alone-{job}", folder / "output"
                code = commands.run([*command, f"seed={job + 1}", f"output_dir={alone}"], output)
                assert code == 0, output.read_text()
                expected, came = came_to(alone), came_to(sweep.folder / str(job))
                for key, value in expected.items():
                    assert came[key] == value, f"job {job}: {key} differ"
    print(table([{"launch to": way, "s": seconds} for way, seconds in overhead.items()]) + "\n")
    print(f"{len(sweep.done)} preemptions, {args.jobs} jobs the same to the bit as alone; KillWait {KILL_WAIT_S} s\n")
    told(found | {"overhead": overhead}, rows(sweep.done), args.output)


if __name__ == "__main__":
    main()
