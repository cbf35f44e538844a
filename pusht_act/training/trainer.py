"""The training loop: batches in, steps, metrics, evaluations and checkpoints out.

Every rank runs it. Rank 0 alone logs, evaluates and writes; at the end of each step all ranks agree on what is next.
"""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.checkpoints.state import TrainerState
from pusht_act.config.lerobot import LeRobotConfig
from pusht_act.config.schema import Config
from pusht_act.data.loader import Batch, BatchIndices, BatchLoader
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.evaluation.records import Evaluation
from pusht_act.policy.batch_norm import live_norms
from pusht_act.runs.loggers import LoggerCollection
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.distributed import agree, broadcast_from_main, is_main, world_size
from pusht_act.runtime.errors import DiskError
from pusht_act.runtime.malloc import keep_freed_memory
from pusht_act.runtime.seeding import statistics_generator
from pusht_act.runtime.signals import signals
from pusht_act.training.async_evaluation import AsyncEvaluator, async_evaluator, find_pending, is_due
from pusht_act.training.backbone_features import freeze
from pusht_act.training.checkpoint_manager import CheckpointManager, checkpoint_manager
from pusht_act.training.extensions import Extensions
from pusht_act.training.metric_accumulator import MetricAccumulator
from pusht_act.training.nan_guard import DivergedError, NanGuard
from pusht_act.training.profiler import NullProfiler, StepProfiler, profiling
from pusht_act.training.progress import ProgressBar
from pusht_act.training.restore import load_components, restore_state, rollback_target
from pusht_act.training.result import Report, TrainResult
from pusht_act.training.train_step import Losses, StepOptions, TrainStep, build_graph_backend
from pusht_act.training.validation import NORM_FRAMES, update_norms, validation_loss

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """A run: what is trained, and the loop that trains it. Made by `build_trainer`."""

    config: Config
    lerobot: LeRobotConfig
    components: TrainComponents
    state: TrainerState
    loader: BatchLoader
    sampler: EpisodeSampler
    held_out: Tensor
    """Frame numbers of the validation samples, [N]; empty without dataset.eval_split."""
    extensions: Extensions
    options: StepOptions
    start: Checkpoint | None
    """Where `state` stood when this was built or rolled back; None: the beginning."""
    pending_models: dict[int, Path]
    """The weights of each step in `state.pending`, whose evaluation is due."""
    step: int = field(init=False, default=0)
    """The present step, or the last one."""
    inputs: Generator[BatchIndices] = field(init=False)
    train_step: TrainStep = field(init=False)
    metrics: MetricAccumulator = field(init=False)
    progress: ProgressBar = field(init=False)
    is_frozen: bool = field(init=False, default=False)
    """Whether the backbone learns no more."""
    _norms_at: int = field(init=False, default=0)
    """The step whose weights the norms' statistics are those of."""

    def fit(self, run: RunDir, metadata: dict[str, Any], report: Report | None = None) -> TrainResult:
        """Train to `config.steps` and write everything into `run`.

        Args:
            run: the run directory; only rank 0 writes there.
            metadata: kept in every checkpoint, so that it can be resumed and evaluated on its own.
            report: is told of each evaluation, and whether to prune the run.

        Raises:
            DivergedError: training diverged, and rolling back has not helped or is not possible.
            OSError: the last checkpoint or evaluation cannot be written; an earlier one that fails is a warning.
            StopSignal: by a signal, at the end of a step, which is saved.
        """
        self.run, self.metadata, self.report = run, metadata | self.extensions.metadata(), report
        keep_freed_memory()
        self._began = time.monotonic() - self.state.elapsed_s
        with self._open_loggers():
            while True:
                try:
                    with self._open_managers():
                        if (result := self._fit()) is not None:
                            return result
                except DivergedError as error:
                    self.roll_back(error)

    def _fit(self) -> TrainResult | None:
        """Train to the last step, or to the one after which the backbone is frozen; None: there are more."""
        self.resume_due_evaluations()
        steps = range(self.state.step + 1, self.next_end + 1)
        for self.step in steps:
            batch = self.next_batch()
            # Forward, backward, all-reduce, clip, AdamW, schedule.
            losses = self.train_step(batch)
            self.update_average()
            self.update_metrics(losses)

            # Nothing that is not finite is logged, evaluated or saved.
            self.check_finite(batch)
            if self.is_due(self.config.log_freq) or self.is_last_step:
                self.log_metrics()
            if self.is_due(self.config.eval_steps):
                self.log_validation_loss()

            # Both work beside training, on rank 0. Saves are polled first: what was not saved cannot become `best`.
            self.poll_saves()
            self.evaluate()

            # Every rank hears of every rank's signals, and of what rank 0 wants.
            agreed = agree(self.wants_checkpoint(), self.is_pruned)
            ends = agreed.end or agreed.signal is not None
            if agreed.checkpoint or ends:
                self.save(batch)
            self.profiler.step()
            if ends:
                return self.finish(early=True)
        if self.next_end == self.config.steps:
            return self.finish()
        self.pause()
        return None

    def next_batch(self) -> Batch:
        """Gather, transform and normalize this rank's shard of the next batch."""
        self._step_began = time.perf_counter()
        with self.profiler.phase("data"):
            batch = self.train_step.batch(next(self.inputs))
        self._fetched = time.perf_counter()
        return batch

    def update_average(self) -> None:
        """Add the weights of this step to their average."""
        if self.components.ema is not None:
            with self.profiler.phase("ema"):
                self.components.ema.update(self.step)

    def update_metrics(self, losses: Losses) -> None:
        """Add the step's losses to the sums, which stay on the device until they are logged."""
        skipped = losses.pop("skipped")
        self.metrics.add({**losses, "dataloading_s": self._fetched - self._step_began}, skipped)
        self.progress.update(time.perf_counter() - self._step_began)

    def check_finite(self, batch: Batch) -> None:
        """Check the skipped steps before a line of metrics, and the weights before they are evaluated or saved."""
        uses_weights = self.evaluator.is_due(self.step) or self.checkpoints.is_due(self.step)
        if uses_weights or self.is_due(self.config.log_freq) or self.is_last_step:
            self.guard.check_skipped(self.step, self.metrics)
        if uses_weights:
            self.guard.check_finite(self.step, batch)

    def log_metrics(self) -> None:
        """Log the means since the last line, and start new ones."""
        with self.profiler.phase("logging"):
            self.means = {**self.metrics.means(), "lr": self.components.optimizer.param_groups[0]["lr"]}
            self._log("train", {**self.means, "samples_per_s": self.progress.rate * self.config.batch_size})
            self.progress.report(self.step, self.means)
            self.metrics = MetricAccumulator()

    def log_validation_loss(self) -> None:
        """Log the mean loss over the held-out frames."""
        # Deterministic in eval mode, so one rank does it for all.
        if is_main():
            self.update_norms()
            loss = validation_loss(
                self.components, self.loader, self.held_out, self.config.batch_size, self.options.loss
            )
            self._log("eval", {"loss": loss})
            log.info("step %d: validation loss %.4f", self.step, loss)

    def poll_saves(self) -> None:
        """Do what follows a save that is over."""
        with self.profiler.phase("saving"):
            self.checkpoints.poll()

    def evaluate(self) -> None:
        """Take the result of an evaluation that is over, and begin the one that is due."""
        if not is_main():
            return
        with self.profiler.phase("eval"):
            # An evaluation that is due waits for the one before, whose result may also prune the run.
            is_due = self.evaluator.is_due(self.step)
            self.evaluator.poll(wait=is_due or self.is_last_step)
            if is_due and not self.is_pruned:
                self.update_norms()
                self.evaluator.submit(self.step)

    def update_norms(self) -> None:
        """Make the statistics of live batch norms exact for the weights of this step, on rank 0, which alone uses them.

        They are those of training frames without transforms, which evaluation does not have either.
        """
        if self._norms_at == self.step or self.is_frozen or not live_norms(self.components.policy):
            return
        self._norms_at = self.step
        frames = self.sampler.draw(NORM_FRAMES, statistics_generator(self.config.seed, self.step))
        with self.profiler.phase("norms"):
            update_norms(self.components, self.loader, frames, self.config.batch_size)

    def wants_checkpoint(self) -> bool:
        """Return whether this rank asks for a checkpoint of this step."""
        # SLURM may ask for a checkpoint without stopping the job.
        signalled = signals.pop_checkpoint_request()
        freezes = self.step == self.config.train.freeze_backbone_at
        return signalled or freezes or self.checkpoints.is_wanted(self.step)

    def save(self, batch: Batch | None = None) -> None:
        """Save a checkpoint of this step, if it is finite."""
        # Only a save right after a resume has no batch, and nothing has changed since it was checked.
        if batch is not None:
            self.guard.check_skipped(self.step, self.metrics)
            self.guard.check_finite(self.step, batch)
        if self.config.save_checkpoint:
            if is_main():
                self.update_norms()
            with self.profiler.phase("saving"):
                self.update_state()
                self.checkpoints.submit()

    def update_state(self) -> None:
        """Note where the loop is."""
        self.state.step, self.state.sampler = self.step, self.sampler.state_dict()
        self.state.window, self.state.elapsed_s = self.metrics.sums(), self.elapsed_s

    def finish(self, early: bool = False) -> TrainResult:
        """Wait for the last checkpoint and return the result, or raise the signal that stopped the run."""
        self.checkpoints.wait()
        latest = self.checkpoints.latest
        if early:
            signals.raise_if_stopped(self.step, latest.directory if latest else None)
        if self.evaluator.error is not None:
            raise DiskError(self.evaluator.error)
        return TrainResult(self.step, self.means, latest, self.evaluator.latest, pruned=early)

    def pause(self) -> None:
        """Finish what works beside the loop: to freeze the backbone, all that holds on to it is opened anew."""
        self.evaluator.poll(wait=True)
        self.checkpoints.wait()
        self.start, self.pending_models = self.checkpoints.latest or self.start, {}
        if is_main():
            self.update_norms()
        self.update_state()

    def open_loader(self) -> BatchLoader:
        """Return the loader of the training batches: of features, once the backbone is frozen."""
        at = self.config.train.freeze_backbone_at
        self.is_frozen = at is not None and self.state.step >= at
        if not self.is_frozen:
            return self.loader
        return freeze(self.components, self.loader, self.sampler.frames, self.config.train)

    @property
    def next_end(self) -> int:
        """The last step, or the one after which the backbone is frozen."""
        last, at = self.config.steps, self.config.train.freeze_backbone_at
        return last if at is None or self.is_frozen else min(at, last)

    def resume_due_evaluations(self) -> None:
        """Evaluate what was due and not done when the run was stopped; save the last step, if that was all."""
        self.step, saves = self.state.step, False
        if is_main() and self.pending_models:
            for step, model_dir in self.pending_models.items():
                self.evaluator.poll(wait=True)
                self.evaluator.resume(step, model_dir, is_dropped=self.is_pruned)
            saves = self.step == self.config.steps and not self.state.pending
        # Rank 0 has opened the run directory; only now do the others begin a step.
        if agree(checkpoint=saves).checkpoint:
            self.save()

    def roll_back(self, error: DivergedError) -> None:
        """Go back to the latest valid checkpoint on every rank, with the data in another order from there on.

        Raises:
            DivergedError: there is none, or train.max_rollbacks is reached.
        """
        number = self.state.rollbacks + 1
        # Rank 0 chooses; if it finds none, its exit ends the others where they wait for the broadcast.
        given = str(self.extensions)
        target = rollback_target(self.config, self.run, self.start, error, number, given) if is_main() else None
        checkpoint: Checkpoint = broadcast_from_main(target)
        self.components = load_components(self.config, self.lerobot, checkpoint.model_dir)
        self.state = restore_state(self.config, self.lerobot, checkpoint, self.components, self.sampler)
        # The number is part of the data order's seed: the batches that broke training come in another order.
        self.state.rollbacks, self.state.skipped = number, 0
        self.sampler.load_state_dict(self.sampler.state_dict(), number)
        self.start, self.pending_models = checkpoint, find_pending(checkpoint, self.state, self.config)
        if self.loggers is not None:
            self.loggers.rewind(self.state.step, self.state.pending, number, error.step)

    def is_due(self, freq: int) -> bool:
        """Return whether this step is a multiple of `freq`; 0: never."""
        return is_due(self.step, freq)

    @property
    def is_last_step(self) -> bool:
        """Whether this is the run's last step."""
        return self.step == self.config.steps

    @property
    def is_pruned(self) -> bool:
        """Whether the pruner ends the run at this step, before its last."""
        return self._pruned and not self.is_last_step

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those before a resume included."""
        # A roll-back does not turn the clock back: what it repeats takes time, too.
        return round(time.monotonic() - self._began, 3)

    def on_evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Log the evaluation of `step`, report it, and let it compete for `best`."""
        self._log("eval", evaluation.metrics, step)
        if self.loggers is not None:
            self.loggers.log_videos("eval", evaluation.video_paths, evaluation.film_strip, step)
        log.info("step %d: %s", step, evaluation)
        # The study is told first: what it answers concerns the next step, not this result.
        self._pruned = self.report is not None and self.report(step, evaluation.metrics)
        self.checkpoints.update_best(step, list(evaluation.score))

    def on_saved(self, checkpoint: Checkpoint, step: int) -> None:
        """Upload a checkpoint that is there to stay, with the weights that are evaluated."""
        if self.loggers is not None:
            self.loggers.log_checkpoint(checkpoint.evaluated.model_dir, step)

    def _log(self, group: str, values: dict[str, float], step: int | None = None) -> None:
        if self.loggers is not None:
            self.loggers.log(group, values, self.step if step is None else step)

    @contextmanager
    def _open_loggers(self) -> Iterator[None]:
        self.loggers: LoggerCollection | None = None
        if not is_main():
            yield
            return
        state = self.state
        with LoggerCollection(
            self.config, self.run, state.step, state.wandb_run_id, state.pending, state.rollbacks
        ) as self.loggers:
            device = str(self.lerobot.policy.device)
            self.loggers.context = lambda: {"elapsed_s": self.elapsed_s, "device": device}
            yield

    @contextmanager
    def _open_managers(self) -> Iterator[None]:
        """Open what works beside the loop until the next roll-back; close it in reverse, saves before evaluations."""
        # What a roll-back starts anew.
        if self.loggers is not None:
            self.state.wandb_run_id = self.loggers.wandb_run_id
        self.metrics, self.means, self._pruned = MetricAccumulator(self.state.window), {}, False
        self._norms_at = self.state.step
        device, loader = str(self.lerobot.policy.device), self.open_loader()
        with ExitStack() as stack:
            enter = stack.enter_context
            # What has to be closed. The evaluator is opened before the checkpoints, which are then finished first.
            self.progress = enter(ProgressBar(self.config, self.state.step))
            self.profiler: StepProfiler | NullProfiler = enter(profiling(self.config.train.profile, self.run, device))
            self.evaluator: AsyncEvaluator = enter(
                async_evaluator(self.config, self.lerobot.env, self.components, self.state, self.run, self.on_evaluated)
            )
            self.checkpoints: CheckpointManager = enter(
                checkpoint_manager(self.config, self.lerobot, self.run, self.components, self.state, self.metadata)
            )
            self.checkpoints.on_saved = self.on_saved
            self.inputs = enter(closing(loader.iter_batches(self.sampler, self.config.batch_size)))
            # Rank 0 logs for all.
            until = "finishing this step, then saving it; Ctrl-C again leaves without that"
            enter(signals.defer(until if is_main() else ""))
            # What a step needs. It may hold on to the parameters, as a CUDA graph does.
            self.guard = NanGuard(self.config.train, self.components, self.state, self.options.loss)
            self.train_step = TrainStep(
                self.components,
                loader,
                self.config.batch_size // world_size(),
                replace(self.options, phase=self.profiler.phase),
                build_graph_backend(self.config.train, torch.device(device)),
            )
            yield
