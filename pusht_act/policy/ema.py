"""An exponential moving average of a policy's weights, beside those that are trained.

    decay_t = 1 - (1 + t / inv_gamma) ** -power, between min_decay and max_decay; or ema.decay at every step
    average <- decay_t * average + (1 - decay_t) * weights

Schedule, names and the folder in a checkpoint are LeRobot's (huggingface/lerobot#4323), which took the schedule from
diffusers' `EMAModel`. An average is worth most while the learning rate is still high.
"""

import copy

import torch
from torch import Tensor

from pusht_act.config.schema import EmaConfig
from pusht_act.policy.lerobot import ACTPolicy


class EMA:
    """The average of the weights of `policy` over its optimizer steps.

    Args:
        policy: whose weights the average begins with.
        config: the `ema` section.
    """

    def __init__(self, policy: ACTPolicy, config: EmaConfig) -> None:
        # Its parameters ask for gradients, as loaded ones do: PyTorch's attention rounds otherwise where none does.
        self.policy = copy.deepcopy(policy).eval()
        """A policy with the average weights. Batch norms of its backbone have statistics of their own."""
        self.is_evaluated = config.use_for_eval
        """Whether evaluations run the average."""
        self._config = config
        self._weights: list[Tensor] = [*policy.parameters()]
        self._average: list[Tensor] = [*self.policy.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step`, counted from 1."""
        # A frozen backbone is the same in both.
        pairs = [(a, w) for a, w in zip(self._average, self._weights, strict=True) if w.requires_grad]
        average, weights = zip(*pairs, strict=True)
        torch._foreach_lerp_(average, weights, 1 - self.decay(step))

    def decay(self, step: int) -> float:
        """Return the weight of the average so far at `step`; 0: the average is the weights themselves."""
        config = self._config
        t = step - config.update_after_step - 1
        if t <= 0:
            return 0.0
        if config.decay is not None:
            return config.decay
        scheduled: float = 1 - (1 + t / config.inv_gamma) ** -config.power
        return max(config.min_decay, min(scheduled, config.max_decay))
