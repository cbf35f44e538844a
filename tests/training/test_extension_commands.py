"""The commands that are printed for a run with a caller's loss or transforms are Python that works."""

import functools
import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pusht_act
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import StopSignal
from tests.helpers.runs import tiny_command

HERE = __name__
Batch = dict[str, Tensor]


def huber(predicted: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    return F.huber_loss(predicted, target, reduction="none", delta=delta)


def noisy(batch: Batch) -> Batch:
    return {**batch, "observation.state": batch["observation.state"] + torch.randn(2)}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], str]:
    caplog.set_level(logging.INFO)

    def line(beginning: str) -> str:
        (found,) = [each for each in caplog.messages if each.startswith(beginning)]
        caplog.clear()
        return found.removeprefix(beginning)

    return line


@pytest.mark.slow
def test_the_commands_to_try_next_are_lines_of_python_that_work(said: Callable[[str], str], in_tmp: Path) -> None:
    functions: dict[str, Any] = {"loss": functools.partial(huber, delta=0.5), "transforms": [noisy, noisy]}
    names = {"functools": functools, "pusht_act": pusht_act, HERE.partition(".")[0]: __import__(HERE)}
    pusht_act.run(tiny_command("output_dir=run", "steps=1"), **functions)
    longer = said("to continue training: ")
    assert longer == (
        "pusht_act.run(['mode=resume', 'output_dir=run', 'steps=2'], "
        f"loss=functools.partial({HERE}.huber, delta=0.5), transforms=[{HERE}.noisy, {HERE}.noisy])"
    )
    assert eval(longer, names).step == 2
    pusht_act.run(tiny_command("output_dir=other", "steps=1"), **functions)
    several = said("to measure variance over seeds: ")
    result = eval(several, names)
    assert (result.step, str(result.output_dir)) == (1, "other_seed1001")
    started = json.loads((in_tmp / "other_seed1001" / "runs.jsonl").read_text())
    assert started["command"].endswith(several.partition("], ")[2])
    assert started["loss"] == f"functools.partial({HERE}.huber, delta=0.5)"
    assert started["transforms"] == [f"{HERE}.noisy"] * 2


def test_a_longer_run_is_one_of_the_same_functions(said: Callable[[str], str], in_tmp: Path) -> None:
    rates = ["+scheduler.peak_lr=1e-4", "+scheduler.decay_lr=1e-5"]
    lengths = ["+scheduler.num_warmup_steps=0", "+scheduler.num_decay_steps=1"]
    schedule = ["+scheduler.type=cosine_decay_with_warmup", *rates, *lengths]
    names = {"pusht_act": pusht_act, HERE.partition(".")[0]: __import__(HERE)}
    pusht_act.run(tiny_command("output_dir=run", "steps=1", *schedule), loss=huber)
    assert eval(said("to train twice as long: "), names).step == 2


class Stopping:
    """A transform that is sent a signal in the first step; its first call is the check."""

    def __init__(self) -> None:
        self.calls = 0

    def __repr__(self) -> str:
        return "Stopping()"

    def __call__(self, batch: Batch) -> Batch:
        self.calls += 1
        if self.calls == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch


def test_the_line_of_a_stopped_run_is_python_that_resumes_it(said: Callable[[str], str], in_tmp: Path) -> None:
    with pytest.raises(StopSignal):
        pusht_act.run(tiny_command("output_dir=run", "steps=3"), transforms=[Stopping()])
    line = said("stopped by SIGTERM after step 1, saved run/checkpoints/000001; to resume: ")
    assert line.endswith(f"'output_dir=run', 'steps=3'], transforms=[{HERE}.Stopping()])")
    # Made anew, it stops again in its first step.
    with pytest.raises(StopSignal) as stopped:
        eval(line, {"pusht_act": pusht_act, HERE.partition(".")[0]: __import__(HERE)})
    assert stopped.value.step == 2


def test_the_advice_on_divergence_names_the_loss(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"see whether .* not numbers, and whether loss={HERE}.endless gives some"):
        pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}", "train.max_nonfinite=0"), loss=endless)


def endless(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target) * torch.inf
