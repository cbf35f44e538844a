"""The evaluations of a training run, beside it or in its way.

    step S   weights copied, checkpoint S saved with pending = S    -> a thread: rollouts, files
    step T   the result is handed on; the next evaluation waits for it

A run that is stopped between S and T finds `pending` in its last checkpoint and evaluates checkpoint S again, so that
metrics, `best` and files come to those of a run that was not. A signal interrupts an evaluation, and a wait for one.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_model

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents, TrainerState, step_name
from pusht_act.checkpoints.manifest import find_corruption
from pusht_act.config.lerobot import PushtEnv
from pusht_act.config.schema import Config
from pusht_act.envs.vector_env import VectorEnv, make_vector_envs
from pusht_act.evaluation.evaluate import evaluate
from pusht_act.evaluation.records import Evaluation
from pusht_act.evaluation.rollout import Actor
from pusht_act.policy.act import Processors
from pusht_act.policy.lerobot import ACTPolicy
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.distributed import is_main
from pusht_act.runtime.signals import StopSignal, signals

log = logging.getLogger(__name__)

OnResult = Callable[[int, Evaluation], None]
"""Takes the step whose policy was evaluated, and the result."""


def is_due(step: int, freq: int) -> bool:
    """Return whether `step` is a multiple of `freq`; 0: never."""
    return freq > 0 and step % freq == 0


@contextmanager
def async_evaluator(
    config: Config,
    env: PushtEnv,
    components: TrainComponents,
    state: TrainerState,
    run: RunDir,
    on_result: OnResult,
) -> Iterator["AsyncEvaluator"]:
    """Open a run's evaluator; interrupt what is still under way at the end."""
    needed = is_main() and (config.eval_freq > 0 or state.pending is not None)
    # The environments' worker processes start here, while training begins.
    with make_vector_envs(config.eval, needed) as envs, ThreadPoolExecutor(1, "evaluation") as thread:
        # LeRobot's pipelines keep the batch at hand in themselves: training and the thread need one each.
        processors = copy.deepcopy(components.processors)
        try:
            yield AsyncEvaluator(config, env, components, processors, state, run, envs, thread, on_result)
        finally:
            for group in envs:
                group.close()


@dataclass
class AsyncEvaluator:
    """Evaluates the policy of a step, one at a time; keeps `state.pending`, the step under evaluation."""

    config: Config
    env: PushtEnv
    components: TrainComponents
    processors: Processors
    """A copy of those in `components`."""
    state: TrainerState
    run: RunDir
    envs: list[VectorEnv]
    thread: Executor
    on_result: OnResult
    """Called in the training's thread, in the order of the steps."""
    latest: Evaluation | None = None
    _future: Future[Evaluation] | None = None

    def is_due(self, step: int) -> bool:
        """Return whether the policy of `step` is to be evaluated: at each eval_freq, and at the end."""
        return is_due(step, self.config.eval_freq) or (step == self.config.steps and self.config.eval_freq > 0)

    def submit(self, step: int) -> None:
        """Evaluate the policy as it is now, at `step`, once the evaluation before it is over.

        Unless a signal interrupts that wait: then the run stops, and its next start evaluates both.
        """
        # One at a time: a second copy of the policy and of the environments would take their memory twice.
        self.poll(wait=True)
        if self.state.pending is not None:
            return
        policy = self.components.policy
        self._start(step, copy.deepcopy(policy) if self._runs_beside_training(step) else policy)

    def resume_pending(self, model_dir: Path) -> None:
        """Evaluate the weights in `model_dir`, those of step `state.pending`, as a resumed run has to.

        If the run was stopped while it waited for that evaluation, the one of its own step follows.
        """
        step = self.state.pending
        assert step is not None
        # A copy: a new policy would draw random numbers that are training's.
        policy = copy.deepcopy(self.components.policy)
        load_model(policy, model_dir / "model.safetensors")
        self._start(step, policy)
        if step != self.state.step and self.is_due(self.state.step):
            self.submit(self.state.step)

    def poll(self, wait: bool = False) -> None:
        """Hand the result on, if it is there or `wait` says to wait for it.

        After a signal nothing is waited for, and what is not there stays `state.pending`.

        Raises:
            Exception: what stopped the evaluation.
        """
        step = self.state.pending
        if self._future is None or step is None:
            return
        if wait:
            with suppress(StopSignal), signals.interruptible():
                signals.wait(self._future)
        if not self._future.done():
            return
        self.latest = evaluation = self._future.result()
        self._future = self.state.pending = None
        self.on_result(step, evaluation)

    def _runs_beside_training(self, step: int) -> bool:
        # A run that has all its steps has nothing to do but to evaluate.
        has_more_steps = max(step, self.state.step) < self.config.steps
        return self.config.eval.background and has_more_steps

    def _start(self, step: int, policy: ACTPolicy) -> None:
        self.state.pending = step
        if self._runs_beside_training(step):
            self._future = self.thread.submit(self._evaluate, step, policy, None)
            return
        # In training's own thread, where a signal can interrupt it at once.
        self._future = Future()
        with suppress(StopSignal), signals.interruptible():
            self._future.set_result(self._evaluate(step, policy, f"evaluating {step}"))
        self.poll()

    def _evaluate(self, step: int, policy: ACTPolicy, description: str | None) -> Evaluation:
        options = self.config.eval
        directory = self.run.evaluation(step, options.start_seed, options.n_episodes)
        actor = Actor(policy, self.processors)
        return evaluate(actor, self.envs, self.env, options, directory=directory, description=description)


def find_pending(start: Checkpoint, state: TrainerState, steps: int) -> Path | None:
    """Return the weights whose evaluation was interrupted when `start` was the last checkpoint, if they are there.

    Where they are not, `state.pending` becomes None.
    """
    if state.pending is None:
        return None
    step = state.pending
    here = start.directory if step == state.step else start.directory.parent / step_name(step, steps)
    if (corruption := find_corruption(here)) is None:
        return here / "pretrained_model"
    log.warning("the evaluation of step %d was interrupted and is left out: %s: %s", step, here, corruption)
    state.pending = None
    return None
