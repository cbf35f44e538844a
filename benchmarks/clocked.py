"""One program under a clock: it notes when each optimizer step ended, and waits at the last for its memory to be read.

    python clocked.py '{"report": PATH, "steps": 50, ...}' PROGRAM [ARGUMENT ...]     (started by measure.py)

The clock ticks at PyTorch's own hook after `Optimizer.step`, for our loop after our step, whose replays from a CUDA
graph do not pass there; nothing else is changed. Programs: a console script beside the interpreter (pusht-act,
lerobot-train, lerobot-eval), run as it is; or, through `pusht-act` up to where its loop would begin,

    compute    our step on one batch over and over: no data, no logging
    eager      LeRobot's policy.forward, backward, clip, torch's plain AdamW, zero_grad, on batches made beforehand
"""

import atexit
import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

OURS = "pusht-act"
LOOPS = ("compute", "eager")
MB = 1 << 20
WAIT_S = 120  # for the one who reads the memory


class Clock:
    """When steps ended, in seconds of the machine's monotonic clock, which all processes share."""

    def __init__(self, report: Path, steps: int, every: int) -> None:
        self._report, self._steps, self._every = report, steps, every
        self._count, self._cuda_bytes, self._written = 0, 0, False
        self._ends: list[float] = []

    def tick(self, *_: Any) -> None:
        """After an optimizer's step; every so many of them are noted, once the device has done them."""
        import torch

        self._count += 1
        on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if on_cuda:  # stock resets the peak at every step
            self._cuda_bytes = max(self._cuda_bytes, torch.cuda.max_memory_allocated())
        if (self._count - 1) % self._every and self._count != self._steps:
            return
        if on_cuda:
            torch.cuda.synchronize()
        if (self._count - 1) % self._every == 0:
            self._ends.append(time.monotonic())
        if self._count == self._steps:
            self.write()
            released = self._report.with_suffix(".go")
            until = time.monotonic() + WAIT_S
            while not released.exists() and time.monotonic() < until:
                time.sleep(0.01)

    def write(self) -> None:
        """The report, once, complete as soon as it is there; also of a program that ends early."""
        if self._written:
            return
        self._written = True
        part = self._report.with_suffix(".part")
        part.write_text(json.dumps({"ends": self._ends, "every": self._every, "cuda_bytes": self._cuda_bytes}))
        part.replace(self._report)


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    program, arguments = sys.argv[2], sys.argv[3:]
    if options.get("cpus"):
        os.sched_setaffinity(0, options["cpus"])
    if options.get("steps"):
        clock = Clock(Path(options["report"]), options["steps"], options["every"])
        _tick_after_steps(program, clock)
        atexit.register(clock.write)
    if program in LOOPS:
        _replace_loop(program)
    if options.get("episodes"):
        _repeat_data(options["episodes"])
    if options.get("timed"):
        _time_evaluation(Path(options["report"]), options["videos"])
    script = Path(sys.executable).with_name(OURS if program in LOOPS else program)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _tick_after_steps(program: str, clock: Clock) -> None:
    if program in (OURS, "compute"):
        from pusht_act.training.train_step import TrainStep

        step = TrainStep.__call__

        def timed(self: TrainStep, batch: Any) -> Any:
            losses = step(self, batch)
            clock.tick()
            return losses

        TrainStep.__call__ = timed  # type: ignore[method-assign]
    else:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(clock.tick)


def _replace_loop(name: str) -> None:
    """Everything up to the loop is our command's own: data, policy, optimizer."""
    from pusht_act.training.trainer import Trainer

    loops: dict[str, Any] = {"compute": _compute, "eager": _eager}
    Trainer._fit = loops[name]  # type: ignore[method-assign]


def _compute(trainer: Any) -> None:
    batch = trainer.next_batch()
    for _ in range(trainer.config.steps):
        trainer.train_step(batch)
    sys.exit()


def _eager(trainer: Any) -> None:
    """The loop one would write first, in fp32, on the first batches of our order."""
    import torch
    from lerobot.policies.act.modeling_act import ACTPolicy

    lerobot, config = trainer.lerobot, trainer.config
    policy = ACTPolicy(lerobot.policy).to(lerobot.policy.device).train()
    optimizer = torch.optim.AdamW(
        policy.get_optim_params(),
        lr=lerobot.optimizer.lr,
        betas=tuple(lerobot.optimizer.betas),
        eps=lerobot.optimizer.eps,
        weight_decay=lerobot.optimizer.weight_decay,
    )
    pre, loader, sampler = trainer.components.processors.pre, trainer.loader, trainer.sampler
    batches = [pre(loader.batch(sampler.next_batch(config.batch_size))) for _ in range(16)]
    for i in range(config.steps):
        loss, _ = policy.forward(batches[i % len(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), lerobot.optimizer.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    sys.exit()


def _repeat_data(episodes: int) -> None:
    """Give our loop the data set over and over until it has so many episodes, from the cache like any other."""
    import numpy as np

    from pusht_act.data.cache import Allocate, BuiltDataset, FrameDataset, cache_root, load_or_build
    from pusht_act.data.open_dataset import open_dataset
    from pusht_act.training import build as build_module

    def repeated(config: Any, lerobot: Any) -> FrameDataset:
        frames = open_dataset(config, lerobot)
        which = np.arange(episodes) % len(frames.episodes)
        lengths = np.diff(frames.episodes, axis=1).ravel()[which]
        ends = np.cumsum(lengths)

        def build(allocate: Allocate) -> BuiltDataset:
            needed = sum(array.nbytes for array in frames.arrays.values()) / len(frames) * int(ends[-1])
            free = shutil.disk_usage(cache_root()).free
            if needed > free / 2:  # the disk is not for a benchmark to fill
                raise OSError(f"{episodes} episodes need {needed / MB:.0f} MB, there are {free / MB:.0f} MB free")
            specs = {key: ((int(ends[-1]), *array.shape[1:]), array.dtype.name) for key, array in frames.arrays.items()}
            arrays = allocate(f"repeating {frames.repo_id}, {episodes:,} episodes", specs)
            for key, array in frames.arrays.items():
                out = arrays[key]
                for start in range(0, len(out), len(array)):
                    out[start : start + len(array)] = array[: len(out) - start]
            return BuiltDataset(
                episodes=np.stack([ends - lengths, ends], axis=1),
                tasks=[frames.tasks[episode] for episode in which],
                features=frames.features,
                stats=frames.stats,
                fps=frames.fps,
            )

        return load_or_build(frames.repo_id, f"repeated-{frames.key}-{episodes}", build)

    build_module.open_dataset = repeated  # type: ignore[attr-defined]


def _time_evaluation(report: Path, videos: bool) -> None:
    """Seconds of stock's evaluation alone, its videos included: without imports and the loading of the policy."""
    from lerobot.scripts import lerobot_eval

    evaluate = lerobot_eval.eval_policy_all

    def timed(*arguments: Any, **options: Any) -> Any:
        if not videos:  # it has no flag for that
            options["max_episodes_rendered"] = 0
        start = time.monotonic()
        result = evaluate(*arguments, **options)
        report.write_text(json.dumps({"seconds": time.monotonic() - start}))
        return result

    lerobot_eval.eval_policy_all = timed


if __name__ == "__main__":
    main()
