"""Sweeps on a real SLURM of this machine: arrays, preemption, death, all to the same bits as undisturbed runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pusht_act.sweeps.state import load_jobs
from tests.helpers.commands import Commands
from tests.helpers.evaluations import outcome
from tests.helpers.runs import tiny_command
from tests.helpers.slurm import Slurm, missing
from tests.helpers.sweeps import ran, states
from tests.helpers.training import assert_same_bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.timeout(1500),  # on a loaded machine; alone three minutes
]
STEPS = 1000
RUN = tiny_command(f"steps={STEPS}", "save_freq=100", "eval_freq=500", "eval.background=false", "log_freq=100")
ASKED_FOR = ["hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm"), cpus=2) as cluster:
        yield cluster


@pytest.fixture
def begin(slurm: Slurm, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command on the cluster, its output in tmp_path/printed."""
    begun = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        with (tmp_path / "printed").open("w") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", "pusht_act", *arguments],
                env=slurm.environment, stdout=printed, stderr=printed, text=True, cwd=tmp_path,
            )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.wait()
    slurm.run("scancel", "-u", "root")


def until(holds: Callable[[], object], what: str, tmp_path: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            logs = "".join(path.read_text()[-3000:] for path in tmp_path.rglob("*_log.err"))
            raise TimeoutError(f"{what}\n{(tmp_path / 'printed').read_text()}\n{logs}")
        time.sleep(0.05)


def array(sweep: Path) -> str:
    """SLURM's id of the sweep's job."""
    (script,) = (sweep / ".submitit").rglob("*_submission.sh")
    return script.name.partition("_")[0]


def has_saved(sweep: Path, number: int) -> bool:
    return any((sweep / str(number) / "checkpoints").glob("[0-9]*"))


def process_of(sweep: Path, number: int) -> int:
    pid: int = json.loads((sweep / "jobs" / f"{number}.json").read_text())["holder"]["pid"]
    return pid


def same_as_undisturbed(commands: Commands, sweep: Path, number: int, seed: int, tmp_path: Path) -> None:
    alone = tmp_path / f"alone-{seed}"
    assert commands.run([*RUN, f"seed={seed}", f"output_dir={alone}"], tmp_path / "alone.txt") == 0
    assert_same_bits(alone, sweep / str(number))
    assert outcome(alone) == outcome(sweep / str(number))


def test_an_array_survives_what_befalls_its_jobs(
    slurm: Slurm, begin: Callable[..., subprocess.Popen[str]], commands: Commands, tmp_path: Path
) -> None:
    """USR2 as near the time limit, scontrol requeue, kill -9, scancel, and USR2 on top of a requeue."""
    sweep, printed = tmp_path / "sweep", tmp_path / "printed"
    launcher = begin("-m", *RUN, "seed=1,2,3,4,5", "cluster=slurm", *ASKED_FOR, f"hydra.sweep.dir={sweep}")

    def requeue_and_signal(job: str) -> None:
        # SLURM refuses what submitit asks for at the signal: the job is being requeued already.
        slurm.run("scontrol", "requeue", job)
        os.kill(process_of(sweep, 4), signal.SIGUSR2)

    befalls: dict[int, Callable[[str], object]] = {
        # As slurmstepd does. `scancel --signal` to one job of an array sends it, is told to try again, and does so for
        # half a minute: the next try of the job gets it, too, before it can handle it (SLURM 22.05).
        0: lambda _: os.kill(process_of(sweep, 0), signal.SIGUSR2),
        1: lambda job: slurm.run("scontrol", "requeue", job),
        2: lambda _: os.kill(process_of(sweep, 2), signal.SIGKILL),
        3: lambda job: slurm.run("scancel", job),
        4: requeue_and_signal,
    }
    while befalls:
        number = next((each for each in befalls if has_saved(sweep, each)), None)
        assert launcher.poll() is None or printed.read_text() == ""
        if number is None:
            time.sleep(0.02)
        else:
            befalls.pop(number)(f"{array(sweep)}_{number}")
    assert launcher.wait(900) == 1, printed.read_text()
    assert states(printed.read_text()) == [
        ["0", "done", "2"], ["1", "done", "2"], ["2", "interrupted", "1"], ["3", "interrupted", "1"],
        ["4", "done", "2"],
    ]  # fmt: skip
    assert printed.read_text().splitlines()[-1] == "pusht-act: 2 of 5 jobs are not done"
    assert f"to resume: pusht-act -m sweep.resume={sweep}" in printed.read_text()
    assert "#SBATCH --array=0-4%5" in next((sweep / ".submitit").rglob("*_submission.sh")).read_text()

    assert begin("-m", f"sweep.resume={sweep}").wait(900) == 0, printed.read_text()
    assert states(printed.read_text()) == [
        ["0", "done", "2"], ["1", "done", "2"], ["2", "done", "2"], ["3", "done", "2"], ["4", "done", "2"],
    ]  # fmt: skip
    assert [ran(sweep / str(number)) for number in range(5)] == [2, 2, 2, 2, 2]
    for number in range(5):
        same_as_undisturbed(commands, sweep, number, number + 1, tmp_path)


def test_a_job_that_another_partition_preempts_goes_on_without_its_launcher(
    slurm: Slurm, begin: Callable[..., subprocess.Popen[str]], commands: Commands, tmp_path: Path
) -> None:
    sweep, printed = tmp_path / "sweep", tmp_path / "printed"
    whole_node = [*ASKED_FOR, "hydra.launcher.cpus_per_task=2"]
    launcher = begin("-m", *RUN, "seed=7", "cluster=slurm", *whole_node, f"hydra.sweep.dir={sweep}")
    until(lambda: has_saved(sweep, 0), "no checkpoint", tmp_path)
    slurm.run("sbatch", "-p", "high", "-o", "/dev/null", "--wrap", "sleep 1")
    launcher.kill()
    launcher.wait()
    # The launcher's death is nothing to the job: another one finds it at work, or done.
    until(lambda: load_jobs(sweep)[0].tries == 2, "not queued again", tmp_path)
    until(lambda: load_jobs(sweep)[0].state == "done", "not done", tmp_path)
    assert begin("-m", f"sweep.resume={sweep}").wait(900) == 0, printed.read_text()
    assert states(printed.read_text()) == [["0", "done", "2"]]
    same_as_undisturbed(commands, sweep, 0, 7, tmp_path)


def test_what_slurm_refuses_is_one_line(
    begin: Callable[..., subprocess.Popen[str]], slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = tmp_path / "printed"
    command = ["-m", *RUN, "seed=1,2", "cluster=slurm", *ASKED_FOR, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert begin(*command, "hydra.launcher.partition=nowhere").wait(300) == 1
    assert re.search(r"pusht-act: .*invalid partition specified: nowhere.*partition=", printed.read_text())
    assert "Traceback" not in printed.read_text()

    elsewhere = tmp_path / "bin"
    elsewhere.mkdir()
    for name in ("git", "hostname"):
        (elsewhere / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setitem(slurm.environment, "PATH", str(elsewhere))
    assert begin(*command).wait(300) == 1
    assert "pusht-act: the sweep's jobs could not be started: there is no SLURM on this machine" in printed.read_text()
    assert "Traceback" not in printed.read_text()


def test_the_script_shown_is_the_one_submitted(
    begin: Callable[..., subprocess.Popen[str]], slurm: Slurm, tmp_path: Path
) -> None:
    sweep, printed = tmp_path / "sweep", tmp_path / "printed"
    command = ["-m", *RUN, "steps=2", "seed=1,2", "cluster=slurm", *ASKED_FOR, f"hydra.sweep.dir={sweep}"]
    command += ["hydra.launcher.setup=['export GREETING=hello']", "hydra.launcher.array_parallelism=1"]
    assert begin(*command, "cluster.dry_run=true").wait(300) == 0
    shown = printed.read_text()
    assert not sweep.exists()
    launcher = begin(*command)
    until(lambda: list(sweep.rglob("*_submission.sh")), "nothing submitted", tmp_path)
    assert next(sweep.rglob("*_submission.sh")).read_text().strip() == shown.strip()
    launcher.kill()
