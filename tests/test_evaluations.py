"""Evaluation beside training: the numbers, checkpoints and files of a run that waits, also when it is killed."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pusht_act
from pusht_act.checkpoints import checkpoint_io as checkpoints
from pusht_act.evaluation.evaluate import Evaluation
from pusht_act.job import Result
from pusht_act.training import async_evaluation as evaluations
from pusht_act.training import train_step as step_module
from tests.test_train import assert_same_bits, metrics

Tiny = Callable[..., Result]
REWARDS = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.1}
"""Of the evaluations of these steps: the best comes to be so and is to stay so."""
OPTIONS = ["steps=8", "eval_freq=2", "save_freq=3", "env.episode_length=40", "policy.optimizer_lr=1e-2"]


class Killed(BaseException):
    """As a signal, no error of the program's."""


class Late:
    """The result of a background evaluation comes after `lag` steps, to the step; training is killed before `kills`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lag, self.kills = 0, set[int]()
        self.threads: list[str] = []
        self.steps_meanwhile: list[int] = []
        self._step, self._asked = 0, 0
        self._open, self._done = threading.Event(), threading.Event()
        self._evaluate, self._train_step = evaluations.evaluate, step_module.train_step
        patch.setattr(evaluations, "evaluate", self.evaluate)
        patch.setattr(step_module, "train_step", self.train_step)
        patch.setattr(evaluations.Evaluations, "_start", self.starting(evaluations.Evaluations._start))

    def starting(self, start: Any) -> Any:
        def started(evaluations: Any, step: int, policy: Any) -> None:
            self._asked = step
            self._open.clear()
            self._done.clear()
            start(evaluations, step, policy)

        return started

    def evaluate(self, policy: Any, processors: Any, *arguments: Any, **options: Any) -> Evaluation:
        self.processors = processors
        here = threading.current_thread()
        self.threads.append(here.name)
        if here is not threading.main_thread() and self.lag:
            self._open.wait(10)
        self.steps_meanwhile.append(self._step - self._asked)
        try:
            evaluation = self._evaluate(policy, processors, *arguments, **options)
        finally:
            self._done.set()
        reward = REWARDS.get(self._asked, 0.0)
        return replace(evaluation, episodes=[replace(each, max_reward=reward) for each in evaluation.episodes])

    def train_step(self, objects: Any, *arguments: Any) -> Any:
        self.of_training = objects.processors
        states = list(objects.optimizer.state.values())
        step = int(states[0]["step"]) + 1 if states else 1
        if step in self.kills:
            self.kills.remove(step)
            self._open.set()
            raise Killed
        values = self._train_step(objects, *arguments)
        self._step = step
        if self._asked and step >= self._asked + self.lag:
            self._open.set()
            if self.lag < 2:  # the evaluation after two steps waits for the one before itself
                self._done.wait(10)
        return values


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    return Late(monkeypatch)


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that waits for each evaluation."""
    from tests.conftest import TINY

    run = tmp_path_factory.mktemp("waited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        Late(patch)
        pusht_act.run([*TINY, *OPTIONS, "eval.background=false", f"output_dir={run}"])
    assert outcome(run)["checkpoints"] == ["000003", "000004", "000006", "000008", "best", "last"]
    return run


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves behind but times and the order of lines."""
    folder = run / "checkpoints"
    state = json.loads((folder / "last/training_state/pusht_act.json").read_text())
    return {
        "metrics": sorted((line["step"], sorted(line.items())) for line in metrics(run, "")),
        "episodes": {path.parent.name: path.read_text() for path in run.glob("eval/*/episodes.csv")},
        "checkpoints": sorted(path.name for path in folder.iterdir()),
        "best": (folder / "best").resolve().name,
        "last": (folder / "last").resolve().name,
        "state": {key: state[key] for key in ("step", "best", "pending")},
    }


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_numbers_are_those_of_a_run_that_waits(lag: int, waited: Path, tiny: Tiny, late: Late) -> None:
    late.lag = lag
    result = tiny(*OPTIONS)
    assert late.threads == ["evaluation_0"] * 3 + ["MainThread"], "the last is waited for anyway"
    assert not lag or late.steps_meanwhile[:3] == [lag] * 3
    assert late.processors.pre is not late.of_training.pre, "they keep the batch at hand in themselves"
    assert result.episodes
    assert_same_bits(waited, result.output_dir)
    assert outcome(result.output_dir) == outcome(waited)


def test_a_run_can_wait(tiny: Tiny, late: Late) -> None:
    tiny(*OPTIONS, "eval.background=false", "steps=4")
    assert late.threads == ["MainThread"] * 2


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_killed_again_and_again_it_comes_to_the_same(lag: int, waited: Path, tiny: Tiny, late: Late) -> None:
    """Before the result of an evaluation, after it and before the next save, after a save in between."""
    late.lag, late.kills = lag, {3, 4, 5, 6, 7, 8}
    run = waited.parent / f"killed-{lag}"
    with pytest.raises(Killed):
        tiny(*OPTIONS, f"output_dir={run}")
    for _ in range(5):
        with pytest.raises(Killed):
            pusht_act.run(["mode=resume", f"output_dir={run}", "steps=8"])
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=8"])
    assert_same_bits(waited, run)
    assert outcome(run) == outcome(waited)


def test_what_stops_an_evaluation_stops_the_run_and_a_resume_does_it_again(
    waited: Path, tiny: Tiny, late: Late, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:

        def failing(*_: Any, **__: Any) -> Evaluation:
            late._done.set()
            raise OSError("a process of the evaluation was killed")

        patch.setattr(evaluations, "evaluate", failing)
        with pytest.raises(OSError, match="^a process of the evaluation was killed$"):
            tiny(*OPTIONS)
    run = tmp_path / "run"
    assert metrics(run, "train/")[-1]["step"] <= 4
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=8"])
    assert outcome(run) == outcome(waited)


def test_a_run_that_branches_off_evaluates_what_was_cut_short_if_it_is_there(
    tiny: Tiny, late: Late, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late.lag, late.kills = 2, {4}
    with pytest.raises(Killed):
        tiny(*OPTIONS)
    start, bare = tmp_path / "run/checkpoints/000003", tmp_path / "bare"
    shutil.copytree(start, bare)
    for path, new in ((start, tmp_path / "new"), (bare, tmp_path / "left-out")):
        pusht_act.run(["mode=resume", f"resume.path={path}", f"output_dir={new}", "steps=4"])
    assert [line["step"] for line in metrics(tmp_path / "new", "eval/")] == [2, 4]
    assert [line["step"] for line in metrics(tmp_path / "left-out", "eval/")] == [4]
    assert "the evaluation of step 2 was cut short and is left out" in caplog.text


def test_a_checkpoint_under_evaluation_is_not_removed_for_its_age(tiny: Tiny, late: Late, waited: Path) -> None:
    late.lag = 2
    run = tiny(*OPTIONS, "save_freq=1", "checkpoints.keep_last=1").output_dir
    best = outcome(waited)["best"]
    assert outcome(run)["best"] == best
    assert {path.name for path in (run / "checkpoints").iterdir()} == {best, "000008", "best", "last"}


def test_without_a_checkpoint_there_is_no_best(
    tiny: Tiny, late: Late, waited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, best = checkpoints.save, outcome(waited)["best"]

    def failing(run: Any, snapshot: Any, *rest: Any) -> Any:
        if snapshot.state.step == int(best):
            raise OSError("no room")
        return save(run, snapshot, *rest)

    monkeypatch.setattr(checkpoints, "save", failing)
    for lag, background in ((0, False), (0, True), (2, True)):
        late.lag = lag
        run = tiny(*OPTIONS, "overwrite=true", f"eval.background={background}").output_dir
        assert metrics(run, "eval/") == metrics(waited, "eval/")
        found = outcome(run)
        assert found["best"] in found["checkpoints"]
        assert found["best"] != best


def test_no_checkpoints_are_written_where_none_are_wanted(tiny: Tiny) -> None:
    run = tiny(*OPTIONS, "save_checkpoint=false").output_dir
    assert not (run / "checkpoints").exists()
    assert [line["step"] for line in metrics(run, "eval/")] == [2, 4, 6, 8]
