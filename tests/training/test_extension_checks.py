"""What is refused of a caller's loss and transforms, before anything is written; and what a resume tells apart."""

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pusht_act
from pusht_act.runtime.errors import UserError
from pusht_act.training import build
from pusht_act.training.extensions import Extensions, name_of
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits, metrics

HERE = __name__
Batch = dict[str, Tensor]


def huber(predicted: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    return F.huber_loss(predicted, target, reduction="none", delta=delta)


def noisy(batch: Batch) -> Batch:
    """Draws from all of the generators that a checkpoint holds."""
    shift = random.random() + np.random.random()
    return {**batch, "observation.state": batch["observation.state"] + shift + torch.randn(2)}


class Scaled:
    """A loss that is an object."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __repr__(self) -> str:
        return f"Scaled({self.scale})"

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        return self.scale * (predicted - target).abs()


class Nameless:
    def __call__(self, batch: Batch) -> Batch:
        return batch

    def method(self, batch: Batch) -> Batch:
        return batch


def refusal(tmp_path: Path, *overrides: str, **extensions: Any) -> str:
    """Return the line that refuses a run in tmp_path/run, of which nothing is left."""
    with pytest.raises(UserError) as caught:
        pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}", *overrides), **extensions)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    return str(caught.value)


# What a loss returns.


def mean_over_actions(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).abs().mean(-1)


def mean_over_chunk(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).abs().mean(1, keepdim=True)


def scalar(predicted: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(predicted, target)


def is_far(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).abs() > 1


def detached(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted.detach() - target).abs()


def of_the_target_alone(predicted: Tensor, target: Tensor) -> Tensor:
    return target * torch.ones_like(target, requires_grad=True)


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("loss", "returned"),
    [
        (mean_over_actions, "float32 [4, 8] on cpu"),
        (mean_over_chunk, "float32 [4, 1, 2] on cpu"),
        (scalar, "float32 [] on cpu"),
        (is_far, "bool [4, 8, 2] on cpu"),
        (detached, "a tensor without a gradient"),
        (of_the_target_alone, "an error that does not depend on what is predicted"),
        (nothing, "None"),
    ],
)
def test_a_loss_that_is_not_the_error_of_each_element_is_refused(loss: Any, returned: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, loss=loss)
    assert said.startswith(f"loss={HERE}.{loss.__name__} returned {returned}")
    if loss is not of_the_target_alone:
        assert "give the error of each element, a floating-point tensor of shape [4, 8, 2] on cpu" in said


def test_a_loss_that_is_wrong_for_other_batches_is_refused_there(tmp_path: Path) -> None:
    """The short batch at an epoch's end, whose rows the fixed weights would be broadcast to."""
    with pytest.raises(UserError, match=r"returned float32 \[94, 8, 2\] on cpu: give .* shape \[1, 8, 2\]"):
        pusht_act.run(
            tiny_command(f"output_dir={tmp_path / 'run'}", "batch_size=94", "steps=6", "save_checkpoint=false"),
            loss=weighted,
        )


def weighted(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).abs() * torch.ones(94, 1, 1)


def test_an_error_within_a_loss_keeps_its_traceback_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}"), loss=broken)
    assert caught.traceback[-1].name == "broken"
    assert not (tmp_path / "run").exists()


def broken(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target) * (1 / 0)


# What a transform returns.


def without_state(batch: Batch) -> Batch:
    del batch["observation.state"]
    return batch


def with_a_mask(batch: Batch) -> Batch:
    return {**batch, "mask": batch["action_is_pad"]}


def narrower(batch: Batch) -> Batch:
    batch["observation.state"] = batch["observation.state"][:, :1]
    return batch


def in_double(batch: Batch) -> Batch:
    return {**batch, "action": batch["action"].double()}


def half_of_it(batch: Batch) -> Batch:
    return {key: value[:2] for key, value in batch.items()}


def in_numpy(batch: Batch) -> Batch:
    return {**batch, "action": batch["action"].numpy()}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("transform", "returned"),
    [
        (nothing, "None"),
        (without_state, "no observation.state"),
        (with_a_mask, "mask, which it was not given"),
        (narrower, "observation.state as float32 [4, 1] on cpu, which was float32 [4, 2] on cpu"),
        (in_double, "action as float64 [4, 8, 2] on cpu, which was float32 [4, 8, 2] on cpu"),
        (half_of_it, "observation.environment_state as float32 [2, 16] on cpu, which was float32 [4, 16] on cpu"),
        (in_numpy, "action as a ndarray, which was float32 [4, 8, 2] on cpu"),
    ],
)
def test_a_transform_that_returns_something_else_is_refused(transform: Any, returned: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, transforms=[noisy, transform])
    assert said.startswith(f"transforms: {HERE}.{transform.__name__} returned {returned}: give the whole batch")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"transforms": noisy}, "is no list: give one, such as transforms=[shift_image]"),
        (
            {"transforms": torch.nn.Sequential(torch.nn.Identity())},
            "transforms=Sequential( (0): Identity() ) is no list",
        ),
        ({"transforms": [noisy, 3]}, "transforms: 3 cannot be called"),
        ({"transforms": "noisy"}, "transforms='noisy' is no list"),
        ({"loss": "huber"}, "loss='huber' cannot be called"),
    ],
)
def test_what_is_no_function_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, **given)


@pytest.mark.slow
def test_the_check_takes_no_random_number_from_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a new run nor in a resumed one."""

    def trained(name: str) -> Path:
        options = [f"output_dir={tmp_path / name}", "steps=4", "save_freq=2"]
        pusht_act.run(tiny_command(*options), loss=huber, transforms=[noisy])
        branch = ["mode=resume", f"resume.path={tmp_path / name}/checkpoints/000002", f"output_dir={tmp_path / name}-2"]
        return pusht_act.run([*branch, "steps=4"], loss=huber, transforms=[noisy]).output_dir

    checked = trained("checked")
    assert_same_bits(tmp_path / "checked", checked)
    calls: list[Any] = []
    monkeypatch.setattr(build, "check_extensions", lambda *given: calls.append(given))
    unchecked = trained("unchecked")
    assert len(calls) == 2
    assert_same_bits(checked, unchecked)
    assert metrics(tmp_path / "checked") == metrics(tmp_path / "unchecked")


def test_without_extensions_nothing_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(build, "check_extensions")
    pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}", "steps=1"))


# What a resume tells apart.


def made(scale: float) -> Callable[..., Any]:
    def loss(predicted: Tensor, target: Tensor) -> Tensor:
        return scale * (predicted - target).abs()

    return loss


def made_by_default(scale: Any) -> Callable[..., Any]:
    def loss(predicted: Tensor, target: Tensor, scale: Any = scale) -> Tensor:
        return torch.as_tensor(scale * (predicted - target).abs())

    return loss


def made_alone() -> Callable[..., Any]:
    def loss(predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted - target).abs()

    return loss


def test_names_hold_the_settings() -> None:
    names = {
        name_of(huber): "huber",
        name_of(functools.partial(huber, delta=0.5)): f"functools.partial({HERE}.huber, delta=0.5)",
        name_of(functools.partial(huber, delta=0.9)): f"functools.partial({HERE}.huber, delta=0.9)",
        name_of(functools.partial(made_by_default, [0.5, "a"])): (
            f"functools.partial({HERE}.made_by_default, [0.5, 'a'])"
        ),
        name_of(functools.partial(map, huber)): f"functools.partial(builtins.map, {HERE}.huber)",
        name_of(Scaled(0.5)): "Scaled(0.5)",
        name_of(Scaled(0.9).__call__): "Scaled(0.9).__call__",
        name_of(made_alone()): "made_alone.<locals>.loss",
        name_of(made_by_default(0.5)): "made_by_default.<locals>.loss(scale=0.5)",
        name_of(made_by_default(0.9)): "made_by_default.<locals>.loss(scale=0.9)",
        name_of(torch.nn.HuberLoss("none", delta=0.5)): "torch.nn.modules.loss.HuberLoss(reduction='none', delta=0.5)",
        name_of(torch.nn.HuberLoss("none", delta=0.9)): "torch.nn.modules.loss.HuberLoss(reduction='none', delta=0.9)",
        name_of(torch.nn.Sequential(torch.nn.Dropout(0.2))): (
            "torch.nn.modules.container.Sequential( (0): Dropout(p=0.2, inplace=False) )"
        ),
    }
    whole = ("functools.", "torch.")
    assert list(names) == [name if name.startswith(whole) else f"{HERE}.{name}" for name in names.values()]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (Nameless(), "give Nameless a __repr__ that shows its settings, or use a function"),
        (Nameless().method, "give Nameless a __repr__ that shows its settings, or use a function"),
        (functools.partial(Nameless()), "give Nameless a __repr__"),
        (
            functools.partial(made_by_default, torch.tensor(0.5)),
            "tensor(0.5000) cannot be compared on resume: give numbers",
        ),
        (functools.partial(huber, torch.ones(2, 2)), "tensor([[1., 1.], [1., 1.]]) cannot be compared on resume"),
        (functools.partial(lambda batch: batch), "a lambda has no name"),
        (made(0.5), "made.<locals>.loss takes values from the function around it, which no resume could compare"),
        (made_by_default(torch.tensor(0.5)), "tensor(0.5000) cannot be compared on resume: give numbers"),
    ],
)
def test_what_no_resume_could_tell_apart_is_refused(function: Any, said: str) -> None:
    for extensions in ({"loss": function}, {"transforms": [function]}):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            Extensions(**extensions)
        assert "\n" not in str(caught.value)


def test_a_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pusht_act.run(tiny_command(f"output_dir={run}", "steps=1"), loss=functools.partial(huber, delta=0.5))
    for other, named in ((functools.partial(huber, delta=0.9), "delta=0.9)"), (huber, f"{HERE}.huber")):
        with pytest.raises(UserError, match=re.escape("huber, delta=0.5), now loss=") + ".*" + re.escape(named)):
            pusht_act.run(["mode=resume", f"output_dir={run}", "steps=2"], loss=other)
    again = ["mode=resume", f"output_dir={run}", "steps=2"]
    assert pusht_act.run(again, loss=functools.partial(huber, delta=0.5)).step == 2


def test_a_finished_run_is_not_taken_for_one_with_another_loss(tmp_path: Path) -> None:
    command = tiny_command(f"output_dir={tmp_path / 'run'}", "steps=1", "resume.auto=true")
    pusht_act.run(command, loss=huber)
    assert pusht_act.run(command, loss=huber).step == 1
    for other in ({}, {"loss": Scaled(0.5)}):
        with pytest.raises(UserError, match=f"trained with loss={HERE}.huber, now loss="):
            pusht_act.run(command, **other)  # type: ignore[arg-type]


# What `run` is given.


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("mode=test", "pusht_act.run('mode=test'): give a list of texts"),
        (["mode=test", 3], "pusht_act.run(['mode=test', 3]): give a list of texts"),
        ([*tiny_command(), "-m", "seed=1,2"], "pusht_act.run takes no -m: give KEY=VALUE"),
        (["--cfg", "job"], "pusht_act.run takes no --cfg: give KEY=VALUE"),
        (["stepz=3"], "stepz is unknown: did you mean steps?"),
        (["seed=1,2"], "seed=1,2"),
        (["policy=nothing"], "policy=nothing does not exist"),
    ],
)
def test_overrides_that_are_none_are_refused_in_a_line(overrides: Any, said: str, in_tmp: Path) -> None:
    with pytest.raises(UserError) as caught:
        pusht_act.run(overrides)
    assert said in str(caught.value) or said == "seed=1,2"
    assert "\n" not in str(caught.value)
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [["mode=demos"], ["mode=eval", "checkpoint=x"], ["mode=status", "dir=x"], ["print_lerobot_command=true"]],
)
def test_functions_that_nothing_would_use_are_refused(overrides: list[str], in_tmp: Path) -> None:
    with pytest.raises(UserError) as caught:
        pusht_act.run(overrides, loss=huber, transforms=[noisy])
    wanted = "is for training (mode=test, mode=full and mode=resume), not for"
    assert str(caught.value).startswith(f"loss={HERE}.huber, transforms={HERE}.noisy {wanted} {overrides[0]}: leave it")
    assert not list(in_tmp.iterdir())
