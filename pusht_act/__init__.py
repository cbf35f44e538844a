"""Train, evaluate and scale LeRobot's ACT policy on PushT, composed by Hydra."""

import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pusht_act.job import Result


# OpenMP's threads otherwise spin while they wait: with one other busy process on two cores a training step of a small
# ACT took 2.5 s in place of 0.1 s. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# pygame 2.6, under gym-pusht, imports pkg_resources, which warns at every start of ours and of every worker.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)


def run(overrides: list[str]) -> "Result":
    """Do what `pusht-act OVERRIDES` does and return its result, for notebooks; see `pusht_act.main.run`."""
    from pusht_act.main import run

    return run(overrides)
