"""W&B's server failing, hanging or gone, its process killed: training goes on, and nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pusht_act.runs import wandb_logger
from pusht_act.runs.loggers import LoggerCollection
from pusht_act.runs.run_dir import RunDir
from tests.helpers.commands import Commands
from tests.helpers.config import config
from tests.helpers.runs import tiny_command
from tests.helpers.wandb_runs import forget_settings, history, lines
from tests.helpers.wandb_server import NOT_HELD_S, Server

pytestmark = pytest.mark.slow

STEPS = 200


def services() -> set[int]:
    """W&B's processes among ours."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = {int(pid) for path in children for pid in path.read_text().split()}
    return {pid for pid in pids if "wandb" in Path(f"/proc/{pid}/cmdline").read_text()}


@pytest.mark.parametrize("broken", ["hangs", "says 500"])
def test_a_server_that_breaks_amid_a_run_does_not_hold_it_up(
    broken: str, tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with LoggerCollection(config("wandb.enable=true"), RunDir(tmp_path), 0, None) as metrics:
        metrics.log("train", {"loss": 0.5}, 1)
        server.broken = broken
        began = time.perf_counter()
        for step in range(2, STEPS + 1):
            metrics.log("train", {"loss": 0.5}, step)
        assert time.perf_counter() - began < NOT_HELD_S
        began = time.perf_counter()
    assert time.perf_counter() - began < NOT_HELD_S
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (file,) = (tmp_path / "wandb").glob("run-*/*.wandb")
    assert f"what it did not get is in {file.parent} (`wandb sync` sends that), metrics.jsonl has all" in warning
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in history(file)] == list(range(1, STEPS + 1))


def with_its_process_killed(root: Path) -> None:
    """A run whose W&B process is killed after its first step; prints the seconds that the others and the end took."""
    wandb_logger.WANDB_FINISH_S = 3.0
    with LoggerCollection(config("wandb.enable=true"), RunDir(root), 0, None) as metrics:
        metrics.log("train", {"loss": 0.5}, 1)
        for pid in services():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        began = time.perf_counter()
        for step in range(2, STEPS + 1):
            metrics.log("train", {"loss": 0.5}, step)
        logged = time.perf_counter()
    print(logged - began, time.perf_counter() - logged, flush=True)
    os._exit(0)  # W&B's own hook would wait for its process


def test_its_own_process_killed_does_not_hold_a_run_up(tmp_path: Path, server: Server) -> None:
    # In a process of its own: W&B's client is of no use to anybody after this.
    code = f"import pathlib, tests.runs.test_services as t; t.with_its_process_killed(pathlib.Path({str(tmp_path)!r}))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    logging_s, finishing_s = map(float, done.stdout.split()[-2:])
    assert logging_s < NOT_HELD_S
    assert finishing_s < NOT_HELD_S
    (file,) = (tmp_path / "wandb").glob("run-*/*.wandb")
    assert done.stderr.count(f"what it did not get is in {file.parent} (`wandb sync` sends that)") == 1
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("broken", "reason"), [("hangs", "cannot be reached (timed out)"), ("says 500", "answers 500")]
)
def test_a_server_that_is_broken_from_the_start_puts_the_run_offline(
    broken: str, reason: str, tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.broken = broken
    began = time.perf_counter()
    with caplog.at_level("INFO"), LoggerCollection(config("wandb.enable=true"), RunDir(tmp_path), 0, None) as metrics:
        metrics.log("train", {"loss": 0.5}, 1)
    assert time.perf_counter() - began < NOT_HELD_S
    assert f"{reason}, so the run is kept here" in caplog.text
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [row["step"] for row in history(file)] == [1]


def test_its_own_process_that_does_not_start_does_not_stop_a_run(commands: Commands, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    environment = {
        "WANDB__SERVICE_WAIT": "0",  # less than it needs
        "WANDB_SENTRY_DSN": "http://key@127.0.0.1:9/1",  # where nobody takes W&B's report of it
    }
    arguments = tiny_command("wandb.enable=true", f"output_dir={run}")
    assert commands.wait(commands.start(arguments, output, environment)) == 0
    (warning,) = [line for line in output.read_text().splitlines() if "WARNING" in line]
    assert "W&B: Failed to read port info" in warning
    assert warning.endswith("the run continues without it, metrics.jsonl has all of it")
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_whose_process_does_not_start_keeps_its_id(
    tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "0")
    forget_settings(monkeypatch)
    with LoggerCollection(config("wandb.enable=true"), RunDir(tmp_path), 0, "former") as metrics:
        assert metrics.wandb_run_id == "former"
