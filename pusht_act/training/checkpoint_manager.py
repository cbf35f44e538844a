"""The checkpoints of a training run: written beside it, linked by `last` and `best`, removed when they are not kept.

`best` is that of the evaluation with the highest success rate, then the highest mean max reward (`update_best`).

    step S   a copy is taken: weights, optimizer, random streams, TrainerState      -> a thread: files, manifest, `last`
    step T   `best` is linked, and what nothing builds on any more is removed      <- written, or a warning
    step U   the next save waits for it, and so do an evaluation and the end of the run, however it ends

What follows a save goes by what the run built on at S, so that files and checkpoints are those of a run that waits.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusht_act.checkpoints import checkpoint_io
from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents, step_name
from pusht_act.checkpoints.retention import prune, set_pointer
from pusht_act.checkpoints.state import Best, TrainerState
from pusht_act.config.lerobot import LeRobotConfig, TrainPipelineConfig, train_pipeline_config
from pusht_act.config.schema import Config
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.atomic import remove_dir
from pusht_act.runtime.distributed import is_main
from pusht_act.training.async_evaluation import is_due

log = logging.getLogger(__name__)

Steps = tuple[int | None, ...]


@contextmanager
def checkpoint_manager(
    config: Config,
    lerobot: LeRobotConfig,
    run: RunDir,
    components: TrainComponents,
    state: TrainerState,
    metadata: dict[str, Any],
) -> Iterator["CheckpointManager"]:
    """Open a run's checkpoint manager; finish the save that is under way at the end, also where an error is the end."""
    # LeRobot's pipelines keep the batch at hand in themselves: training and the thread need one each.
    components = replace(components, processors=copy.deepcopy(components.processors))
    train_config = train_pipeline_config(config, lerobot, state.wandb_run_id)
    with ThreadPoolExecutor(1, "saving") as thread:
        manager = CheckpointManager(config, run, components, state, train_config, metadata, thread)
        # A kill may have come between the save that the run resumes from and what follows it.
        if state.step and is_main():
            manager.clean_up(manager.protected_steps)
        try:
            yield manager
        finally:
            manager.wait()


@dataclass
class CheckpointManager:
    """Saves checkpoints of `state`, one at a time; keeps `state.best` and `state.spare`, the temporary ones."""

    config: Config
    run: RunDir
    components: TrainComponents
    state: TrainerState
    train_config: TrainPipelineConfig
    metadata: dict[str, Any]
    thread: Executor
    on_saved: Callable[[Checkpoint, int], None] | None = None
    """Takes each checkpoint that save_freq asks for, and its step."""
    latest: Checkpoint | None = None
    """The last one that is written."""
    _future: Future[Checkpoint] | None = None
    _step: int = 0
    _protected: Steps = ()
    _former_best: Best | None = None
    _failed: int | None = None
    _folder_id: tuple[int, int] | None = None
    """Of the run directory."""

    def __post_init__(self) -> None:
        self._folder_id = self.run.folder_id()

    def is_due(self, step: int) -> bool:
        """Return whether save_freq asks for a checkpoint of `step`; the last step always has one."""
        return is_due(step, self.config.save_freq) or step == self.config.steps

    def is_wanted(self, step: int) -> bool:
        """Return whether `step` is due, to be evaluated or the best."""
        return self.config.save_checkpoint and (self.is_due(step) or step in (*self.state.pending, self._best_step))

    @property
    def protected_steps(self) -> Steps:
        """The steps that must not be deleted: the present one, those still to be evaluated, the best."""
        return self.state.step, *self.state.pending, self._best_step

    def submit(self) -> None:
        """Save the present moment, that of `state.step`; a collective, since each rank's random streams are saved.

        One that is not due is temporary: it goes at a later save, unless it is the best.

        Raises:
            OSError: the run's last checkpoint cannot be written.
        """
        if not is_main():
            checkpoint_io.rng_states()
            return
        self.wait()
        step = self.state.step
        if not self.is_due(step) and step not in self.state.spare:
            self.state.spare.append(step)
        in_background = self.config.checkpoints.background and step < self.config.steps
        snapshot = checkpoint_io.snapshot(self.components, self.state, to_cpu=in_background)
        self._step, self._protected = step, self.protected_steps
        self._future = self.thread.submit(self._save, snapshot)
        if not in_background:
            self.wait()

    def poll(self) -> None:
        """Do what follows a save, if it is over.

        Raises:
            OSError: it was the run's last, and failed.
        """
        if self._future is not None and self._future.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way, and do what follows it; one that failed is a warning.

        Raises:
            OSError: it was the run's last.
        """
        if self._future is None:
            return
        try:
            self.latest = self._future.result()
        except OSError as error:
            if self._step == self.config.steps:
                raise
            log.warning("step %d: %s; training continues and the next save tries again", self._step, error)
            self._on_save_failed()
        else:
            log.info("step %d: saved %s", self._step, self.latest.directory)
            if self.on_saved is not None and self.is_due(self._step):
                self.on_saved(self.latest, self._step)
            self.clean_up(self._protected)
        finally:
            self._future = None

    def update_best(self, step: int, score: list[float]) -> None:
        """Make `step` the best if its `score` is higher than any before and its checkpoint was not lost."""
        self.wait()
        best = self.state.best
        if step != self._failed and (best is None or score > best["score"]):
            self._former_best, self.state.best = best, {"step": step, "score": score}
            self._link_best()

    def clean_up(self, protected: Steps) -> None:
        """Link `best`, then remove the checkpoints that are not kept, but none of the steps `protected`."""
        self._link_best()
        # A temporary checkpoint of a later step than these is not written yet.
        newest = max(step for step in protected if step is not None)
        for step in [step for step in self.state.spare if step not in protected and step < newest]:
            self.state.spare.remove(step)
            asked_for = is_due(step, self.config.save_freq) or is_due(step, self.config.checkpoints.keep_every)
            if not asked_for and (folder := self._folder(step)).is_dir():
                try:
                    remove_dir(folder)
                except OSError as error:
                    log.warning("%s cannot be removed (%s): it stays", folder, error.strerror)
        prune(self.run, self.config.checkpoints, protected)

    def _save(self, snapshot: checkpoint_io.Snapshot) -> Checkpoint:
        self.run.check_folder(self._folder_id)
        return checkpoint_io.save(self.run, snapshot, self.train_config, self.metadata)

    def _on_save_failed(self) -> None:
        """Forget the step: without a checkpoint it cannot be the best."""
        self._failed = self._step
        if self._best_step == self._step:
            self.state.best = self._former_best

    @property
    def _best_step(self) -> int | None:
        return self.state.best["step"] if self.state.best is not None else None

    def _link_best(self) -> None:
        # A run that branched off may have its best elsewhere.
        best = self._best_step
        if best is not None and (folder := self._folder(best)).is_dir():
            try:
                set_pointer(self.run, "best", folder.name)
            except OSError as error:
                log.warning("best cannot be pointed at %s: %s", folder, error.strerror)

    def _folder(self, step: int) -> Path:
        return self.run.checkpoints / step_name(step, self.config.steps)
