"""One training step, from frame numbers to updated weights, as fast as the device allows.

  inputs -> gather -> normalize -> batch -> forward, loss, backward -> clip -> AdamW -> losses, on the device
           [      one graph      ]         [       compiled        ]
                                           [             another graph             ]

plain       operation after operation: what the tests compare with stock LeRobot, and every batch of another size than
            batch_size, such as an epoch's last
compiled    the loss (forward, masks, KL) and its gradient as fused kernels (train.compile)
captured    on CUDA (capture.py): the host has two launches a step to make in place of hundreds
added up    with several processes, which are not captured: each has the loss and gradient of its share of the batch
            (distributed.py), of which the sum is the batch's; all make the same update

Which of them a step is follows from the configuration and the batch's size. A resumed run warms up and captures anew,
which changes nothing: warm-up launches the kernels that a replay does, on the same random numbers, and the generator's
state in a checkpoint is that after the last step either way. What is not exact to the bit on CUDA is what each process
chooses by timing: cuDNN its algorithms, the compiler the block sizes of its reductions. On the CPU nothing is timed.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.config.schema import TrainConfig
from pusht_act.data.loader import Batch, BatchIndices, BatchLoader
from pusht_act.policy.act import act_loss, autocast, valid_counts
from pusht_act.policy.fast_dropout import Dropout
from pusht_act.runtime.distributed import all_reduce_sum, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.training.cuda_graphs import CudaGraphCallable, CudaGraphs, Recorder, capturable_lr

log = logging.getLogger(__name__)

Losses = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Losses]]
"""As policy.act_loss."""


def train_step(
    objects: TrainComponents,
    batch: Batch,
    grad_clip_norm: float,
    precision: str | None = None,
    loss: Loss = act_loss,
    dropout: Dropout = nullcontext,
) -> Losses:
    """One optimizer step on a normalized batch; weights and optimizer stay as they are if it broke.

    Of several processes, on this one's share of it; what is returned is of the whole.

    Returns:
        loss, its parts, the gradient's norm before clipping, and skipped: 1.0 where loss or norm is not finite, else
        0.0; as tensors on the device: reading one waits for it.
    """
    policy = objects.policy.train()
    batch, counts = _with_global_counts(batch)
    with autocast(policy, precision), dropout():
        value, parts = loss(policy, batch, counts)
    value.backward()  # type: ignore[no-untyped-call]
    losses = {"loss": value.detach(), **parts}
    all_reduce_sum([*losses.values(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    grad_norm = clip_grad_norm_(policy.parameters(), grad_clip_norm if grad_clip_norm > 0 else float("inf"))
    skipped = 1.0 - (losses["loss"].isfinite() & grad_norm.isfinite()).float()
    objects.optimizer.found_inf = skipped  # type: ignore[attr-defined] # the fused kernel's, as GradScaler sets it
    objects.optimizer.step()
    objects.optimizer.zero_grad()
    return {**losses, "grad_norm": grad_norm, "skipped": skipped}


def _with_global_counts(share: Batch) -> tuple[Batch, Tensor | None]:
    """`share`, and the counts of the batch it is of; None where that is all of it.

    An epoch's last batch may have nothing for a process, which then takes a row of padding: that counts nothing.
    """
    if world_size() == 1:
        return share, None
    if not len(share["action_is_pad"]):
        share = {key: value.new_zeros(1, *value.shape[1:]) for key, value in share.items() if isinstance(value, Tensor)}
        share["action_is_pad"] = ~share["action_is_pad"]
    counts = valid_counts(share)
    all_reduce_sum([counts])
    return share, counts


class TrainStep:
    """`train_step` on the batches of `samples`; captured by `recorder` if there is one.

    Made for one policy and optimizer: a recording writes to the memory that theirs had.
    """

    def __init__(
        self,
        objects: TrainComponents,
        samples: BatchLoader,
        batch_size: int,
        grad_clip_norm: float,
        precision: str | None = None,
        loss: Loss = act_loss,
        recorder: Recorder | None = None,
        dropout: Dropout = nullcontext,
    ) -> None:
        self._objects, self._samples, self._rows = objects, samples, batch_size
        self._clip, self._precision, self._recorder = grad_clip_norm, precision, recorder
        self._loss, self._dropout = loss, dropout
        self._device = torch.device(objects.policy.config.device)
        self._rates = [torch.zeros((), device=self._device) for _ in objects.optimizer.param_groups]
        self.batch: Callable[[BatchIndices], Batch] = self._batch
        """From `BatchLoader.iter_batches` to the normalized batch for `__call__`; a recording writes over its last."""
        self._update: Callable[[Batch], Losses] = self._plain_update
        if recorder is not None:
            self.batch = CudaGraphCallable("the batch", self._batch, self._rows, recorder)
            self._update = CudaGraphCallable(
                "the step", self._recordable_update, self._rows, recorder, objects.optimizer.zero_grad
            )

    def __call__(self, batch: Batch) -> Losses:
        """A step, and the schedule's; what `train_step` returns, which a recording's next step writes over."""
        if self._recorder is not None:
            for rate, group in zip(self._rates, self._objects.optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
        losses = self._update(batch)
        if self._objects.scheduler is not None:
            self._objects.scheduler.step()
        return losses

    def _batch(self, inputs: BatchIndices) -> Batch:
        batch: Batch = self._objects.processors.pre(self._samples.gather(inputs))
        return batch

    def _plain_update(self, batch: Batch) -> Losses:
        loss = self._loss if len(batch["action_is_pad"]) == self._rows else act_loss  # compiled for one size alone
        return train_step(self._objects, batch, self._clip, self._precision, loss, self._dropout)

    def _recordable_update(self, batch: Batch) -> Losses:
        # Within self._device: LeRobot makes the latent of use_vae=false on the CPU, whose copy cannot be recorded.
        assert self._recorder is not None
        with self._device, capturable_lr(self._objects.optimizer, self._rates, self._recorder.recording):
            return self._plain_update(batch)


def build_graph_backend(options: TrainConfig, device: torch.device) -> Recorder | None:
    """What captures a step on `device`; None on the CPU, for train.profile, which looks into a step, and where several
    processes add up their gradients in its middle.
    """
    if device.type == "cuda" and world_size() > 1:
        log.info("%d processes: a step is launched operation by operation, not as a CUDA graph", world_size())
    return CudaGraphs(device) if device.type == "cuda" and not options.profile and world_size() == 1 else None


def build_loss(options: TrainConfig, device: torch.device) -> Loss:
    """`act_loss`, compiled if train.compile, or else the device, says so.

    Raises:
        UserError: train.compile=true, and nothing can be compiled on this machine.
    """
    if not (device.type == "cuda" if options.compile is None else options.compile):
        return act_loss
    torch.compiler.reset()  # what was compiled for another run of this process: only so many are kept
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # the compiler has many kinds
        reason = " ".join(str(error).split())[:200]
        if options.compile:
            raise UserError(
                f"train.compile=true: nothing can be compiled on this machine ({reason}): install a C++ compiler and "
                "Python's headers, or give train.compile=false"
            ) from error
        log.warning("nothing can be compiled on this machine (%s): the step is not, as by train.compile=false", reason)
        return act_loss
    loss: Loss = torch.compile(act_loss, fullgraph=True, dynamic=False)
    return loss
