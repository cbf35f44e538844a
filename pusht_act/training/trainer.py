"""The training loop: batches in, steps, metrics, evaluations and checkpoints out."""

import logging
import math
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.config.lerobot import LeRobotConfig
from pusht_act.config.schema import Config
from pusht_act.data.loader import BatchLoader
from pusht_act.evaluation.records import Evaluation
from pusht_act.policy.act import act_loss, autocast
from pusht_act.runs.loggers import Metrics
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.distributed import Word, tell
from pusht_act.runtime.signals import defer_signals
from pusht_act.training.async_checkpoint import saving
from pusht_act.training.async_evaluation import evaluating, is_due
from pusht_act.training.build import Setup, make_step, roll_back
from pusht_act.training.metrics import MetricAccumulator
from pusht_act.training.nan_guard import DivergedError, check_finite
from pusht_act.training.profiler import profiling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What a finished run returns."""

    step: int
    metrics: dict[str, float]
    """Means of the last steps."""
    checkpoint: Checkpoint | None
    evaluation: Evaluation | None
    """The last one."""
    gave_up: bool = False
    """Whether it ended before its last step, as `Setup.report` had it."""


def train(config: Config, lerobot: LeRobotConfig, setup: Setup, run: RunDir, record: dict[str, Any]) -> Training:
    """Train from where `setup` stands to `config.steps`; everything written goes into `run`.

    `record` is kept in every checkpoint, so that it can be resumed and evaluated on its own.

    Raises:
        DivergedError: training did, and going back to a checkpoint has not helped or is not possible.
        OSError: the last checkpoint cannot be written; one before that fails is a warning.
        StopSignal: by a signal, at the end of a step, which is saved.
    """
    state = setup.state
    with Metrics(config, run, state.step, state.wandb_run_id, state.pending, state.rollbacks) as metrics:
        while True:
            try:
                return _train(config, lerobot, setup, run, record, metrics)
            except DivergedError as diverged:
                setup = roll_back(config, lerobot, setup, run, diverged)
                state = setup.state
                metrics.rolled_back(state.step, state.pending, state.rollbacks, diverged.step)


def _train(
    config: Config, lerobot: LeRobotConfig, setup: Setup, run: RunDir, record: dict[str, Any], metrics: Metrics
) -> Training:
    objects, state, order = setup.objects, setup.state, setup.order
    window = MetricAccumulator(state.window)
    means: dict[str, float] = {}
    state.wandb_run_id = metrics.wandb_run_id
    take_step = make_step(config, lerobot, setup)
    with (
        _Progress(config, state.step) as progress,
        profiling(config.train.profile, run, objects) as profile,
        evaluating(config, lerobot.env, objects, state, run, metrics, setup.report) as evaluations,
        saving(config, lerobot, run, objects, state, record, evaluations) as saver,
        closing(setup.data.iter_batches(order, config.batch_size)) as inputs,
        defer_signals() as stop,
    ):
        if setup.unevaluated is not None:
            evaluations.begin_again(setup.unevaluated)
            if config.save_checkpoint and state.step == config.steps and state.pending is None:
                saver.begin()
        for step in range(state.step + 1, config.steps + 1):
            began = time.perf_counter()
            tell(Word.STEP)
            batch = take_step.batch(next(inputs))
            fetched = time.perf_counter()
            profile.end("data")
            losses = take_step(batch)
            profile.end("optimizer")
            skipped = losses.pop("skipped")
            window.add({**losses, "dataloading_s": fetched - began}, skipped)
            progress.update(time.perf_counter() - began)

            last = step == config.steps
            logs = is_due(step, config.log_freq) or last
            evaluates = evaluations.due(step)
            saves = is_due(step, config.save_freq) or last
            if logs or evaluates or saves:
                check_finite(config.train, objects, state, window, batch if evaluates or saves else None, step)
            if logs:
                means = {**window.means(), "lr": objects.optimizer.param_groups[0]["lr"]}
                metrics.log("train", {**means, "samples_per_s": progress.rate * config.batch_size}, step)
                progress.report(step, means)
                window = MetricAccumulator()
            profile.end("logging")
            if is_due(step, config.eval_steps):
                _validate(config, setup, metrics, step)
            saver.collect(wait=evaluates)  # what was not saved cannot be the best
            evaluations.collect(wait=evaluates or last)
            if evaluates and not evaluations.gives_up(step):
                evaluations.begin(step)
            profile.end("eval")
            stops = stop.stop_requested or evaluations.gives_up(step)  # from here on a signal is the next step's
            wanted = stop.pop_checkpoint_request() or stops
            if wanted and not saves:
                check_finite(config.train, objects, state, window, batch, step)
            if config.save_checkpoint and (saves or evaluations.wants_checkpoint(step, wanted)):
                state.step, state.sampler, state.window = step, order.state_dict(), window.sums()
                saver.begin()
            profile.end_step("saving")
            if stops:
                stop.raise_if_stopped(step, saver.finished())
                return Training(step, means, saver.newest, evaluations.newest, gave_up=True)
    return Training(config.steps, means, saver.newest, evaluations.newest)


def _validate(config: Config, setup: Setup, metrics: Metrics, step: int) -> None:
    loss = validation_loss(setup.objects, setup.data, setup.held_out, config.batch_size)
    metrics.log("eval", {"loss": loss}, step)
    log.info("step %d: validation loss %.4f", step, loss)


def validation_loss(objects: TrainComponents, data: BatchLoader, indices: Tensor, batch_size: int) -> float:
    """Mean loss over the held-out frames in eval mode, batch by batch as stock LeRobot takes it (no KL term)."""
    policy, pre = objects.policy.eval(), objects.processors.pre
    with torch.inference_mode(), autocast(policy):
        losses = [act_loss(policy, pre(data.batch(part)))[0] for part in torch.split(indices, batch_size)]
    policy.train()
    return float(torch.stack(losses).mean())


class _Progress:
    """A bar where there is a terminal; everywhere a line at each log step."""

    def __init__(self, config: Config, start: int) -> None:
        self._steps = config.steps
        self._bar: tqdm[Any] = tqdm(total=config.steps, initial=start, desc=config.job_name, unit="step", disable=None)
        self._redirect = logging_redirect_tqdm()
        self._count, self._seconds = 0, 0.0

    def update(self, seconds: float) -> None:
        """One step more, which took `seconds`; evaluations and saves are not steps."""
        self._bar.update()
        self._count += 1
        self._seconds += seconds

    @property
    def rate(self) -> float:
        """Steps a second since the last report."""
        return self._count / max(self._seconds, 1e-9)

    def report(self, step: int, means: dict[str, float]) -> None:
        """The means, the rate and the time left, as a line and beside the bar."""
        left = time.strftime("%H:%M:%S", time.gmtime((self._steps - step) / max(self.rate, 1e-9)))
        seen = {"loss": math.nan, "grad_norm": math.nan, "dataloading_s": 0.0, **means}  # all may have been skipped
        log.info(
            "step %d/%d: loss %.4f, gradient norm %.2f, lr %.1e, %.1f steps/s (data %.0f %%), %s left%s",
            step, self._steps, seen["loss"], seen["grad_norm"], seen["lr"], self.rate,
            100 * seen["dataloading_s"] * self.rate, left,
            f"; {seen['skipped']:.0f} skipped, their loss or gradient was not finite" if "skipped" in seen else "",
        )  # fmt: skip
        self._bar.set_postfix(loss=f"{seen['loss']:.4f}")
        self._count, self._seconds = 0, 0.0

    def __enter__(self) -> "_Progress":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)
