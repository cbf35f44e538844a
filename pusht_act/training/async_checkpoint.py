"""The checkpoints of a training run, written beside it.

    step S   a copy is taken: weights, optimizer, random streams, TrainerState     -> a thread: files, manifest, `last`
    step T   `best` pointed at the best, what is needed no more removed         <- whole, or a warning
    step U   the next save waits for it, and so do an evaluation and the end of the run, whatever that is

What follows a save goes by what was needed at S, so that files and checkpoints are those of a run that waits.
"""

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lerobot.configs.train import TrainPipelineConfig

from pusht_act.checkpoints import checkpoint_io as checkpoints
from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents, TrainerState
from pusht_act.checkpoints.retention import prune
from pusht_act.config.lerobot import LeRobotConfig, train_pipeline_config
from pusht_act.config.schema import Config
from pusht_act.runs.run_dir import RunDir
from pusht_act.training.async_evaluation import Evaluations

log = logging.getLogger(__name__)


@contextmanager
def saving(
    config: Config,
    lerobot: LeRobotConfig,
    run: RunDir,
    objects: TrainComponents,
    state: TrainerState,
    record: dict[str, Any],
    evaluations: Evaluations,
) -> Iterator["Saver"]:
    """A run's `Saver`; one that is under way in the end is finished, also where an error is the end."""
    # LeRobot's pipelines keep the batch at hand in themselves: training and the thread need one each.
    objects = replace(objects, processors=copy.deepcopy(objects.processors))
    train_config = train_pipeline_config(config, lerobot, state.wandb_run_id)
    with ThreadPoolExecutor(1, "saving") as thread:
        saver = Saver(config, run, objects, state, train_config, record, evaluations, thread)
        if state.step:  # a kill may have come between the save that the run goes on from and this
            saver.follow_up(evaluations.needed)
        try:
            yield saver
        finally:
            saver.collect(wait=True)


@dataclass
class Saver:
    """Saves checkpoints of `state`, one at a time."""

    config: Config
    run: RunDir
    objects: TrainComponents
    state: TrainerState
    train_config: TrainPipelineConfig
    record: dict[str, Any]
    evaluations: Evaluations
    thread: Executor
    newest: Checkpoint | None = None
    """The last one that is whole."""
    _coming: Future[Checkpoint] | None = None
    _step: int = 0
    _needed: tuple[int | None, ...] = ()

    def begin(self) -> None:
        """Save the present moment, that of `state.step`.

        Raises:
            OSError: the run's last checkpoint cannot be written.
        """
        self.collect(wait=True)
        beside = self.config.checkpoints.background and self.state.step < self.config.steps
        snapshot = checkpoints.snapshot(self.objects, self.state, to_cpu=beside)
        self._step, self._needed = self.state.step, self.evaluations.needed
        self._coming = self.thread.submit(checkpoints.save, self.run, snapshot, self.train_config, self.record)
        if not beside:
            self.collect(wait=True)

    def finished(self) -> Path | None:
        """The newest checkpoint that this process has saved, that under way included."""
        self.collect(wait=True)
        return self.newest.directory if self.newest else None

    def collect(self, wait: bool = False) -> None:
        """Do what follows a save, if it is over or `wait` says to wait for it; one that failed is a warning.

        Raises:
            OSError: it was the run's last.
        """
        if self._coming is None or not (wait or self._coming.done()):
            return
        try:
            self.newest = self._coming.result()
        except OSError as error:
            if self._step == self.config.steps:
                raise
            log.warning("step %d: %s; training goes on and the next save tries again", self._step, error)
            self.evaluations.not_saved(self._step)
        else:
            log.info("step %d: saved %s", self._step, self.newest.directory)
            self.follow_up(self._needed)
        finally:
            self._coming = None

    def follow_up(self, needed: tuple[int | None, ...]) -> None:
        """What comes after a save at whose moment the checkpoints of the steps `needed` were."""
        self.evaluations.saved(needed)
        prune(self.run, self.config.checkpoints, needed)
