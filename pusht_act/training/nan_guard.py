"""Find training that has left the finite numbers before anything of it is logged, evaluated or saved."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.checkpoints.state import TrainerState
from pusht_act.config.schema import TrainConfig
from pusht_act.data.loader import Batch
from pusht_act.policy.act import autocast
from pusht_act.runtime.distributed import all_reduce_sum
from pusht_act.runtime.errors import UserError
from pusht_act.training.metric_accumulator import MetricAccumulator
from pusht_act.training.train_step import Loss


class DivergedError(UserError):
    """Training diverged at `step`: there is no use in continuing from here."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(reason)
        self.step = step


@dataclass
class NanGuard:
    """Checks a run; every rank comes to the same verdict."""

    config: TrainConfig
    components: TrainComponents
    state: TrainerState
    loss: Loss
    _checked: int | None = None

    def check_skipped(self, step: int, metrics: MetricAccumulator) -> None:
        """Add the steps that were skipped to `state.skipped`; waits for the device.

        Raises:
            DivergedError: they are too many.
        """
        self.state.skipped += metrics.newly_skipped()
        if self.state.skipped > self.config.max_nonfinite:
            raise DivergedError(
                f"step {step}: the loss or its gradient was not finite {self.state.skipped} times, more than "
                f"train.max_nonfinite={self.config.max_nonfinite}",
                step,
            )

    def check_finite(self, step: int, batch: Batch) -> None:
        """Check weights, moments and the loss that the weights give, once a step.

        The loss is that of a sample of zeros, everything at its mean, in the form of `batch`, whose own numbers may be
        what broke.

        Raises:
            DivergedError: one of them is not finite.
        """
        if step == self._checked:
            return
        self._checked = step
        components = self.components
        moments: list[Tensor] = [value for state in components.optimizer.state.values() for value in state.values()]
        norm = get_total_norm([*components.policy.parameters(), *moments], math.inf)
        zeros = {key: value.new_zeros(1, *value.shape[1:]) for key, value in batch.items() if isinstance(value, Tensor)}
        cuda = [norm.device] if norm.is_cuda else []
        # The VAE and dropout draw random numbers here that must not be taken from training's.
        with torch.no_grad(), autocast(components.policy), torch.random.fork_rng(cuda):
            loss, _ = self.loss(components.policy.train(), zeros)
        # Each rank's noise is its own, and so its loss: one verdict for all keeps the ranks in step.
        broken = (~(norm + loss).isfinite()).float()
        all_reduce_sum([broken])
        if broken.item():
            raise DivergedError(
                f"step {step}: the weights, the optimizer's moments or the loss that they give are not finite", step
            )
