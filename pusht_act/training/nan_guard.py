"""Training that has left the finite numbers: found before anything of it is evaluated or saved."""

import math

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pusht_act.checkpoints.checkpoint_io import TrainComponents, TrainerState
from pusht_act.config.schema import TrainConfig
from pusht_act.data.loader import Batch
from pusht_act.policy.act import act_loss, autocast
from pusht_act.runtime.errors import UserError
from pusht_act.training.metrics import MetricAccumulator


class DivergedError(UserError):
    """There is no use in going on from here."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason)
        self.step = step


def check_finite(
    config: TrainConfig,
    objects: TrainComponents,
    state: TrainerState,
    window: MetricAccumulator,
    batch: Batch | None,
    step: int,
) -> None:
    """Before the metrics of `step` are logged and, given its `batch`, before it is evaluated or saved.

    Raises:
        DivergedError: too many steps were skipped, or what training has come to is not finite.
    """
    _count_skipped(config, state, window, step)
    if batch is not None:
        _check_sound(objects, batch, step)


def _count_skipped(config: TrainConfig, state: TrainerState, window: MetricAccumulator, step: int) -> None:
    """Add the steps that were skipped to `state.skipped`; waits for the device.

    Raises:
        DivergedError: they are too many.
    """
    state.skipped += window.newly_skipped()
    if state.skipped > config.max_nonfinite:
        raise DivergedError(
            f"step {step}: the loss or its gradient was not finite {state.skipped} times, more than "
            f"train.max_nonfinite={config.max_nonfinite}",
            step,
        )


def _check_sound(objects: TrainComponents, batch: Batch, step: int) -> None:
    """Weights and moments are finite, and so is the loss that the weights give.

    That of a batch of zeros, everything at its mean, in the form of `batch`, whose own numbers may be what broke.

    Raises:
        DivergedError: they are not.
    """
    moments: list[Tensor] = [value for state in objects.optimizer.state.values() for value in state.values()]
    norm = get_total_norm([*objects.policy.parameters(), *moments], math.inf)
    zeros = {key: torch.zeros_like(value) for key, value in batch.items() if isinstance(value, Tensor)}
    cuda = [norm.device] if norm.is_cuda else []
    with torch.no_grad(), autocast(objects.policy), torch.random.fork_rng(cuda):  # its noise is not the training's
        loss, _ = act_loss(objects.policy.train(), zeros)
    if not (norm + loss).isfinite():
        raise DivergedError(
            f"step {step}: the weights, the optimizer's moments or the loss that they give are not finite", step
        )
