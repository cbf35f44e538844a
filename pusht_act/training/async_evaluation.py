"""The evaluations of a training run, beside it or in its way, and which checkpoint is the best by them.

    step S   weights copied, checkpoint S saved with pending = S    -> a thread: rollouts, files
    step T   logged under step S, `best` pointed at S if it is      <- the result; the next evaluation waits for it
    T or on  the next save removes checkpoint S if it was for the evaluation alone and is not the best

A run that is stopped between S and T finds `pending` in its last checkpoint and evaluates checkpoint S again, so that
metrics, `best` and files come to those of a run that was not. A signal breaks off an evaluation, and a wait for one.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.common.train_utils import get_step_identifier
from lerobot.envs.configs import PushtEnv
from lerobot.policies.act.modeling_act import ACTPolicy
from safetensors.torch import load_model

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents, TrainerState
from pusht_act.checkpoints.manifest import find_corruption
from pusht_act.checkpoints.retention import remove, set_symlink
from pusht_act.config.schema import Config
from pusht_act.envs.vector_env import VectorEnv, make_vector_envs
from pusht_act.evaluation.evaluate import evaluate
from pusht_act.evaluation.records import Evaluation
from pusht_act.evaluation.rollout import Actor
from pusht_act.policy.act import Processors
from pusht_act.runs.loggers import Metrics
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.signals import StopSignal, interruptible, wait_interruptible

log = logging.getLogger(__name__)

Report = Callable[[int, dict[str, float]], bool]
"""Takes a step and the metrics of its evaluation; whether the run is not worth going on with."""


def is_due(step: int, every: int) -> bool:
    """Whether `step` is one of those `every` so many; 0: never."""
    return every > 0 and step % every == 0


@contextmanager
def evaluating(
    config: Config,
    env: PushtEnv,
    objects: TrainComponents,
    state: TrainerState,
    run: RunDir,
    metrics: Metrics,
    report: Report | None = None,
) -> Iterator["Evaluations"]:
    """A run's `Evaluations`, each told to `report`; one that is still under way in the end is broken off."""
    needed = config.eval_freq > 0 or state.pending is not None
    with make_vector_envs(config.eval, needed) as envs, ThreadPoolExecutor(1, "evaluation") as thread:
        try:
            # LeRobot's pipelines keep the batch at hand in themselves: training and the thread need one each.
            processors = copy.deepcopy(objects.processors)
            yield Evaluations(config, env, objects, processors, state, run, metrics, envs, thread, report)
        finally:
            for group in envs:
                group.close()


@dataclass
class Evaluations:
    """Evaluates the policy of a step, one at a time; keeps `state.best`, `state.pending` and `state.spare`."""

    config: Config
    env: PushtEnv
    objects: TrainComponents
    processors: Processors
    """A copy of those in `objects`."""
    state: TrainerState
    run: RunDir
    metrics: Metrics
    envs: list[VectorEnv]
    thread: Executor
    report: Report | None = None
    newest: Evaluation | None = None
    _hopeless: bool = False
    _coming: Future[Evaluation] | None = None
    _former_best: dict[str, Any] | None = None
    _not_saved: int | None = None

    def due(self, step: int) -> bool:
        """Whether the policy of `step` is to be evaluated."""
        return is_due(step, self.config.eval_freq) or (step == self.config.steps and self.config.eval_freq > 0)

    def gives_up(self, step: int) -> bool:
        """Whether the run is to end at `step`, before its last, as it is not worth going on with."""
        return self._hopeless and step < self.config.steps

    def begin(self, step: int) -> None:
        """Evaluate the policy as it is now, at `step`, unless a signal has broken off the wait for the one before."""
        if self.state.pending is not None:
            return
        policy = self.objects.policy
        self._start(step, copy.deepcopy(policy) if self._beside_training(step) else policy)

    def begin_again(self, model: Path) -> None:
        """Evaluate the weights in the folder `model`, those of step `state.pending`, as a resumed run has to.

        If the run was stopped while it waited for that evaluation, that of its own step follows.
        """
        step = self.state.pending
        assert step is not None
        policy = copy.deepcopy(self.objects.policy)  # a new one would draw random numbers that are the training's
        load_model(policy, model / "model.safetensors")
        self._start(step, policy)
        if step != self.state.step and self.due(self.state.step):
            self.collect(wait=True)
            self.begin(self.state.step)

    def collect(self, wait: bool = False) -> None:
        """Log the result, if it is there or `wait` says to wait for it, and point `best` at the best.

        After a signal nothing is waited for, and what is not there stays `state.pending`.

        Raises:
            Exception: what stopped the evaluation.
        """
        step = self.state.pending
        if self._coming is None or step is None:
            return
        if wait:
            _wait_for(self._coming)
        if not self._coming.done():
            return
        evaluation = self.newest = self._coming.result()
        self._coming = self.state.pending = None
        self.metrics.log("eval", evaluation.metrics, step)
        log.info("step %d: %s", step, evaluation)
        self._hopeless = self.report is not None and self.report(step, evaluation.metrics)
        best, score = self.state.best, list(evaluation.score)
        if step != self._not_saved and (best is None or score > best["score"]):
            self._former_best, self.state.best = best, {"step": step, "score": score}
            self._link_best()

    def wants_checkpoint(self, step: int, asked: bool) -> bool:
        """Whether `step` is evaluated, is the best or was `asked` for: to be saved, noted in `state.spare`."""
        wanted = asked or step in (self.state.pending, self._best_step)
        if wanted and step not in self.state.spare:
            self.state.spare.append(step)
        return wanted

    @property
    def needed(self) -> tuple[int | None, ...]:
        """The steps whose checkpoints the one of the present state builds on: itself, under evaluation, the best."""
        return self.state.step, self.state.pending, self._best_step

    def saved(self, needed: tuple[int | None, ...]) -> None:
        """After a save, what was `needed` at its moment: point `best` at the best, remove spare checkpoints."""
        self._link_best()
        newest = max(step for step in needed if step is not None)  # a later one is not saved yet
        for step in [step for step in self.state.spare if step not in needed and step < newest]:
            self.state.spare.remove(step)
            asked_for = is_due(step, self.config.save_freq) or is_due(step, self.config.checkpoints.keep_every)
            if not asked_for and (folder := self._folder(step)).is_dir():
                try:
                    remove(folder)
                except OSError as error:
                    log.warning("%s cannot be removed (%s): it stays", folder, error.strerror)

    def not_saved(self, step: int) -> None:
        """There is no checkpoint of `step`, so it cannot be the best."""
        self._not_saved = step
        if self._best_step == step:
            self.state.best = self._former_best

    def _beside_training(self, step: int) -> bool:
        more = max(step, self.state.step) < self.config.steps  # one that has all its steps may only have to evaluate
        return self.config.eval.background and more

    def _start(self, step: int, policy: ACTPolicy) -> None:
        self.state.pending = step
        if self._beside_training(step):
            self._coming = self.thread.submit(self._evaluate, step, policy, None)
        else:
            self._coming = Future()
            with suppress(StopSignal), interruptible():
                self._coming.set_result(self._evaluate(step, policy, f"evaluating {step}"))
            self.collect()

    def _evaluate(self, step: int, policy: ACTPolicy, description: str | None) -> Evaluation:
        options = self.config.eval
        directory = self.run.evaluation(step, options.start_seed, options.n_episodes)
        actor = Actor(policy, self.processors)
        return evaluate(actor, self.envs, self.env, options, directory=directory, description=description)

    @property
    def _best_step(self) -> int | None:
        return self.state.best["step"] if self.state.best is not None else None

    def _link_best(self) -> None:
        """A run that branched off may have its best elsewhere."""
        best = self._best_step
        if best is not None and (folder := self._folder(best)).is_dir():
            try:
                set_symlink(self.run, "best", folder.name)
            except OSError as error:
                log.warning("best cannot be pointed at %s: %s", folder, error.strerror)

    def _folder(self, step: int) -> Path:
        return self.run.checkpoints / str(get_step_identifier(step, self.config.steps))


def _wait_for(coming: Future[Evaluation]) -> None:
    """Until it is there, or there is a signal."""
    with suppress(StopSignal), interruptible():
        wait_interruptible(coming)


def unevaluated(start: Checkpoint, state: TrainerState, steps: int) -> Path | None:
    """The weights whose evaluation was cut short when `start` of `state` was the last checkpoint, if they are there.

    Where they are not, `state.pending` becomes None.
    """
    if state.pending is None:
        return None
    step = state.pending
    here = start.directory if step == state.step else start.directory.parent / get_step_identifier(step, steps)
    if (wrong := find_corruption(here)) is None:
        return here / "pretrained_model"
    log.warning("the evaluation of step %d was cut short and is left out: %s: %s", step, here, wrong)
    state.pending = None
    return None
