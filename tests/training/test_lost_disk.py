"""A disk that is full at an evaluation, and a run directory that is moved away amid training."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pusht_act
from pusht_act.evaluation import evaluate as module
from pusht_act.job import Result
from pusht_act.training import trainer
from tests.helpers.evaluations import outcome

Tiny = Callable[..., Result]
OPTIONS = ("steps=6", "eval_freq=2", "save_freq=2", "env.episode_length=12")


@pytest.mark.slow
@pytest.mark.parametrize("background", ["true", "false"])
def test_an_evaluation_that_the_disk_does_not_take_is_a_warning_and_done_at_the_next_start(
    background: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = (*OPTIONS, f"eval.background={background}")
    whole = tiny(*options, f"output_dir={tmp_path / 'whole'}").output_dir
    store, calls = module._store, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        store(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_store", full)
        run = tiny(*options).output_dir
    assert "step 4: " in caplog.text
    assert "cannot be written (No space left on device): make room" in caplog.text
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6"])
    assert outcome(run) == outcome(whole)


@pytest.mark.slow
def test_a_run_that_is_moved_away_is_not_written_in_two_places(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = trainer.Trainer.update_metrics

    def moving(self: trainer.Trainer, *arguments: Any) -> None:
        if self.step == 1:
            (tmp_path / "run").rename(tmp_path / "moved")
        step(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "update_metrics", moving)
    with pytest.raises(OSError, match=r"output_dir=.*/run was moved or deleted while it is written: move it back"):
        tiny(*OPTIONS)
    assert "step 2: output_dir=" in caplog.text
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "moved" / "metrics.jsonl").is_file()
