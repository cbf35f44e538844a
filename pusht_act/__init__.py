"""Train, evaluate and scale LeRobot's ACT policy on PushT, composed by Hydra."""

import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pusht_act.job import Result
    from pusht_act.training.extensions import ActionLoss, Transform


# How long OpenMP threads spin before they sleep; read when torch is imported. Spinning on, the default, made a step
# of a small ACT take 2.5 s in place of 0.1 s as soon as another process used one of two cores. Sleeping at once
# (OMP_WAIT_POLICY=PASSIVE) made it 80 ms in place of 30 on an idle machine: there are a thousand short kernels.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Where SLURM does not bind a task to its cores, torch would take all of the node's.
if "SLURM_CPUS_PER_TASK" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
# pygame 2.6, under gym-pusht, imports pkg_resources, which warns at every start of ours and of every worker.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)


def __getattr__(name: str) -> Any:
    # Looked up when it is asked for: importlib.metadata costs more than all of this module.
    if name == "__version__":
        from importlib.metadata import version

        return version("pusht-act")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(overrides: list[str], *, loss: "ActionLoss | None" = None, transforms: "Sequence[Transform]" = ()) -> "Result":
    """Run what `pusht-act OVERRIDES` runs and return its result, for notebooks; see `pusht_act.main.run`."""
    from pusht_act.main import run

    return run(overrides, loss=loss, transforms=transforms)
