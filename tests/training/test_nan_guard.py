"""Losses and gradients that are not finite: the step is skipped, and training goes on or stops with a remedy."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.optim import AdamWConfig

import pusht_act
from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.loader import BatchLoader
from pusht_act.data.open_dataset import normalization_stats
from pusht_act.job import Result
from pusht_act.policy.act import make_policy, make_processors
from pusht_act.policy.optim import make_optimizer
from pusht_act.training.nan_guard import DivergedError
from pusht_act.training.train_step import StepOptions, train_step
from tests.helpers.dataset_config import config as dataset_config
from tests.helpers.runs import tiny_command
from tests.helpers.training import act, assert_same_bits, metrics


def nan_action(batch: dict[str, Any]) -> None:
    """The loss is not a number."""
    batch["action"][0, 0, 0] = torch.nan


def steep_action(batch: dict[str, Any]) -> None:
    """The loss is infinite."""
    batch["action"][0, 0, 0] = torch.inf


def state_that_overflows(batch: dict[str, Any]) -> None:
    """An activation is infinite."""
    batch["observation.state"][0, 0] = 1e30


@pytest.fixture
def training(keypoints_dataset: Path) -> tuple[TrainComponents, Callable[[], dict[str, Any]]]:
    """A small ACT with its optimizer, and what makes its batches."""
    frames = open_lerobot_dataset(dataset_config(keypoints_dataset))
    config = act(frames)
    torch.manual_seed(0)
    policy = make_policy(config)
    processors = make_processors(config, normalization_stats(frames, True))
    objects = TrainComponents(policy, processors, make_optimizer(policy, AdamWConfig(lr=1e-3)), None)
    data = BatchLoader(frames, config.chunk_size, "cpu")
    return objects, lambda: processors.pre(data.batch(torch.tensor([0, 20, 22, 50])))


def tensors(objects: TrainComponents) -> list[torch.Tensor]:
    moments = [value for state in objects.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*objects.policy.state_dict().values(), *moments)]


@pytest.mark.parametrize("breaks", [nan_action, steep_action, state_that_overflows])
@pytest.mark.parametrize("clip", [0.0, 10.0])
def test_a_step_that_breaks_changes_no_bit(breaks: Callable[..., None], clip: float, training: Any) -> None:
    objects, batch = training
    for _ in range(2):
        assert train_step(objects, batch(), StepOptions(clip))["skipped"] == 0.0
    before, broken = tensors(objects), batch()
    breaks(broken)
    values = train_step(objects, broken, StepOptions(clip))
    assert values["skipped"] == 1.0
    assert not (values["loss"].isfinite() and values["grad_norm"].isfinite())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(objects), strict=True))
    assert train_step(objects, batch(), StepOptions(clip))["skipped"] == 0.0
    assert not all(torch.equal(a, b) for a, b in zip(before, tensors(objects), strict=True))


def test_a_first_step_that_breaks_changes_no_weight(training: Any) -> None:
    objects, batch = training
    before, broken = [p.clone() for p in objects.policy.parameters()], batch()
    nan_action(broken)
    train_step(objects, broken, StepOptions(10.0))
    assert all(torch.equal(a, b) for a, b in zip(before, objects.policy.parameters(), strict=True))
    assert all(not value.any() for state in objects.optimizer.state.values() for value in state.values())


def test_the_check_of_a_sound_step_changes_no_bit(training: Any) -> None:
    """The update with `found_inf` = 0 is that without it."""
    objects, batch = training
    train_step(objects, batch(), StepOptions(10.0))
    gradients = [torch.randn_like(p) for p in objects.policy.parameters()]
    states = []
    start = {key: value.clone() for key, value in objects.policy.state_dict().items()}
    kept = {p: {k: v.clone() for k, v in state.items()} for p, state in objects.optimizer.state.items()}
    for found_inf in (None, torch.tensor(0.0)):
        objects.policy.load_state_dict(start)
        objects.optimizer.state.update({p: {k: v.clone() for k, v in state.items()} for p, state in kept.items()})
        objects.optimizer.found_inf = found_inf
        for parameter, gradient in zip(objects.policy.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        objects.optimizer.step()
        states.append(tensors(objects))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_an_infinite_gradient_of_a_finite_loss_counts_too(training: Any) -> None:
    objects, batch = training
    before = tensors(objects)
    objects.policy.config.kl_weight = 1e30  # whose square is past what float32 holds
    values = train_step(objects, batch(), StepOptions(10.0))
    assert values["loss"].isfinite()
    assert values["grad_norm"].isinf()
    assert values["skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(objects), strict=False))


# Whole runs.


@pytest.fixture
def broken(broken_dataset: Path, tmp_path: Path) -> Callable[..., Path]:
    """A tiny run on it in tmp_path/NAME, one line of metrics a step."""

    def run(name: str, *overrides: str) -> Path:
        data = ["dataset=pusht_keypoints", f"dataset.root={broken_dataset}"]
        return pusht_act.run(tiny_command(f"output_dir={tmp_path / name}", *data, *overrides)).output_dir

    return run


def skipped_steps(run: Path) -> list[int]:
    return [line["step"] for line in metrics(run) if line.get("train/skipped")]


def state(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text()))


def test_a_broken_frame_is_skipped_and_counted_and_a_resume_is_exact(broken: Any, tmp_path: Path) -> None:
    """Once an epoch of 18 steps; the resume begins within a window of metrics that holds the first."""
    at, _ = skipped_steps(broken("every", "steps=36"))
    assert at % 7, "not where a window ends"
    whole, parts = broken("whole", "log_freq=7", "steps=36", f"save_freq={at}"), tmp_path / "parts"
    pusht_act.run(["mode=resume", f"resume.path={whole}/checkpoints/{at:06d}", f"output_dir={parts}", "steps=36"])
    assert_same_bits(whole, parts)
    assert metrics(parts) == [line for line in metrics(whole) if line["step"] > at]
    assert [line["train/skipped"] for line in metrics(whole) if "train/skipped" in line] == [1.0, 1.0]
    assert all(math.isfinite(line["train/loss"]) for line in metrics(whole))
    for run in (whole, parts):
        assert state(run)["skipped"] == 2
        assert state(run)["rollbacks"] == 0


@pytest.mark.slow
def test_after_too_many_the_run_goes_back_and_on_in_another_order(broken: Any, caplog: Any) -> None:
    (at,) = skipped_steps(broken("every", "steps=18"))
    whole = broken("whole", f"steps={at + 3}", "save_freq=1", "train.max_nonfinite=0")
    assert f"going back to step {at - 1}, {whole}/checkpoints/{at - 1:06d}, and on with" in caplog.text
    event = {"step": at - 1, "rollback/number": 1, "rollback/diverged_at": at}
    assert metrics(whole, "rollback/") == [event]
    assert [line["step"] for line in metrics(whole)] == list(range(1, at + 4)), "each step once"
    assert state(whole)["rollbacks"] == 1
    assert state(whole)["skipped"] == 0
    parts = broken("parts", f"steps={at + 1}", "save_freq=1", "train.max_nonfinite=0")
    pusht_act.run(["mode=resume", f"output_dir={parts}", f"steps={at + 3}"])
    assert_same_bits(whole, parts)
    assert metrics(parts, "") == metrics(whole, "")


@pytest.mark.slow
def test_a_run_that_always_diverges_stops_and_its_last_checkpoint_is_sound(
    tiny: Callable[..., Result], tmp_path: Path
) -> None:
    run = tiny("steps=2").output_dir
    files = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    options = ["steps=30", "policy.optimizer_lr=1e30", "policy.optimizer_lr_backbone=1e30"]
    command = ["mode=resume", f"output_dir={run}", *options]
    done = subprocess.run(
        [sys.executable, "-m", "pusht_act", *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    said = done.stderr.splitlines()
    assert done.returncode == 1
    assert said[-1].startswith(
        "pusht-act: step 14: the loss or its gradient was not finite 11 times, more than train.max"
    )
    assert "after train.max_rollbacks=2 roll-backs: lower policy.optimizer_lr, or see" in said[-1]
    assert f"; {run}/checkpoints/000002 is valid, mode=resume resumes from it" in said[-1]
    assert "Traceback" not in done.stderr
    assert files == {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    numbers = [line["rollback/number"] for line in metrics(run, "rollback/")]
    assert numbers == [1, 2]
    with pytest.raises(DivergedError, match="step 4: the weights, .*, after train.max_rollbacks=1 roll-backs: "):
        pusht_act.run([*command, "save_freq=2", "train.max_rollbacks=1"])
    assert [line["rollback/number"] for line in metrics(run, "rollback/")] == [1], "those of before are done again"
    assert pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4"]).step == 4
    assert metrics(run, "rollback/") == []


@pytest.mark.parametrize("options", [["save_freq=0"], ["save_checkpoint=false"], ["save_freq=0", "eval_freq=2"]])
def test_without_a_checkpoint_to_go_back_to_the_run_stops(options: list[str], tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match="not finite.*there is no checkpoint to go back to: lower policy.optimizer_lr"
    ):
        tiny("steps=30", "policy.optimizer_lr=1e30", "policy.optimizer_lr_backbone=1e30", *options)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert metrics(tmp_path / "run", "eval/") == [], "broken weights are not evaluated"


def test_a_branch_goes_back_to_where_it_began(tiny: Any, tmp_path: Path) -> None:
    start = tiny("steps=2").output_dir / "checkpoints/000002"
    command = ["mode=resume", f"resume.path={start}", f"output_dir={tmp_path / 'new'}", "steps=30"]
    with pytest.raises(DivergedError, match=f"; {start} is valid"):
        pusht_act.run([*command, "policy.optimizer_lr=1e30", "train.max_nonfinite=2"])
    assert [line["step"] for line in metrics(tmp_path / "new", "rollback/")] == [2, 2]
