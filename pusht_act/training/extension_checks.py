"""Check what a caller's loss and transforms return, by its form alone: nothing here waits for the device.

A loss of another shape would be broadcast, and one without a gradient would train nothing, both without a word.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.data.lerobot import ACTION
from pusht_act.data.loader import Batch
from pusht_act.policy.act import autocast, is_bf16
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.seeding import preserved_random_streams
from pusht_act.training.extensions import ActionLoss, Extensions, Transform, name_of

Form = tuple[Any, ...]
"""A tensor's dtype, shape and device; the class of anything else."""


def check_extensions(
    extensions: Extensions, components: TrainComponents, batch: Batch, precision: str | None = None
) -> None:
    """Call each transform and the loss once, before anything is written; training's random numbers stay as they are.

    Args:
        extensions: what is checked. What one of them raises itself is not touched.
        components: the policy, whose precision the loss sees, and its processors.
        batch: a training batch of full size, before it is transformed and normalized.
        precision: as policy.act.autocast takes it.

    Raises:
        UserError: what one of them returns cannot be trained on.
    """
    policy, loss = components.policy, extensions.loss
    with preserved_random_streams(batch[ACTION].device):
        target = components.processors.pre(apply_transforms(batch, extensions.transforms))[ACTION]
        if loss is None:
            return
        predicted = torch.randn_like(target, dtype=torch.bfloat16 if is_bf16(policy.config, precision) else None)
        predicted.requires_grad_()
        with autocast(policy, precision):
            # Not a leaf, as in training: it may be changed in place.
            error = checked_loss(loss)(predicted.clone(), target)
    if torch.autograd.grad(error.sum(), predicted, allow_unused=True)[0] is None:
        raise UserError(f"loss={name_of(loss)} returned an error that does not depend on what is predicted")


def checked_loss(loss: ActionLoss) -> ActionLoss:
    """Return `loss` with a check of what it returns.

    Raises:
        UserError: from the function returned, naming `loss`, what it returned and what is wanted.
    """

    def checked(predicted: Tensor, target: Tensor) -> Tensor:
        error = loss(predicted, target)
        # What is compiled has one form, that of the call before the first step.
        if not torch.compiler.is_compiling():
            _check_error(loss, error, predicted)
        return error

    return checked


def _check_error(loss: ActionLoss, error: Any, predicted: Tensor) -> None:
    if isinstance(error, Tensor) and error.is_floating_point() and _form(error)[1:] == _form(predicted)[1:]:
        if error.requires_grad or not predicted.requires_grad:
            return
        returned = "a tensor without a gradient"
    else:
        returned = _described(_form(error))
    raise UserError(
        f"loss={name_of(loss)} returned {returned}: give the error of each element, a floating-point tensor of shape "
        f"{list(predicted.shape)} on {predicted.device} that is differentiable"
    )


def apply_transforms(batch: Batch, transforms: Sequence[Transform]) -> Batch:
    """Return `batch` after each of `transforms`.

    Raises:
        UserError: naming the one that returned something of another form than it was given.
    """
    for transform in transforms:
        # Its dictionary may be changed in place.
        given = {key: _form(value) for key, value in batch.items()}
        batch = transform(batch)
        if objection := _objection_to_batch(batch, given):
            raise UserError(
                f"transforms: {name_of(transform)} returned {objection}: give the whole batch, of the same keys, "
                "shapes and dtypes, on the same device"
            )
    return batch


def _objection_to_batch(batch: Any, given: dict[str, Form]) -> str | None:
    if not isinstance(batch, dict):
        return _described(_form(batch))
    if missing := given.keys() - batch.keys():
        return f"no {min(missing)}"
    if new := batch.keys() - given.keys():
        return f"{min(map(str, new))}, which it was not given"
    for key, was in given.items():
        if (now := _form(batch[key])) != was:
            return f"{key} as {_described(now)}, which was {_described(was)}"
    return None


def _form(value: Any) -> Form:
    return (value.dtype, value.shape, value.device) if isinstance(value, Tensor) else (type(value),)


def _described(form: Form) -> str:
    if len(form) == 3:
        dtype, shape, device = form
        return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
    return "None" if form[0] is type(None) else f"a {form[0].__name__}"
