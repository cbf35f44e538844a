"""CUDA graphs: capture what a function launches on the device once, and replay it by a single launch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

log = logging.getLogger(__name__)

WARM_UP = 3
"""Calls before a recording: libraries make their handles and choose their algorithms, AdamW makes its moments."""

Tensors = dict[str, Any]
"""Tensors by name; what else is among them is the same at every call."""


class GraphBackend(Protocol):
    """How a function is recorded."""

    recording: bool
    """Whether that is what is being done."""

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        """Run `function` as it will be recorded."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """What runs `function` again on the same memory, and the tensors that it then writes; runs nothing yet.

        Raises:
            RuntimeError: `function` does something that cannot be recorded, such as waiting for the device.
        """


class CudaGraphs:
    """Records with `torch.cuda.graph`.

    PyTorch's CUDA generator takes part by itself: a replay reads seed and offset from it, and moves it on by what the
    recording counted. On a stream of its own, as PyTorch's notes on graphs ask; "thread_local", because an evaluation
    in another thread may do meanwhile what a recording thread must not.
    """

    def __init__(self, device: torch.device) -> None:
        self.recording = False
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:  # noqa: D102
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), cudnn_benchmark():
            outputs = function()
        current.wait_stream(self._stream)
        return outputs

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:  # noqa: D102
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        generator = torch.cuda.default_generators[current.device_index]
        numbers = generator.clone_state()
        self.recording = True
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"), cudnn_benchmark():
                outputs = function()
        except RuntimeError:
            # A recording that broke off leaves its stream in place, and the generator waiting for its end.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(numbers)
            raise
        finally:
            self.recording = False
        return graph.replay, outputs


class CudaGraphCallable:
    """`function`, run as it is WARM_UP times, then recorded and replayed.

    Inputs of another number of rows, and everything after a recording that failed, which is logged, go to `function`.
    The tensors returned are those of the recording: the next call writes over them.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensors], Tensors],
        rows: int,
        recorder: GraphBackend,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._function, self._rows, self._recorder = name, function, rows, recorder
        self._undo = undo
        """Clears up what a recording that failed has left in `function`'s objects."""
        self._warm_up, self._failed = WARM_UP, False
        self._replay: Callable[[], None] | None = None
        self._inputs: Tensors = {}
        self._outputs: Tensors = {}

    def __call__(self, inputs: Tensors) -> Tensors:
        """What `function` returns."""
        if self._failed or len(next(iter(inputs.values()))) != self._rows:
            return self._function(inputs)
        # What is launched the first times is not what will be replayed: libraries still choose their algorithms.
        if self._warm_up:
            self._warm_up -= 1
            return self._recorder.warm_up(lambda: self._function(inputs))
        if self._replay is None:
            try:
                # These tensors are the recording's from now on; whoever gives the same ones again saves the copy.
                self._inputs = dict(inputs)
                self._replay, self._outputs = self._recorder.record(lambda: self._function(self._inputs))
            except RuntimeError as error:
                reason = str(_first(error)).partition("\n")[0]
                log.warning("%s cannot be a CUDA graph (%s): it is launched operation by operation", self._name, reason)
                self._failed, self._inputs = True, {}
                self._undo()
                return self._function(inputs)
        # A replay reads the memory that the recording read.
        for key, tensor in inputs.items():
            if isinstance(tensor, Tensor) and tensor is not self._inputs[key]:
                self._inputs[key].copy_(tensor, non_blocking=True)
        self._replay()
        return dict(self._outputs)


def _first(error: BaseException) -> BaseException:
    """What broke a recording; ending it raises once more, and only says that something did."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@contextmanager
def capturable_lr(optimizer: Optimizer, rates: list[Tensor], recording: bool) -> Iterator[None]:
    """Let `optimizer` read its learning rates from `rates`, as a replay must; outside they stay Python's numbers.

    Those are what schedules change and checkpoints hold. `recording` is what PyTorch calls capturable.
    """
    plain = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(lr=rate, capturable=recording)
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, plain, strict=True):
            group.update(values)


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN tries its convolutions and takes the fastest, as in stock training: here alone, since a graph keeps them.

    Evaluations then choose by rule, so that mode=eval repeats their numbers.
    """
    # A captured graph keeps the algorithms that were chosen while it was captured.
    former, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = former
