"""One training step, from frame numbers to updated weights, as fast as the device allows.

  inputs -> gather -> transforms -> normalize -> batch -> forward, loss, backward -> clip -> AdamW -> losses
           [            one graph              ]    [       compiled        ]
                                                    [             another graph             ]

plain       operation after operation: what the tests compare with stock LeRobot, and every batch of another size than
            batch_size, such as an epoch's last
compiled    the loss (forward, masks, KL) and its gradient as fused kernels (train.compile)
captured    on CUDA (cuda_graphs.py): the host has two launches a step to make in place of hundreds
sharded     with several ranks, which are not captured: each has the loss and gradient of its shard of the batch
            (runtime/distributed.py), of which the sum is the batch's; all make the same update

Which of them a step is follows from the configuration and the batch's size. A resumed run warms up and captures anew,
which changes nothing: warm-up launches the kernels that a replay does, on the same random numbers, and the generator's
state in a checkpoint is that after the last step either way. What is not exact to the bit on CUDA is what each process
chooses by timing: cuDNN its algorithms, the compiler the block sizes of its reductions. On the CPU nothing is timed.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.config.schema import TrainConfig
from pusht_act.data.loader import INDEX, Batch, BatchIndices, BatchLoader
from pusht_act.policy.act import act_loss, autocast, l1_loss, valid_counts
from pusht_act.policy.batch_norm import empty_shard
from pusht_act.policy.fast_dropout import Dropout
from pusht_act.policy.lerobot import ACTPolicy
from pusht_act.runtime.distributed import all_reduce_sum, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.training.cuda_graphs import CudaGraphCallable, CudaGraphs, GraphBackend, capturable_lr
from pusht_act.training.extension_checks import apply_transforms, checked_loss
from pusht_act.training.extensions import ActionLoss, Transform

log = logging.getLogger(__name__)

Losses = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Losses]]
"""As policy.act.act_loss, its `action_loss` bound."""
Phase = Callable[[str], AbstractContextManager[Any]]
"""What a named phase of a step runs in: profiler.StepProfiler.phase, or nothing."""


@dataclass(frozen=True)
class StepOptions:
    """How a step is taken."""

    grad_clip_norm: float
    """Of the whole gradient, before AdamW; 0: not clipped."""
    precision: str | None = None
    """As policy.act.autocast takes it."""
    loss: Loss = act_loss
    full_batch_loss: Loss | None = None
    """`loss` compiled for batches of full size; None: `loss` itself. An epoch's last, short batch takes `loss`."""
    dropout: Dropout = nullcontext
    transforms: Sequence[Transform] = ()
    """Applied to each batch before it is normalized."""
    phase: Phase = nullcontext


def train_step(components: TrainComponents, batch: Batch, options: StepOptions) -> Losses:
    """Take one optimizer step on a normalized batch; leave weights and optimizer as they are if the step is not finite.

    With several ranks, `batch` is this rank's shard, and what is returned is of the whole batch.

    Returns:
        loss, its parts, the gradient's norm before clipping, and skipped: 1.0 where loss or norm is not finite, else
        0.0; as tensors on the device: reading one waits for it.
    """
    # On several ranks each loss is a share of the batch's, so gradients and losses are summed, not averaged.
    policy, optimizer = components.policy.train(), components.optimizer
    is_empty = not len(batch["action_is_pad"])
    batch, counts = _with_global_counts(batch)
    with options.phase("forward"), autocast(policy, options.precision), options.dropout(), empty_shard(is_empty):
        loss, parts = options.loss(policy, batch, counts)

    with options.phase("backward"):
        loss.backward()  # type: ignore[no-untyped-call]
        losses = {"loss": loss.detach(), **parts}
        all_reduce_sum([*losses.values(), *(p.grad for p in policy.parameters() if p.grad is not None)])
        grad_norm = clip_grad_norm_(policy.parameters(), options.grad_clip_norm or float("inf"))

    with options.phase("optimizer"):
        skipped = 1.0 - (losses["loss"].isfinite() & grad_norm.isfinite()).float()
        # The fused kernel then changes nothing, as under a GradScaler.
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
    return {**losses, "grad_norm": grad_norm, "skipped": skipped}


def _with_global_counts(shard: Batch) -> tuple[Batch, Tensor | None]:
    """Return this rank's shard and the global valid counts (None with a single process).

    An epoch's last batch may have nothing for a rank, which then takes a row of padding: that counts nothing.
    """
    if world_size() == 1:
        return shard, None
    if not len(shard["action_is_pad"]):
        shard = {key: value.new_zeros(1, *value.shape[1:]) for key, value in shard.items() if isinstance(value, Tensor)}
        shard["action_is_pad"] = ~shard["action_is_pad"]
    counts = valid_counts(shard)
    all_reduce_sum([counts])
    return shard, counts


class TrainStep:
    """`train_step` on the batches of a loader, transformed and normalized.

    Made for one policy and optimizer: a CUDA graph writes to the memory that theirs had when it was captured.

    Args:
        components: what is trained.
        loader: where batches are gathered.
        batch_size: rows of a full batch on this rank.
        options: loss, precision, transforms and so on.
        graphs: what captures full batches; None: nothing does.
    """

    def __init__(
        self,
        components: TrainComponents,
        loader: BatchLoader,
        batch_size: int,
        options: StepOptions,
        graphs: GraphBackend | None = None,
    ) -> None:
        self._components, self._loader, self._rows = components, loader, batch_size
        self._options, self._graphs = options, graphs
        self._full_batch_options = replace(options, loss=options.full_batch_loss or options.loss)
        self._device = torch.device(str(components.policy.config.device))
        self._rates = [torch.zeros((), device=self._device) for _ in components.optimizer.param_groups]
        self.batch: Callable[[BatchIndices], Batch] = self._batch
        """From `BatchLoader.iter_batches` to the batch for `__call__`; a replayed graph writes over its last."""
        self._update: Callable[[Batch], Losses] = self._plain_update
        if self._graphs is not None:
            self.batch = CudaGraphCallable("the batch", self._batch, self._rows, self._graphs)
            self._update = CudaGraphCallable(
                "the step", self._recordable_update, self._rows, self._graphs, components.optimizer.zero_grad
            )

    def __call__(self, batch: Batch) -> Losses:
        """Take a step, and the schedule's; a replayed graph's next step writes over what this one returns."""
        # A graph reads the learning rate from memory: the schedule's present rate goes there before the replay.
        if self._graphs is not None:
            for rate, group in zip(self._rates, self._components.optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
        losses = self._update(batch)
        if self._components.scheduler is not None:
            self._components.scheduler.step()
        return losses

    def _batch(self, inputs: BatchIndices) -> Batch:
        batch = self._loader.gather(inputs)
        # A rank may have no row of an epoch's last batch, and a transform needs not know of that.
        if len(inputs[INDEX]):
            batch = apply_transforms(batch, self._options.transforms)
        normalized: Batch = self._components.processors.pre(batch)
        return normalized

    def _plain_update(self, batch: Batch) -> Losses:
        # An epoch's last batch is short. It is neither compiled nor captured, which would be done for its size alone.
        is_full = len(batch["action_is_pad"]) == self._rows
        return train_step(self._components, batch, self._full_batch_options if is_full else self._options)

    def _recordable_update(self, batch: Batch) -> Losses:
        # Within self._device: LeRobot makes the latent of use_vae=false on the CPU, whose copy cannot be recorded.
        assert self._graphs is not None
        with self._device, capturable_lr(self._components.optimizer, self._rates, self._graphs.recording):
            return self._plain_update(batch)


def build_graph_backend(config: TrainConfig, device: torch.device) -> GraphBackend | None:
    """Return what captures a step on `device`, or None where nothing does.

    That is on the CPU, for train.profile, which looks into a step, and on several ranks, which reduce their gradients
    in the middle of it.
    """
    if device.type == "cuda" and world_size() > 1:
        log.info("%d ranks: a step is launched operation by operation, not as a CUDA graph", world_size())
    return CudaGraphs(device) if device.type == "cuda" and not config.profile and world_size() == 1 else None


def bind_loss(action_loss: ActionLoss | None, discount: float = 1.0) -> Loss:
    """Return `act_loss` with another loss of the actions in it, if one is given, and its errors weighted.

    Args:
        action_loss: as `pusht_act.run` takes it; None: ACT's L1.
        discount: the weight of a chunk's action relative to the one before it.
    """
    if action_loss is None and discount == 1.0:
        return act_loss
    bound = l1_loss if action_loss is None else checked_loss(action_loss)

    def loss(policy: ACTPolicy, batch: Batch, counts: Tensor | None = None) -> tuple[Tensor, Losses]:
        return act_loss(policy, batch, counts, bound, discount)

    return loss


def compile_loss(loss: Loss, config: TrainConfig, device: torch.device) -> Loss:
    """Return `loss`, compiled if train.compile, or else the device, says so.

    Raises:
        UserError: train.compile=true, and nothing can be compiled on this machine.
    """
    if not (device.type == "cuda" if config.compile is None else config.compile):
        return loss
    # What was compiled for another run of this process counts against the compiler's limit.
    torch.compiler.reset()
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # the compiler has many kinds
        reason = " ".join(str(error).split())[:200]
        if config.compile:
            raise UserError(
                f"train.compile=true: nothing can be compiled on this machine ({reason}): install a C++ compiler and "
                "Python's headers, or give train.compile=false"
            ) from error
        log.warning("nothing can be compiled on this machine (%s): the step is not, as by train.compile=false", reason)
        return loss
    compiled: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return compiled
