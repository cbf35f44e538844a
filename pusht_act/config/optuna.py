"""The schema of `hydra/sweeper=optuna`: hydra.sweeper; its values live in conf/hydra/sweeper/optuna.yaml."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Metric(Enum):
    """What `hydra/sweeper=optuna` compares trials by: one of an evaluation's numbers."""

    pc_success = "pc_success"
    avg_max_reward = "avg_max_reward"
    avg_sum_reward = "avg_sum_reward"


class Direction(Enum):
    """Which values of a metric are the better ones."""

    maximize = "maximize"
    minimize = "minimize"


class Pruner(Enum):
    """Which trials end early."""

    none = "none"
    median = "median"


@dataclass
class SamplerConfig:
    """Optuna's TPE."""

    seed: int = MISSING
    """A trial's values follow from this seed, its number and the trials that had ended when its batch was started."""
    n_startup_trials: int = MISSING
    """Trials whose values are drawn at random before TPE chooses."""


@dataclass
class PrunerConfig:
    """Which trials end early, by their evaluations in training."""

    kind: Pruner = MISSING
    """median: prune a trial whose best evaluation so far is worse than the median of the other trials at that step,
    pruned ones left out; none: prune no trial."""
    n_startup_trials: int = MISSING
    """Trials that must have ended, none of them pruned, before one is pruned."""
    n_warmup_steps: int = MISSING
    """Optimizer steps for which no trial is pruned."""


@dataclass
class OptunaConfig:
    """`hydra/sweeper=optuna`: hydra.sweeper, a sweep (`-m`) whose values Optuna chooses.

    interval(LOW,HIGH), int(interval(LOW,HIGH)), tag(log,interval(LOW,HIGH)), range(FROM,TO) and choice(A,B) say what
    there is to choose; what has one value is the same in all trials.
    """

    _target_: str = MISSING
    """Hydra's: the class that does it."""
    n_trials: int = MISSING
    """Trials of the whole sweep, failed ones included. A resumed sweep may be given more."""
    n_jobs: int = MISSING
    """Trials of one batch, launched together. The values of all are chosen before any of them has ended."""
    metric: Metric = MISSING
    """What trials are compared by, as their last evaluation has it."""
    direction: Direction = MISSING
    """Whether more or less of it is better."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    params: dict[str, str] = MISSING
    """More overrides, by key; those of the command line replace them."""
