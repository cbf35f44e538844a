"""Dropout at a fifth of the time (train.fast_dropout), for CPUs, where its masks take a quarter of a step and more.

PyTorch's `bernoulli_` draws a number of its own for each element, 7 ns on one core. Here 64 random bits decide four.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lerobot.policies.act.configuration_act import ACTConfig
from torch import Tensor

from pusht_act.config.schema import TrainConfig
from pusht_act.policy.act import is_bf16
from pusht_act.runtime.errors import UserError

Dropout = Callable[[], AbstractContextManager[None]]
"""What the loss of a training step is computed within."""
VALUES = 2**16


def build_dropout(options: TrainConfig, policy: ACTConfig) -> Dropout:
    """`fast_dropout` if train.fast_dropout says so; null: where bf16 draws other numbers than stock's anyway.

    Raises:
        UserError: it does, and `policy` is on a GPU.
    """
    on_cpu = torch.device(str(policy.device)).type == "cpu"
    if options.fast_dropout and not on_cpu:
        raise UserError("train.fast_dropout=true is for a CPU, a GPU's dropout is as fast: leave it out")
    fast = options.fast_dropout
    if fast is None:
        fast = on_cpu and is_bf16(policy, options.precision) and not options.compile
    return fast_dropout if fast else nullcontext


@contextmanager
def fast_dropout() -> Iterator[None]:
    """Within this every dropout in training, attention's too, takes its masks from 16 random bits an element.

    They come from PyTorch's global generator, as its own do, but are other ones. Attention calls `F.dropout` amid a
    function of PyTorch's, where no module of ours can stand in for it; one in eval mode, in another thread, is not
    touched.
    """
    stock = F.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        dropped = round(p * VALUES)
        if not training or inplace or not 0 < dropped < VALUES:
            return stock(input, p, training, inplace)
        return input * _noise(input, dropped)

    F.dropout = dropout
    try:
        yield
    finally:
        F.dropout = stock


def _noise(like: Tensor, dropped: int) -> Float[Tensor, "..."]:
    """0 with a probability of `dropped` / VALUES, or else what keeps the mean at 1."""
    drawn = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    values = drawn.view(torch.int16)[: like.numel()].view(like.shape)
    noise = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(values, dropped - VALUES // 2, out=noise)
    return noise.mul_(VALUES / (VALUES - dropped))
