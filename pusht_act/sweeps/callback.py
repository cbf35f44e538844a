"""Hydra's callback that writes down what a sweep is before its first job."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from pusht_act.sweeps.joblib_workers import init_worker, partition_resources
from pusht_act.sweeps.slurm import sbatch_script

if TYPE_CHECKING:
    pass
from pusht_act.sweeps.state import IDENTITY, recorded_overrides, write_json


class SweepCallback(Callback):  # type: ignore[misc]
    """Hydra's callback that writes down what a sweep is before its first job; conf/config.yaml names it."""

    directory: Path | None = None
    """Of this process's sweep."""
    hydra_node: DictConfig | None = None
    """Its Hydra configuration."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:  # noqa: D102
        task, hydras = (_unresolved(each) for each in (config.hydra.overrides.task, config.hydra.overrides.hydra))
        grid = _grid(config, task)
        if config.cluster.dry_run:
            _show_script(config.hydra, max(len(grid), 1))
        SweepCallback.directory = directory = Path(config.hydra.sweep.dir)
        SweepCallback.hydra_node = config.hydra
        content = {"overrides": recorded_overrides([*task, *hydras]), "jobs": grid}
        if direction := OmegaConf.select(config, "hydra.sweeper.direction"):
            content["direction"] = direction.value
        if not (directory / IDENTITY).exists():
            write_json(directory / IDENTITY, content)
        partition_resources(config.hydra.launcher, len(grid))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:  # noqa: D102
        init_worker(config.hydra.job)


def _show_script(hydra_node: DictConfig, n_jobs: int) -> NoReturn:
    """Leave, whatever happens: what a callback raises Hydra makes a warning of, and would submit the jobs."""
    try:
        print(sbatch_script(hydra_node, n_jobs))
    except Exception as error:
        sys.exit(f"pusht-act: {error}")
    sys.exit()


def _unresolved(overrides: ListConfig) -> list[str]:
    """Not as OmegaConf reads them out, with the values of their `${...}` in place."""
    given: list[str] = OmegaConf.to_container(overrides, resolve=False)  # type: ignore[assignment]
    return given


def _grid(config: DictConfig, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job in Hydra's own order; where a sweeper chooses them as it goes none of each."""
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        return [[]] * max(sweeper.get("n_trials", 0), 0)
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    try:
        parsed = OverridesParser.create().parse_overrides([*params, *overrides])
        batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, None)
    except HydraException:  # the sweeper will raise it too
        return []
    return batches[0]
