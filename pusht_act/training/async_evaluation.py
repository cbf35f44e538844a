"""The evaluations of a training run, beside it or in its way.

    step S   weights copied, checkpoint S saved with pending = [S]  -> a thread: rollouts, files
    step T   the result is handed on; the next evaluation waits for it

A run that is stopped between S and T finds S in `pending` of its last checkpoint and evaluates checkpoint S again, so
that metrics, `best` and files come to those of a run that was not. A signal interrupts an evaluation, and a wait for
one: what was due meanwhile is pending, too.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_model
from safetensors.torch import save as save_tensors

from pusht_act.checkpoints.checkpoint import MODEL_DIR, Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents, step_name
from pusht_act.checkpoints.manifest import find_corruption
from pusht_act.checkpoints.state import TrainerState
from pusht_act.config.lerobot import PushtEnv
from pusht_act.config.schema import Config
from pusht_act.envs.vector_env import VectorEnv, make_vector_envs
from pusht_act.evaluation.evaluate import evaluate
from pusht_act.evaluation.identity import identify, processors_digest
from pusht_act.evaluation.records import Evaluation, Record
from pusht_act.evaluation.rollout import Actor
from pusht_act.policy.act import Processors
from pusht_act.policy.lerobot import ACTPolicy
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.distributed import is_main
from pusht_act.runtime.errors import DiskError
from pusht_act.runtime.signals import StopSignal, signals

log = logging.getLogger(__name__)

OnResult = Callable[[int, Evaluation], None]
"""Takes the step whose policy was evaluated, and the result."""


def is_due(step: int, freq: int) -> bool:
    """Return whether `step` is a multiple of `freq`; 0: never."""
    return freq > 0 and step % freq == 0


def is_due_step(step: int, config: Config) -> bool:
    """Return whether the policy of `step` is to be evaluated: at each eval_freq, and at the end."""
    return is_due(step, config.eval_freq) or (step == config.steps and config.eval_freq > 0)


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
    needed = is_main() and (config.eval_freq > 0 or len(state.pending) > 0)
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
    """Evaluates the policy of a step, one at a time; keeps `state.pending`, the steps that are due and not done."""

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
    error: str | None = None
    """Why the evaluation of the last step is missing."""
    _future: Future[Evaluation] | None = None
    _step: int = 0
    _folder_id: tuple[int, int] | None = None
    """Of the run directory."""

    def __post_init__(self) -> None:
        self._folder_id = self.run.folder_id()

    def is_due(self, step: int) -> bool:
        """Return whether the policy of `step` is to be evaluated."""
        return is_due_step(step, self.config)

    def submit(self, step: int) -> None:
        """Evaluate the policy as it is now, at `step`, once the evaluation before it is over.

        Unless a signal interrupts that wait: then the run stops, and its next start evaluates all that is pending.
        """
        # One at a time: a second copy of the policy and of the environments would take their memory twice.
        self.poll(wait=True)
        self.state.pending.append(step)
        if self._future is not None:
            return
        policy = self.components.policies[self.components.evaluated]
        self._start(step, copy.deepcopy(policy) if self._runs_beside_training(step) else policy)

    def resume(self, step: int, model_dir: Path, is_dropped: bool) -> None:
        """Evaluate the weights in `model_dir`, those of a `step` in `state.pending`, as a resumed run has to.

        Args:
            step: The step.
            model_dir: Its weights.
            is_dropped: Whether it is not due any more, since an earlier evaluation pruned the run.
        """
        # A signal has interrupted the evaluation before this one, or the wait for it.
        if self._future is not None:
            return
        if is_dropped:
            self.state.pending.remove(step)
            return
        # A copy: a new policy would draw random numbers that are training's.
        policy = copy.deepcopy(self.components.policy)
        load_model(policy, model_dir / "model.safetensors")
        self._start(step, policy)

    def poll(self, wait: bool = False) -> None:
        """Hand the result on, if it is there or `wait` says to wait for it.

        After a signal nothing is waited for, and what is not there stays in `state.pending`, as does what the disk did
        not take: the run's next start evaluates it.

        Raises:
            Exception: what else stopped the evaluation.
        """
        if self._future is None:
            return
        if wait:
            with suppress(StopSignal), signals.interruptible():
                signals.wait(self._future)
        if not self._future.done():
            return
        future, self._future = self._future, None
        try:
            self.latest = evaluation = future.result()
        except DiskError as error:
            self.error = str(error) if self._step == self.config.steps else None
            log.warning("step %d: %s; the run's next start evaluates it", self._step, error)
            return
        finally:
            # It holds the error, whose traceback holds this frame.
            del future
        self.state.pending.remove(self._step)
        self.on_result(self._step, evaluation)

    def _runs_beside_training(self, step: int) -> bool:
        # A run that has all its steps has nothing to do but to evaluate.
        has_more_steps = max(step, self.state.step) < self.config.steps
        return self.config.eval.background and has_more_steps

    def _start(self, step: int, policy: ACTPolicy) -> None:
        self._step = step
        if self._runs_beside_training(step):
            self._future = self.thread.submit(self._evaluate, step, policy, None)
            return
        # In training's own thread, where a signal can interrupt it at once.
        self._future = Future()
        with suppress(StopSignal), signals.interruptible():
            try:
                self._future.set_result(self._evaluate(step, policy, f"evaluating {step}"))
            except DiskError as error:
                self._future.set_exception(error)
        self.poll()

    def _evaluate(self, step: int, policy: ACTPolicy, description: str | None) -> Evaluation:
        self.run.check_folder(self._folder_id)
        options = self.config.eval
        model, values = digest_model(policy, self.processors)
        saved = self.run.checkpoints / step_name(step, self.config.steps)
        info: dict[str, Any] = {
            "origin": "training",
            "checkpoint": str(Checkpoint(saved / self.components.evaluated).path),
            "options": [],
            "command": (self.run.last_start() or {}).get("command"),
        }
        identity = identify(model, values, str(policy.config.device), self.config.env, options)
        record, actor = Record(self.run, step, identity, info), Actor(policy, self.processors)
        return evaluate(actor, self.envs, self.env, options, record=record, description=description)


def digest_model(policy: ACTPolicy, processors: Processors) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the digests that the files of a policy have, as `identify` takes them, and its configuration."""
    # Nothing is read from a checkpoint: it may be written at the same time, or not at all.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.state_dict().items()}
    weights = hashlib.sha256(save_tensors(tensors)).hexdigest()
    with TemporaryDirectory() as name:
        folder = Path(name)
        policy.config.save_pretrained(folder)
        processors.pre.save_pretrained(folder)
        processors.post.save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text())
        return {"weights": weights, "processors": processors_digest(folder)}, values


def find_pending(start: Checkpoint, state: TrainerState, config: Config) -> dict[int, Path]:
    """Return the weights of each step in `state.pending`, as far as they are there.

    A step whose weights are missing or damaged is left out of `state.pending`, too.

    Args:
        start: The checkpoint that `state` is of.
        state: The state of the loop.
        config: The run's configuration.
    """
    # An older checkpoint names a single step, and its own step was due, too, if that had waited for it.
    if state.pending and state.step not in state.pending and is_due_step(state.step, config):
        state.pending.append(state.step)
    found = {}
    for step in state.pending:
        here = start.directory if step == state.step else start.directory.parent / step_name(step, config.steps)
        if (corruption := find_corruption(here)) is None:
            found[step] = Checkpoint(here / MODEL_DIR).evaluated.model_dir
        else:
            log.warning("the evaluation of step %d was interrupted and is left out: %s: %s", step, here, corruption)
    state.pending[:] = found
    return found
