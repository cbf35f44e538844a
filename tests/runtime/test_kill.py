"""Training that is killed or stopped at any moment comes to the same bits, and no process outlives it."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from benchmarks.torture import COMMAND, LONGEST, Plan, torture
from tests.helpers.commands import Commands, appears
from tests.helpers.processes import gone
from tests.helpers.runs import tiny_command

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 15), (signal.SIGTERM, 6)], ids=["KILL", "TERM"])
def test_killed_again_and_again_it_comes_to_the_same_bits(number: int, kills: int, tmp_path: Path) -> None:
    tally = torture(tmp_path, Plan(COMMAND, LONGEST, kills, random.Random(1), number))
    assert sum(tally.kills.values()) == kills


def children(pid: int) -> list[int]:
    below = [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]
    return [*below, *(each for child in below for each in children(child))]


TRAINING = tiny_command("steps=100000", "eval_freq=1000000", "eval.workers=2")
DEMOS = ["mode=demos", "env=pusht_keypoints", "demos.workers=2", "demos.n_episodes=500"]


@pytest.mark.parametrize(("words", "at"), [(TRAINING, "step 2/"), (DEMOS, "planning 500")], ids=["training", "demos"])
def test_no_worker_outlives_a_killed_job(words: list[str], at: str, commands: Commands, tmp_path: Path) -> None:
    output = tmp_path / "output"
    pid = commands.start([*words, f"output_dir={tmp_path / 'run'}"], output)
    appears(output, at, seconds=120)
    deadline = time.monotonic() + 300
    while len(workers := children(pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert commands.wait(pid) == -signal.SIGKILL
    assert all(gone(worker) for worker in workers)


def test_a_job_that_is_stopped_leaves_no_worker_either(commands: Commands, tmp_path: Path) -> None:
    output = tmp_path / "output"
    pid = commands.start([*TRAINING, f"output_dir={tmp_path / 'run'}"], output)
    appears(output, "step 2/")
    workers = children(pid)
    assert len(workers) == 2
    os.kill(pid, signal.SIGTERM)
    assert commands.wait(pid) == 128 + signal.SIGTERM
    assert all(gone(worker) for worker in workers)
