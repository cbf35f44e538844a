"""Where the time of a training step goes: a line in the log, and a trace of single operations.

steps 1 to 5     warm-up
steps 6 to 15    by the clock, the device waited for after each part          -> the line
steps 16 to 25   under torch.profiler, which makes everything slower           -> profile/trace.json
from then on     logging, evaluations and saves alone, which come seldom       -> the line again, at the end
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.config.schema import PROFILED_STEPS
from pusht_act.runs.run_dir import RunDir

log = logging.getLogger(__name__)

WARM_UP, CLOCKED = 5, 10
TRACED = PROFILED_STEPS - WARM_UP - CLOCKED
PARTS = ("data", "forward", "backward", "optimizer", "logging", "eval", "saving")
SELDOM = ("logging", "eval", "saving")


class Profile(Protocol):
    """What the loop tells as it goes."""

    def end(self, part: str) -> None:
        """One of PARTS is over; the next begins."""

    def end_step(self, part: str) -> None:
        """So is the step, with its last part."""


class Off:
    """Nobody asked."""

    def end(self, part: str) -> None:  # noqa: D102
        pass

    def end_step(self, part: str) -> None:  # noqa: D102
        pass


class On:
    """Measures; `train_step` does not know of it: hooks see where its forward and backward pass end."""

    def __init__(self, run: RunDir, objects: TrainComponents) -> None:
        self._folder = run.path / "profile"
        self._on_cuda = str(objects.policy.config.device).startswith("cuda")
        self._step, self._since = 0, time.perf_counter()
        self._seconds, self._steps = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
        self._trace: profile | None = None
        # Functions and not methods, which a copy of the policy would take along with all of this object.
        self._hooks = [
            objects.policy.model.register_forward_hook(lambda _module, _inputs, output: self._forward(output)),
            objects.optimizer.register_step_pre_hook(lambda *_: self.end("backward")),
        ]

    def end(self, part: str) -> None:  # noqa: D102
        if self._on_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part in self._clocked():
            self._seconds[part] += now - self._since
        self._since = now

    def end_step(self, part: str) -> None:  # noqa: D102
        self.end(part)
        for each in self._clocked():
            self._steps[each] += 1
        self._step += 1
        if self._step == WARM_UP + CLOCKED:
            log.info("profile: %s", str(self))
            for hook in self._hooks:
                hook.remove()
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it calls a machine without a GPU an error
            watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
            # The schedule has the steps named in the trace; without acc_events it warns.
            self._trace = profile(activities=watched, schedule=lambda _: ProfilerAction.RECORD, acc_events=True)
            self._trace.start()
        elif self._step == PROFILED_STEPS:
            self._write_trace()
        elif self._trace is not None:
            self._trace.step()
        self._since = time.perf_counter()

    def close(self) -> None:
        """At the end of the run, however that came."""
        for hook in self._hooks:
            hook.remove()
        if self._trace is not None:
            self._trace.stop()
        if self._step < PROFILED_STEPS:
            log.warning("profile: the run ended after %d steps, a trace needs %d", self._step, PROFILED_STEPS)
        elif any(self._seconds[part] for part in SELDOM):
            log.info("profile, with all that came since: %s", str(self))

    def __str__(self) -> str:
        means = {part: 1000 * self._seconds[part] / max(self._steps[part], 1) for part in PARTS}
        whole = sum(means.values())
        parts = (f"{part} {ms:.2f} ({100 * ms / max(whole, 1e-9):.0f} %)" for part, ms in means.items())
        return f"a step takes {whole:.2f} ms: {', '.join(parts)}"

    def _clocked(self) -> tuple[str, ...]:
        """The parts that are measured in the step at hand."""
        if WARM_UP <= self._step < WARM_UP + CLOCKED:
            return PARTS
        return SELDOM if self._step >= PROFILED_STEPS else ()

    def _forward(self, output: Any) -> None:
        """The gradient of the actions is the backward pass's first result but for the loss's own."""
        actions = output[0]
        if actions.requires_grad:
            actions.register_hook(lambda _gradient: self.end("forward"))

    def _write_trace(self) -> None:
        assert self._trace is not None
        self._trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "trace.json"
        self._trace.export_chrome_trace(str(path))
        self._trace = None
        log.info("profile: wrote %s, %d steps for chrome://tracing or ui.perfetto.dev", path, TRACED)


@contextmanager
def profiling(wanted: bool, run: RunDir, objects: TrainComponents) -> Iterator[Profile]:
    """What the loop is to call; it does nothing unless `wanted`."""
    if not wanted:
        yield Off()
        return
    on = On(run, objects)
    try:
        yield on
    finally:
        on.close()
