"""Background evaluations that come late or are killed, and all that a run leaves behind."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pusht_act.evaluation.evaluate import evaluate
from pusht_act.evaluation.records import Evaluation
from pusht_act.training import async_evaluation as evaluations
from pusht_act.training import train_step as step_module
from tests.helpers.training import metrics

REWARDS = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.1}
"""The mean max reward of the evaluation at each step: the second is the best, and must stay it."""

OPTIONS = ["steps=8", "eval_freq=2", "save_freq=3", "env.episode_length=40", "policy.optimizer_lr=1e-2"]


class Killed(BaseException):
    """Stands for a signal: no error of the program's, so that no `except Exception` takes it."""


class Late:
    """Deliver a background evaluation exactly `lag` steps late, and kill training before the steps in `kills`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lag, self.kills = 0, set[int]()
        self.threads: list[str] = []
        self.steps_meanwhile: list[int] = []
        self._step, self._asked = 0, 0
        self._open, self._done = threading.Event(), threading.Event()
        self._evaluate, self._train_step = evaluate, step_module.train_step
        patch.setattr(evaluations, "evaluate", self.evaluate)
        patch.setattr(step_module, "train_step", self.train_step)
        patch.setattr(evaluations.AsyncEvaluator, "_start", self.starting(evaluations.AsyncEvaluator._start))

    def starting(self, start: Any) -> Any:
        def started(evaluations: Any, step: int, policy: Any) -> None:
            self._asked = step
            self._open.clear()
            self._done.clear()
            start(evaluations, step, policy)

        return started

    def evaluate(self, actor: Any, *arguments: Any, **options: Any) -> Evaluation:
        self.processors = actor.processors
        here = threading.current_thread()
        self.threads.append(here.name)
        if here is not threading.main_thread() and self.lag:
            self._open.wait(10)
        self.steps_meanwhile.append(self._step - self._asked)
        try:
            evaluation = self._evaluate(actor, *arguments, **options)
        finally:
            self._done.set()
        reward = REWARDS.get(self._asked, 0.0)
        return replace(evaluation, episodes=[replace(each, max_reward=reward) for each in evaluation.episodes])

    def train_step(self, objects: Any, *arguments: Any) -> Any:
        self.of_training = objects.processors
        states = list(objects.optimizer.state.values())
        step = int(states[0]["step"]) + 1 if states else 1
        if step in self.kills:
            self.kills.remove(step)
            self._open.set()
            raise Killed
        values = self._train_step(objects, *arguments)
        self._step = step
        if self._asked and step >= self._asked + self.lag:
            self._open.set()
            if self.lag < 2:  # the evaluation after two steps waits for the one before itself
                self._done.wait(10)
        return values


def outcome(run: Path) -> dict[str, Any]:
    """Return all that a run leaves behind, except times and the order of lines."""
    folder = run / "checkpoints"
    state = json.loads((folder / "last/training_state/pusht_act.json").read_text())
    return {
        "metrics": sorted((line["step"], sorted(line.items())) for line in metrics(run, "")),
        "episodes": {path.parent.name: path.read_text() for path in run.glob("eval/*/episodes.csv")},
        "checkpoints": sorted(path.name for path in folder.iterdir()),
        "best": (folder / "best").resolve().name,
        "last": (folder / "last").resolve().name,
        "state": {key: state[key] for key in ("step", "best", "pending")},
    }
