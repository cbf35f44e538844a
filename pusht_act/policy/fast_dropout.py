"""Draw dropout masks on a CPU in a fifth of the time (train.fast_dropout).

PyTorch's masks take a quarter of a training step or more: its `bernoulli_` draws one random number for each element,
7 ns on one core. Here 64 random bits decide four elements.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pusht_act.config.schema import TrainConfig
from pusht_act.policy.act import is_bf16
from pusht_act.policy.lerobot import ACTConfig
from pusht_act.runtime.errors import UserError

Dropout = Callable[[], AbstractContextManager[None]]
"""Makes the context in which a training step computes its loss."""
VALUES = 2**16
"""Number of values of the 16 random bits that decide an element."""


def build_dropout(options: TrainConfig, policy: ACTConfig) -> Dropout:
    """Return `fast_dropout` or a context that does nothing, as train.fast_dropout says.

    null takes the fast one in bf16 on a CPU, where the random numbers differ from stock LeRobot's in any case.

    Raises:
        UserError: train.fast_dropout=true with `policy` on a GPU.
    """
    on_cpu = torch.device(str(policy.device)).type == "cpu"
    if options.fast_dropout and not on_cpu:
        raise UserError("train.fast_dropout=true is for a CPU, and a GPU's dropout is as fast: leave it out")
    fast = options.fast_dropout
    if fast is None:
        fast = on_cpu and is_bf16(policy, options.precision) and not options.compile
    return fast_dropout if fast else nullcontext


@contextmanager
def fast_dropout() -> Iterator[None]:
    """Draw every dropout mask in this context, attention's included, from 16 random bits for each element.

    The bits come from PyTorch's global generator, as stock masks do, but the masks are different ones. Dropout in eval
    mode is left alone, also in another thread, where an evaluation may run meanwhile.
    """
    # PyTorch's attention calls `F.dropout` inside a function of its own, so replacing dropout modules would miss it.
    stock = F.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        dropped = round(p * VALUES)
        # Nothing to draw, or a case that does not occur in ACT.
        if not training or inplace or not 0 < dropped < VALUES:
            return stock(input, p, training, inplace)
        return input * _noise(input, dropped)

    F.dropout = dropout
    try:
        yield
    finally:
        F.dropout = stock


def _noise(like: Tensor, dropped: int) -> Float[Tensor, "..."]:
    """Return noise of mean 1 in the shape of `like`: 0 with probability `dropped` / VALUES, else one constant."""
    # One 64-bit draw holds the 16 bits of four elements.
    drawn = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    values = drawn.view(torch.int16)[: like.numel()].view(like.shape)
    noise = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(values, dropped - VALUES // 2, out=noise)
    return noise.mul_(VALUES / (VALUES - dropped))
