"""Where Hydra finds `hydra/sweeper=optuna`: it takes sweepers from modules of `hydra_plugins` only, and imports these
at every start. What the sweeper does is in pusht_act/sweeps/optuna_sweeper.py.
"""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """A sweep whose values Optuna chooses; the options (config.schema.OptunaConfig) are read from hydra.sweeper."""

    def __init__(self, **_: Any) -> None:
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's, before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """All trials of the overrides `arguments`."""
        from pusht_act.sweeps.optuna_sweeper import sweep

        sweep(self, arguments)
