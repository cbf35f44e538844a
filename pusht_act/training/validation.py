"""What is computed from data before the weights are judged: the norms' statistics, and the held-out loss."""

import torch
from torch import Tensor

from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.data.loader import BatchLoader
from pusht_act.policy.act import autocast
from pusht_act.policy.batch_norm import update_statistics
from pusht_act.training.train_step import Loss

NORM_FRAMES = 1536
"""Frames of the training data from which batch norm's statistics are computed."""


def update_norms(components: TrainComponents, loader: BatchLoader, frames: Tensor, batch_size: int) -> None:
    """Make the statistics of live batch norms exact for the present weights: those of the images of `frames`."""
    parts, pre = torch.split(frames, batch_size), components.processors.pre
    # The average of the weights has activations of its own.
    for policy in components.policies.values():
        with autocast(policy):
            update_statistics(policy, (pre(loader.batch(part)) for part in parts))


def validation_loss(
    components: TrainComponents, loader: BatchLoader, indices: Tensor, batch_size: int, loss: Loss
) -> float:
    """Return the mean loss over frames `indices` in eval mode: no KL term, batch by batch as stock LeRobot takes it."""
    policy, pre = components.policy.eval(), components.processors.pre
    with torch.inference_mode(), autocast(policy):
        losses = [loss(policy, pre(loader.batch(part)))[0] for part in torch.split(indices, batch_size)]
    policy.train()
    return float(torch.stack(losses).mean())
