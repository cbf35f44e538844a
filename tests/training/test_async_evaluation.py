"""Evaluation beside training: the numbers, checkpoints and files of a run that waits, also when it is killed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pusht_act
from pusht_act.checkpoints import checkpoint_io as checkpoints
from pusht_act.evaluation.records import Evaluation
from pusht_act.job import Result
from pusht_act.training import async_evaluation as evaluations
from tests.helpers.evaluations import OPTIONS, Killed, Late, outcome
from tests.helpers.training import assert_same_bits, metrics

pytestmark = pytest.mark.slow

Tiny = Callable[..., Result]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    return Late(monkeypatch)


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that waits for each evaluation."""
    from tests.helpers.runs import TINY

    run = tmp_path_factory.mktemp("waited") / "run"
    with pytest.MonkeyPatch.context() as patch:
        Late(patch)
        pusht_act.run([*TINY, *OPTIONS, "eval.background=false", f"output_dir={run}"])
    assert outcome(run)["checkpoints"] == ["000003", "000004", "000006", "000008", "best", "last"]
    return run


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
    assert "the evaluation of step 2 was interrupted and is left out" in caplog.text


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
