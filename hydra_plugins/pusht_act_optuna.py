"""Registers `hydra/sweeper=optuna` with Hydra.

Hydra finds sweepers only in modules of the namespace package `hydra_plugins`, and imports all of these at every start.
So this one imports nothing but Hydra: what the sweeper does is in pusht_act/sweeps/optuna_sweeper.py.
"""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """A sweeper whose values Optuna chooses; its options (config.schema.OptunaConfig) are in hydra.sweeper."""

    def __init__(self, **_: Any) -> None:
        pass

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Create the launcher; Hydra calls this before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run all trials of a sweep with the overrides `arguments`."""
        from pusht_act.sweeps.optuna_sweeper import sweep

        sweep(self, arguments)
