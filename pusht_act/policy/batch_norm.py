"""Batch norm for a backbone that starts from random weights, kept in the form of LeRobot's frozen layers.

LeRobot's ACT builds its ResNet with torchvision's `FrozenBatchNorm2d`, as DETR does. That fits ImageNet's weights,
which bring their statistics. With random weights they are mean 0 and variance 1, so nothing is normalized: the
activations grow with each stage, and every image looks the same to the transformer.

    training    LiveBatchNorm2d normalizes by the batch and keeps no running average
    otherwise   by stored statistics, which `update_statistics` makes exact for the present weights

Running averages lag behind weights that move (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3). On
PushT that cost up to 45 points of success, so there are none. A layer has the buffers of the frozen one and no
parameters. Stock LeRobot therefore loads, evaluates and resumes the policy, and a resume has nothing to restore but the
weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from pusht_act.policy.lerobot import ACTPolicy
from pusht_act.runtime.distributed import all_reduce_sum, world_size

RESIDUAL_SCALE = 0.2
"""Weight of each residual block's last norm: the blocks begin near the identity (Goyal et al. 2017, section 5.1)."""

_shard_is_empty: ContextVar[bool] = ContextVar("shard_is_empty", default=False)


class LiveBatchNorm2d(FrozenBatchNorm2d):  # type: ignore[misc]
    """Normalize by the batch of all ranks in training mode, and by the stored statistics otherwise."""

    over_ranks = True
    """Whether the batch is shared by all ranks; the statistics are computed by one of them alone."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return `x` normalized by channel."""
        if not self.training:
            return super().forward(x)  # type: ignore[no-any-return]
        if self.over_ranks and world_size() > 1:
            return _normalize_over_ranks(x, self.weight, self.bias, self.eps)
        # F.batch_norm would refuse a channel of a single value, such as that of a one-pixel map of one sample.
        return torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)


def use_batch_statistics(policy: ACTPolicy, fresh: bool) -> None:
    """Replace the frozen norms of `policy`'s backbone by live ones with the same buffers.

    Args:
        policy: changed in place; one without a backbone stays as it is.
        fresh: whether its weights are random, so that the residual blocks are given their first scale.
    """
    if policy.config.image_features:
        policy.model.backbone.register_forward_pre_hook(_use_channels_last)
    for parent in [*policy.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is FrozenBatchNorm2d:
                live = LiveBatchNorm2d(len(layer.weight), layer.eps).to(layer.weight.device)
                live.load_state_dict(layer.state_dict())
                setattr(parent, name, live.train(layer.training))
        if fresh and isinstance(parent, BasicBlock | Bottleneck):
            last = parent.bn3 if isinstance(parent, Bottleneck) else parent.bn2
            last.weight.fill_(RESIDUAL_SCALE)


def _use_channels_last(backbone: nn.Module, images: tuple[Tensor]) -> tuple[Tensor]:
    """Give the training images the memory format in which convolutions on a CPU are faster; their values stay.

    Only in training, so that an evaluation rounds as stock's does.
    """
    if not backbone.training or images[0].device.type != "cpu":
        return images
    return (images[0].contiguous(memory_format=torch.channels_last),)


def live_norms(policy: nn.Module) -> list[LiveBatchNorm2d]:
    """Return the norms of `policy` that normalize by the batch in training."""
    return [layer for layer in policy.modules() if isinstance(layer, LiveBatchNorm2d)]


@torch.no_grad()
def update_statistics(policy: ACTPolicy, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set the stored statistics to those of `batches` under the present weights ("precise BN").

    Mean and variance are those over all batches, each of which is normalized by itself as in training. The backbone has
    no dropout, so no random number is drawn.

    Args:
        policy: changed in place, its mode is restored.
        batches: normalized batches with the policy's images, [B, 3, H, W]; at least one.
    """
    # Add up each layer's first and second moment, in float64: a difference of large sums follows.
    layers, was_training = live_norms(policy), policy.training
    sums = {layer: layer.weight.new_zeros(2, len(layer.weight), dtype=torch.float64) for layer in layers}

    def add(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)
        sums[layer] += torch.stack([mean, variance + mean.square()])  # type: ignore[index]

    # Normalizing in training mode, as if each batch were a training batch of this rank alone.
    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    policy.train()
    count = 0
    try:
        for layer in layers:
            layer.over_ranks = False
        for batch in batches:
            for key in policy.config.image_features:
                policy.model.backbone(batch[key])
                count += 1
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            layer.over_ranks = True
            hook.remove()
        policy.train(was_training)
    # All batches have the same size, so the mean of their moments is the moment over all frames.
    for layer, (mean, square) in sums.items():
        layer.running_mean.copy_(mean / count)
        layer.running_var.copy_(square / count - (mean / count).square())


@contextmanager
def empty_shard(empty: bool) -> Iterator[None]:
    """Leave this rank's batch, a row of padding, out of the batch statistics in this context if `empty`."""
    token = _shard_is_empty.set(empty)
    try:
        yield
    finally:
        _shard_is_empty.reset(token)


def _normalize_over_ranks(
    x: Float[Tensor, "B C H W"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "B C H W"]:
    """Normalize `x` by the mean and variance over the batch of all ranks; torch's SyncBatchNorm takes GPUs alone."""
    share = x[:0] if _shard_is_empty.get() else x
    share = share.float()
    count = share.new_full((1,), share.numel() // share.shape[1])
    total: Tensor = _SumOverRanks.apply(torch.cat([share.sum((0, 2, 3)), share.square().sum((0, 2, 3)), count]))  # type: ignore[no-untyped-call]
    mean, square = (total[:-1] / total[-1]).chunk(2)
    scale = weight * ((square - mean.square()).clamp_min(0) + eps).rsqrt()
    normalized = (x.float() - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    return normalized.to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks. Each rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        all_reduce_sum([total])
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        all_reduce_sum([total])
        return total
