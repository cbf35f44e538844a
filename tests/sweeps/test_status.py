"""mode=status: how the jobs of a sweep, or one run, are getting on, from their files alone."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import pusht_act
from pusht_act.runtime.lock import LockOwner
from pusht_act.sweeps.state import Job
from tests.helpers.commands import Commands, appears
from tests.helpers.runs import tiny_command

HERE = LockOwner()
ELSEWHERE = replace(HERE, host="node7", boot="another")
METRICS = [
    {"step": 100, "train/loss": 1.0, "train/samples_per_s": 80.0},
    {"step": 100, "eval/pc_success": 50.0},
    {"step": 200, "train/loss": 0.5, "train/samples_per_s": 40.0},
    {"step": 200, "eval/loss": 0.5},
    {"step": 200, "eval/pc_success": 25.0},
]


def rows(printed: str) -> list[dict[str, str]]:
    """The table, by column."""
    lines = [[cell.strip() for cell in line.split("|")[1:]] for line in printed.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"[-: |]+", "|".join(lines[1])), "Markdown's separator"
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], list[dict[str, str]]]:
    """The table of a folder; nothing in it is changed."""

    def status(directory: Path) -> list[dict[str, str]]:
        before = {path: path.lstat().st_mtime_ns for path in directory.rglob("*")}
        capsys.readouterr()
        pusht_act.run(["mode=status", f"dir={directory}"])
        assert {path: path.lstat().st_mtime_ns for path in directory.rglob("*")} == before
        return rows(capsys.readouterr().out)

    return status


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The folder of a sweep of six jobs, none of them begun."""
    grid = [["mode=test", f"seed={number}"] for number in range(6)]
    (tmp_path / "sweep.json").write_text(json.dumps({"overrides": [], "jobs": grid}))
    (tmp_path / "jobs").mkdir()
    return tmp_path


def begin(sweep: Path, number: int, state: str = "running", holder: LockOwner = HERE, **more: Any) -> Path:
    """Job `number` as its process writes it down, which has made nothing yet; its run directory."""
    run = sweep / str(number)
    run.mkdir(exist_ok=True)
    known = Job(number, [f"seed={number}"], state, 1, output_dir=str(run), holder=asdict(holder), **more)
    (sweep / "jobs" / f"{number}.json").write_text(json.dumps(asdict(known)))
    return run


def trained(run: Path) -> None:
    """200 of 1,000 steps, and a line that is being written."""
    (run / "config.yaml").write_text("mode: test\nsteps: 1000\nbatch_size: 4\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS) + '{"step": 300, "trai')


@pytest.mark.slow
def test_a_real_sweep_while_it_runs_and_after_its_process_was_killed(
    commands: Commands, tmp_path: Path, status: Callable[[Path], list[dict[str, str]]]
) -> None:
    folder, given, output = tmp_path / "sweep", tmp_path / "given", tmp_path / "output"
    command = tiny_command("steps=5,100000,4", "eval_freq=100000", f"output_dir={given}/${{steps}}")
    pid = commands.start(["-m", *command, f"hydra.sweep.dir={folder}"], output)
    appears(given / "100000" / "metrics.jsonl", '"step": 8,')
    os.kill(pid, signal.SIGSTOP)  # so that it is running, and no further
    try:
        done, running, waiting = status(folder)
        (alone,) = status(given / "100000")
        (finished,) = status(given / "5")
    finally:
        os.kill(pid, signal.SIGKILL)
    commands.wait(pid)
    assert [row["state"] for row in (done, running, waiting)] == ["done", "running", "waiting"]
    assert [row["tries"] for row in (done, running, waiting)] == ["1", "1", "0"]
    assert (done["step"], done["success"], done["best"], done["host"]) == ("5 / 5", "0.0 %", "0.0 %", HERE.host)
    assert re.fullmatch(r"\d+ / 100,000", running["step"])
    assert float(running["steps/s"]) > 0
    assert re.fullmatch(r"\d+:\d\d:\d\d", running["left"])
    assert (done["left"], waiting["step"], waiting["host"]) == ("", "", "")
    own = [row["overrides"].split()[0] for row in (done, running, waiting)]
    assert own == ["steps=5", "steps=100000", "steps=4"]
    assert (alone["state"], alone["tries"], alone["step"]) == ("running", "1", running["step"])
    assert "mode=test" in alone["overrides"]
    assert (finished["state"], finished["step"], finished["success"]) == ("done", "5 / 5", "0.0 %")

    assert [row["state"] for row in status(folder)] == ["done", "interrupted", "waiting"]
    (killed,) = status(given / "100000")
    assert (killed["state"], killed["step"], killed["left"]) == ("interrupted", running["step"], "")


def test_step_rate_time_left_and_scores(sweep: Path, status: Callable[[Path], list[dict[str, str]]]) -> None:
    trained(begin(sweep, 0))
    first = status(sweep)[0]
    assert (first["step"], first["steps/s"], first["left"]) == ("200 / 1,000", "10.0", "0:01:20")
    assert (first["success"], first["best"]) == ("25.0 %", "50.0 %")


def test_every_state_is_shown_whatever_is_missing(sweep: Path, status: Callable[[Path], list[dict[str, str]]]) -> None:
    begin(sweep, 0)  # it has only just begun
    other, silent = (begin(sweep, number, holder=ELSEWHERE) for number in (1, 2))
    for run, ago in ((other, 10), (silent, 1000)):
        (run / "lock").write_text(json.dumps(asdict(ELSEWHERE)))
        for path in (run / "lock", sweep / "jobs" / f"{run.name}.json"):
            os.utime(path, (time.time() - ago,) * 2)
    trained(begin(sweep, 3, "pruned", step=150, objective=12.5))
    (sweep / "jobs" / "4.json").write_text('{"number": 4, "sta')
    gone = begin(sweep, 5, "failed", error="no room")
    gone.rmdir()
    found = status(sweep)
    assert [row["state"] for row in found] == ["running", "running", "interrupted", "pruned", "interrupted", "failed"]
    assert [row["host"] for row in found] == [HERE.host, "node7", "node7", HERE.host, "", HERE.host]
    assert (found[0]["step"], found[3]["step"], found[3]["success"]) == ("", "150 / 1,000", "12.5 %")
    (sweep / "jobs" / "0.json").write_text(json.dumps({**asdict(Job(0, [], "running")), "holder": {"pit": 3}}))
    assert status(sweep)[0]["state"] == "interrupted"


def test_a_sweep_that_was_moved_is_read_where_it_is(
    sweep: Path, tmp_path_factory: pytest.TempPathFactory, status: Callable[[Path], list[dict[str, str]]]
) -> None:
    trained(begin(sweep, 0, "interrupted"))
    moved = sweep.rename(tmp_path_factory.mktemp("elsewhere") / "sweep")
    assert status(moved)[0]["step"] == "200 / 1,000"


@pytest.mark.parametrize(("checkpoint", "state"), [(None, "interrupted"), ("1000", "done"), ("last", "interrupted")])
def test_the_state_of_a_run_without_a_lock(
    checkpoint: str | None, state: str, tmp_path: Path, status: Callable[[Path], list[dict[str, str]]]
) -> None:
    trained(tmp_path)
    if checkpoint is not None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last").symlink_to(checkpoint)  # "last": to itself
    assert [row["state"] for row in status(tmp_path)] == [state]


def test_a_damaged_sweep_is_named_in_a_line(sweep: Path) -> None:
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="sweep.json is damaged"):
        pusht_act.run(["mode=status", f"dir={sweep}"])


class Terminal:
    """The command on a terminal of 60 columns and 8 lines."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 8, 60, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        words = [sys.executable, "-m", "pusht_act", *arguments]
        # A job that a shell puts in the background is born with SIGINT ignored, and so are its children.
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (one thread at this point)
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def until(self, text: str | None, times: int = 1) -> str:
        """All it has shown when `text` was there so many times; None: when it has ended."""
        while text is None or self.shown.count(text) < times:
            try:
                self.shown += os.read(self._ours, 1 << 16).decode()
            except OSError:  # its end of the terminal is closed
                break
        assert text is None or text in self.shown, self.shown
        return self.shown.replace("\r\n", "\n")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.mark.slow
def test_on_a_terminal_it_is_drawn_again_until_all_have_ended(sweep: Path) -> None:
    for number in range(6):
        begin(sweep, number, "done" if number < 4 else "running", step=7)
    with Terminal("mode=status", f"dir={sweep}", "status.every=0.1") as terminal:
        live = terminal.until("2 running", times=3)
        for number in (4, 5):
            begin(sweep, number, "failed", error="no room")
        last = terminal.until(None).rpartition("\x1b[J")[2]
        assert terminal.process.wait(60) == 0
    assert "\x1b[7F\x1b[J" in live
    one = live.split("\x1b[J")[1]
    assert "6 jobs: 4 done, 2 running; 2 of them" in one
    assert [row["job"] for row in rows(one)] == ["2", "3", "4", "5"]
    assert max(len(line) for line in one.splitlines()) < 60
    assert [row["job"] for row in rows(last)] == ["0", "1", "2", "3", "4", "5"]
    assert "job 5 failed: no room" in last


def test_ctrl_c_leaves_it(sweep: Path) -> None:
    begin(sweep, 0)
    with Terminal("mode=status", f"dir={sweep}") as terminal:
        terminal.until("1 running")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.until(None).splitlines()[-1].endswith("pusht-act: stopped by SIGINT")  # amid a line, perhaps
        assert terminal.process.wait(60) == 130


@pytest.mark.slow
def test_elsewhere_and_with_every_0_it_is_drawn_once(sweep: Path, in_tmp: Path) -> None:
    begin(sweep, 0)
    piped = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pusht_act", "mode=status", f"dir={sweep}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert piped.stdout.startswith("6 jobs: 1 running, 5 waiting\n")
    assert "\x1b" not in piped.stdout
    imported = {line.rpartition("|")[2].strip() for line in piped.stderr.splitlines()}
    assert {"torch", "lerobot", "gym_pusht", "wandb"} & imported == set()
    with Terminal("mode=status", f"dir={sweep}", "status.every=0") as terminal:
        assert len(rows(terminal.until(None))) == 6
        assert terminal.process.wait(60) == 0
