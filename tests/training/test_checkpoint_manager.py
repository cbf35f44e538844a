"""Checkpoints written beside training: those of a run that waits, also when it is killed or a disk fails."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lerobot.common.train_utils import save_training_state

import pusht_act
from pusht_act.checkpoints import checkpoint_io as checkpoints
from pusht_act.checkpoints.checkpoint import latest_valid
from pusht_act.checkpoints.manifest import find_corruption, write_manifest
from pusht_act.job import Result
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.signals import StopSignal
from pusht_act.training import train_step as step_module
from pusht_act.training.checkpoint_manager import CheckpointManager
from tests.helpers.evaluations import OPTIONS, Killed, Late, outcome
from tests.helpers.runs import TINY
from tests.helpers.training import assert_same_bits, metrics

pytestmark = pytest.mark.slow

Tiny = Callable[..., Result]


class Slow:
    """A save is whole `lag` steps after its own, or when it is waited for; one under way dies with the training."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lag = 0
        self.steps_meanwhile: list[int] = []
        self.fails: set[int] = set()
        self._of, self._step, self._dead = 0, 0, False
        self._open = threading.Event()
        self._snapshot, self._write_manifest = checkpoints.snapshot, write_manifest
        self._train_step = step_module.train_step
        patch.setattr(checkpoints, "snapshot", self.snapshot)
        patch.setattr(checkpoints, "write_manifest", self.write_manifest)
        patch.setattr(step_module, "train_step", self.train_step)
        patch.setattr(CheckpointManager, "wait", self.waiting(CheckpointManager.wait))

    def snapshot(self, objects: Any, state: Any, to_cpu: bool) -> Any:
        self._of = self._step = state.step
        self._dead = False
        self._open.clear()
        return self._snapshot(objects, state, to_cpu)

    def write_manifest(self, folder: Path) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert self._open.wait(30)
        if self._dead:
            raise Killed
        if self._of in self.fails:
            raise OSError(28, "No space left on device")
        self.steps_meanwhile.append(self._step - self._of)
        self._write_manifest(folder)

    def train_step(self, *arguments: Any) -> Any:
        try:
            values = self._train_step(*arguments)
        except Killed:
            self._dead = True
            self._open.set()
            raise
        self._step += 1
        if self._step >= self._of + self.lag:
            self._open.set()
        return values

    def waiting(self, wait: Any) -> Any:
        def waits(manager: Any) -> None:
            self._open.set()
            wait(manager)

        return waits


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint, but for the option that is compared and the time that training took."""
    return {
        path.relative_to(run).as_posix(): re.sub(
            rb'"elapsed_s": [\d.e-]+',
            b'"elapsed_s": 0',
            path.read_bytes().replace(b'"background": false', b'"background": true'),
        )
        for path in sorted((run / "checkpoints").rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


SAVING = ["steps=7", "save_freq=2", "eval_freq=3", "eval.background=false", "env.episode_length=40"]
SCHEDULED = "+scheduler={type: cosine_annealing_with_warmup, num_warmup_steps: 2}"


def test_the_files_are_those_of_a_run_that_waits_and_lerobots(tiny: Tiny, slow: Slow, tmp_path: Path) -> None:
    slow.lag = 9
    ours = checkpoints.snapshot

    def with_lerobots(objects: Any, state: Any, to_cpu: bool) -> Any:
        folder = tmp_path / "lerobots" / f"{state.step:06d}"
        objects.policy.save_pretrained(folder / "pretrained_model")
        save_training_state(folder, state.step, objects.optimizer, objects.scheduler, 1, 4)
        return ours(objects, state, to_cpu)

    checkpoints.snapshot = with_lerobots  # type: ignore[assignment]  # `slow` puts it back
    beside = contents(tiny(*SAVING, SCHEDULED).output_dir)
    assert slow.steps_meanwhile == [1, 1, 2, 1, 0], "the next save and an evaluation wait for it"
    (tmp_path / "run").rename(tmp_path / "first")
    assert beside == contents(tiny(*SAVING, SCHEDULED, "checkpoints.background=false").output_dir)
    assert slow.steps_meanwhile[5:] == [0] * 5
    compared = 0
    for path in (tmp_path / "lerobots").rglob("*"):
        name = f"checkpoints/{path.relative_to(tmp_path / 'lerobots')}"
        if path.is_file() and name.split("/")[1] in ("000002", "000004", "000007"):  # those that stay
            assert path.read_bytes() == beside[name], path
            compared += 1
    assert compared == 3 * 7


def test_a_stop_amid_a_save_leaves_no_checkpoint_of_its_own_in_the_end(
    tiny: Tiny, slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.lag = 9
    train_step, steps = step_module.train_step, itertools.count(1)

    def stopped_at_3(*arguments: Any) -> Any:
        if next(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(step_module, "train_step", stopped_at_3)
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(StopSignal):
        tiny("steps=5", "save_freq=2")
    assert sorted(path.name for path in folder.glob("0*")) == ["000002", "000003"]
    pusht_act.run(["mode=resume", f"output_dir={tmp_path / 'run'}", "steps=5"])
    assert sorted(path.name for path in folder.glob("0*")) == ["000002", "000004", "000005"]


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that waits for each evaluation and each save."""
    run = tmp_path_factory.mktemp("waited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        Late(patch)
        waits = ["eval.background=false", "checkpoints.background=false"]
        pusht_act.run([*TINY, *OPTIONS, *waits, f"output_dir={run}"])
    return run


@pytest.mark.parametrize(("evaluation", "save"), [(1, 2), (2, 1), (2, 2)])
def test_killed_again_and_again_it_comes_to_the_same(
    evaluation: int, save: int, waited: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill leaves a save half-written, some an evaluation without its result too."""
    late = Late(monkeypatch)
    slow = Slow(monkeypatch)
    late.lag, late.kills, slow.lag = evaluation, {3, 4, 5, 6, 7, 8}, save
    run, stops, halves = tmp_path / "run", 0, 0
    while True:
        begun = latest_valid(RunDir(run))[0] is not None
        try:
            if begun:
                pusht_act.run(["mode=resume", f"output_dir={run}", "steps=8"])
            else:
                tiny(*OPTIONS, "overwrite=true")
            break
        except Killed:
            stops += 1
            halves += len(list((run / "checkpoints").glob(".*.part")))
            assert [find_corruption(path) for path in (run / "checkpoints").glob("0*")].count(None) == len(
                list((run / "checkpoints").glob("0*"))
            )
    assert stops == 6
    assert halves > 1
    assert_same_bits(waited, run)
    assert outcome(run) == outcome(waited)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("lag", [1, 2])
def test_what_was_not_saved_cannot_be_the_best(
    lag: int, waited: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The evaluation's result is there before the save is known to have failed, and the other way round."""
    late = Late(monkeypatch)
    slow = Slow(monkeypatch)
    best = outcome(waited)["best"]
    slow.fails = {int(best)}
    for late.lag, slow.lag in ((lag, 3 - lag), (0, lag)):
        run = tiny(*OPTIONS, "overwrite=true").output_dir
        found = outcome(run)
        assert found["best"] in found["checkpoints"]
        assert found["best"] != best
        assert best not in found["checkpoints"]
        assert metrics(run, "eval/") == metrics(waited, "eval/")
    (warning, *_) = [record.getMessage() for record in caplog.records if "cannot be saved" in record.getMessage()]
    assert warning.startswith(f"step {int(best)}: ")
    assert warning.endswith("; training continues and the next save tries again")


@pytest.mark.parametrize("error", [ValueError("something else"), KeyboardInterrupt()], ids=repr)
def test_a_save_under_way_is_finished_where_an_error_ends_the_run(
    error: BaseException, tiny: Tiny, slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.lag, step, count = 9, step_module.train_step, 0

    def failing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise error
        return step(*arguments)

    monkeypatch.setattr(step_module, "train_step", failing)
    with pytest.raises(type(error)):
        tiny("save_freq=2")
    last = tmp_path / "run" / "checkpoints" / "last"
    assert last.resolve().name == "000002"
    assert find_corruption(last) is None
    assert slow.steps_meanwhile == [1]


def test_killed_for_real_amid_a_save_it_comes_to_the_same(tiny: Tiny, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ["steps=400", "save_freq=1", "log_freq=50", "checkpoints.keep_last=3"]
    training = subprocess.Popen(
        [sys.executable, "-m", "pusht_act", *TINY, f"output_dir={run}", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = run / "checkpoints"
    while not (folder / "000003").is_dir() or not list(folder.glob(".*.part")):
        assert training.poll() is None
        time.sleep(0.001)
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    last = int((folder / "last").resolve().name)
    assert last >= 3
    assert {find_corruption(path) for path in folder.glob("0*")} == {None}
    end = last + 1
    pusht_act.run(["mode=resume", f"output_dir={run}", f"steps={end}"])
    assert not list(folder.glob(".*"))
    whole = tiny(*options, f"steps={end}", f"output_dir={tmp_path / 'whole'}").output_dir
    assert_same_bits(whole, run)
    shutil.rmtree(run)
