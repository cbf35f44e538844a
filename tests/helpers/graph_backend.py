"""What a CUDA graph does, on the CPU: the operations of a function, recorded below autograd and replayed.

As on CUDA, Python runs at the recording alone, its numbers are recorded as they were, every tensor keeps its memory,
random operations draw from the generator at each replay, and what waits for the device breaks the recording.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusht_act.training.cuda_graphs import Tensors

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITS:
            raise RuntimeError(f"{function} waits for the device")
        outputs = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, outputs, torch.is_grad_enabled()))
        return outputs


class Operations:
    """A `Recorder`."""

    def __init__(self) -> None:
        self.recording = False
        self.recorded = 0

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        return function()

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        self.recording = True
        try:
            with _Operations() as operations:
                outputs = function()
        except RuntimeError:
            raise RuntimeError("the recording was broken off")  # noqa: B904 (as CUDA says at its end)
        finally:
            self.recording = False
        self.recorded += 1
        first = True

        def replay() -> None:
            nonlocal first
            if first:  # unlike on CUDA, recording has run it
                first = False
                return
            for operation, args, kwargs, outputs, grad in operations.done:
                with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(grad):
                    for new, old in zip(tree_leaves(operation(*args, **kwargs)), tree_leaves(outputs), strict=True):
                        if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                            old.copy_(new)

        return replay, outputs
