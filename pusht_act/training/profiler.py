"""Where the time of a training step goes: a line in the log and a trace, both from torch.profiler.

steps 1 to 10    not profiled: kernels are chosen and caches filled
steps 11 to 15   profiled and thrown away, since the profiler itself starts slowly
steps 16 to 25   recorded                                  -> the line and profile/trace.json
from then on     logging, evaluations and saves, timed by the clock since they are rare -> the line again, at the end

The profiler slows every operation down a little, so the line's shares say more than its milliseconds.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from pusht_act.config.schema import PROFILED_STEPS
from pusht_act.runs.run_dir import RunDir

log = logging.getLogger(__name__)

WARMUP, RECORDED = 5, 10
PHASES = ("data", "forward", "backward", "optimizer", "logging", "eval", "saving")
RARE = ("logging", "eval", "saving")


class NullProfiler:
    """Take what the training loop tells a profiler, and measure nothing."""

    def phase(self, _name: str) -> AbstractContextManager[None]:
        """Measure what runs within as one of PHASES."""
        return nullcontext()

    def step(self) -> None:
        """End a training step, after its last phase."""


class StepProfiler:
    """Measure the phases of each step on `device`, and write the trace into the run directory."""

    def __init__(self, run: RunDir, device: str) -> None:
        self._path = run.path / "profile" / "trace.json"
        self._on_cuda = device.startswith("cuda")
        self._steps = 0
        self._ms, self._rare_ms = dict.fromkeys(PHASES, 0.0), dict.fromkeys(RARE, 0.0)
        # It calls a machine without a GPU an error.
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])],
            schedule=schedule(wait=PROFILED_STEPS - WARMUP - RECORDED, warmup=WARMUP, active=RECORDED, repeat=1),
            on_trace_ready=self._report,
            acc_events=True,  # without it torch warns of a second cycle, which there is not
        )
        self._profiler.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs within as `name`, one of PHASES."""
        began = time.perf_counter()
        with record_function(name):
            yield
            # The host only launches kernels: without waiting, their time would count for a later phase.
            if self._on_cuda:
                torch.cuda.synchronize()
        if name in RARE and self._steps >= PROFILED_STEPS:
            self._rare_ms[name] += 1000 * (time.perf_counter() - began)

    def step(self) -> None:
        """End a training step, after its last phase."""
        self._steps += 1
        self._profiler.step()

    def close(self) -> None:
        """End the profile, whether the run is complete or not."""
        self._profiler.stop()
        if self._steps < PROFILED_STEPS:
            log.warning("profile: the run ended after %d steps, a trace needs %d", self._steps, PROFILED_STEPS)
        elif any(self._rare_ms.values()):
            # Recorded steps count as any other for the mean of a rare phase.
            steps = RECORDED + self._steps - PROFILED_STEPS
            rare = {name: (RECORDED * self._ms[name] + ms) / steps for name, ms in self._rare_ms.items()}
            log.info("profile, with all that came since: %s", _line(self._ms | rare))

    def _report(self, recorded: profile) -> None:
        """Log the line and write the trace; do neither for a run that ended while it was recorded."""
        if self._steps < PROFILED_STEPS:
            return
        for event in recorded.key_averages():
            if event.key in self._ms:
                self._ms[event.key] += event.cpu_time_total / 1000 / RECORDED
        log.info("profile: %s", _line(self._ms))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._path))
        log.info("profile: wrote %s, %d steps for chrome://tracing or ui.perfetto.dev", self._path, RECORDED)


@contextmanager
def profiling(wanted: bool, run: RunDir, device: str) -> Iterator[StepProfiler | NullProfiler]:
    """Give the training loop its profiler, a NullProfiler unless `wanted`."""
    if not wanted:
        yield NullProfiler()
        return
    profiler = StepProfiler(run, device)
    try:
        yield profiler
    finally:
        profiler.close()


def _line(ms: dict[str, float]) -> str:
    whole = sum(ms.values())
    phases = (f"{name} {each:.2f} ({100 * each / max(whole, 1e-9):.0f} %)" for name, each in ms.items())
    return f"a step takes {whole:.2f} ms: {', '.join(phases)}"
