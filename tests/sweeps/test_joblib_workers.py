"""hydra/launcher=joblib: jobs side by side, the machine divided; told to stop or left alone, they save and leave."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.system import JOBS, cores
from pusht_act.sweeps.state import Job, load_jobs
from tests.helpers.runs import tiny_command
from tests.helpers.sweeps import states

JOBLIB = ["policy.device=cpu", "hydra/launcher=joblib"]


class Launcher:
    """A sweep of the command's in a session of its own, on two GPUs of which there is no sign but their numbers."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.output = folder, folder.with_suffix(".output")
        environment = os.environ | {"PUSHT_ACT_CACHE": str(folder.with_suffix(".cache")), "CUDA_VISIBLE_DEVICES": "5,7"}
        del environment["OMP_NUM_THREADS"]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pusht_act", "-m", *overrides],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
            )  # fmt: skip

    def halted(self, *numbers: int) -> list[Job]:
        """Those jobs, each halted early in its training loop, however far apart they came to it."""
        awaited, deadline = set(numbers), time.monotonic() + 240
        while awaited:
            for number in list(awaited):
                metrics = self.folder / str(number) / "metrics.jsonl"
                if metrics.exists() and '"step": 2,' in metrics.read_text():
                    os.kill(load_jobs(self.folder)[number].holder["pid"], signal.SIGSTOP)
                    awaited.remove(number)
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.002)
        return [job for job in load_jobs(self.folder) if job.state == "running"]

    @staticmethod
    def let_go(halted: list[Job]) -> None:
        for job in halted:
            os.kill(job.holder["pid"], signal.SIGCONT)

    def ended(self, by: signal.Signals) -> int:
        """Its exit code after this signal."""
        self.process.send_signal(by)
        return self.process.wait(120)

    def left_behind(self) -> list[str]:
        """Processes of its session, waited for to end, for five minutes at most."""
        deadline = time.monotonic() + 300
        while (alive := list(self._session())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def _session(self) -> Iterator[str]:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "stat").read_text().rpartition(")")[2].split()
                if int(words[3]) == self.process.pid and words[0] not in "ZX":
                    yield (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
            try:
                if os.getsid(pid) == self.process.pid:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def mapped(job: Job) -> dict[str, tuple[str, int, int]]:
    """The arrays of the cache that a job has mapped: inode, resident and proportional size in kB."""
    found: dict[str, tuple[str, int, int]] = {}
    for part in re.split(r"\n(?=[0-9a-f]+-)", Path(f"/proc/{job.holder['pid']}/smaps").read_text()):
        head, *rest = part.splitlines()
        if head.endswith(".npy"):
            size = {line.split()[0]: int(line.split()[1]) for line in rest if line.endswith(" kB")}
            found[Path(head.split()[-1]).name] = (head.split()[4], size["Rss:"], size["Pss:"])
    return found


@pytest.mark.slow
def test_jobs_share_data_cores_and_gpus_and_end_with_their_launcher(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = tiny_command("steps=3000", "log_freq=2", "policy.n_heads=3,4", "seed=1,2", *JOBLIB)
    with Launcher(folder, *command, f"hydra.sweep.dir={folder}") as launcher:
        under_way = launcher.halted(2, 3)
        maps = [mapped(job) for job in under_way]
        assert launcher.ended(signal.SIGKILL) == -signal.SIGKILL
        launcher.let_go(under_way)
        assert launcher.left_behind() == []
    assert [job.number for job in under_way] == [2, 3]
    assert under_way[0].holder["pid"] != under_way[1].holder["pid"]
    printed = launcher.output.read_text()
    told = re.findall(r"INFO job (\d): (\d+) of (\d+) cores, GPU (\d)", printed)
    assert sorted(job for job, *_ in told) == ["0", "1", "2", "3"]
    assert {gpu for job, *_, gpu in told if job in "23"} == {"5", "7"}
    assert {(threads, of) for _, threads, of, _ in told} == {(str(max(1, cores() // 2)), str(cores() // 2 * 2))}

    # The cache was made once: neither has mapped a file that another has taken the place of, and pages count once.
    assert maps[0].keys() == maps[1].keys() != set()
    for name in maps[0]:
        (inode, rss, pss), (other, other_rss, other_pss) = maps[0][name], maps[1][name]
        assert inode == other
        assert pss + other_pss <= max(rss, other_rss) + 1, "kB, rounded"

    found = load_jobs(folder)
    assert [job.state for job in found] == ["failed", "failed", "interrupted", "interrupted"]
    saved = [int((folder / str(number) / "checkpoints" / "last").resolve().name) for number in (2, 3)]
    with Launcher(folder, f"sweep.resume={folder}") as again:
        assert again.process.wait(300) == 1
        assert again.left_behind() == []
    printed = again.output.read_text()
    assert states(printed) == [["0", "failed", "2"], ["1", "failed", "2"], ["2", "done", "2"], ["3", "done", "2"]]
    # A loaded machine may let one come to its last step before it is stopped.
    unfinished = sum(step < 3000 for step in saved)
    assert len(re.findall(r"job [23]: resuming from \S+/checkpoints/00\d{4}", printed)) == unfinished, (saved, printed)
    assert "pusht-act: 2 of 4 jobs are not done (job 0: policy.dim_model=32 is not a multiple" in printed
    assert [job.step for job in load_jobs(folder)] == [None, None, 3000, 3000]


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_its_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = tiny_command("steps=1000000", "log_freq=2", "seed=1,2,3", *JOBLIB)
    with Launcher(folder, *command, f"hydra.sweep.dir={folder}") as launcher:
        launcher.let_go(launcher.halted(0, 1))
        assert launcher.ended(signal.SIGTERM) == 143
        assert launcher.left_behind() == []
    printed = launcher.output.read_text()
    assert states(printed) == [["0", "interrupted", "1"], ["1", "interrupted", "1"], ["2", "waiting", "0"]]
    assert len(re.findall(r"job [01]: stopped by SIGTERM after step \d+, saved", printed)) == 2
    assert printed.splitlines()[-1] == "pusht-act: stopped by SIGTERM"
    assert "Traceback" not in printed
    assert all(RunDir(folder / str(number)).has_checkpoints() for number in (0, 1))


def test_a_job_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    there = len(os.sched_getaffinity(0))
    assert cores() == there
    monkeypatch.setenv(JOBS, str(there))
    assert cores() == 1
    monkeypatch.setenv(JOBS, str(2 * there))
    assert cores() == 1
