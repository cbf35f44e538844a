"""Hydra's callback for sweeps: it records what a sweep is before the first job of it starts."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from pusht_act.config.overrides import override
from pusht_act.runs.commands import config_flags
from pusht_act.sweeps.hydra_internals import expand_grid, is_basic_sweeper
from pusht_act.sweeps.joblib_workers import init_worker, partition_resources
from pusht_act.sweeps.pruning import STORAGE
from pusht_act.sweeps.slurm import sbatch_script
from pusht_act.sweeps.state import IDENTITY, recorded_overrides, write_json


@dataclass
class LaunchedSweep:
    """The sweep that this process launches; both None before it starts, and in a command that is no sweep."""

    directory: Path | None = None
    hydra_node: DictConfig | None = None
    """Its Hydra configuration."""
    is_new: bool = False
    """Whether it was not there before."""
    made: list[Path] = field(default_factory=list)
    """The folders that did not exist before."""

    def undo(self) -> None:
        """Remove what was written of a sweep that is refused before its first job."""
        if self.directory is None or not self.is_new or (self.directory / "jobs").exists():
            return
        for name in (IDENTITY, "multirun.yaml", STORAGE):
            (self.directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()


# Hydra creates the callback by its name in conf/config.yaml and hands out neither the object nor a return value. What
# it learns has to go through a variable of the process; a ContextVar at least ends with the block that asks for it.
_launched: ContextVar[LaunchedSweep | None] = ContextVar("launched_sweep", default=None)


@contextmanager
def observe_launch() -> Iterator[LaunchedSweep]:
    """Yield an object that tells which sweep, if any, was launched within the block."""
    launched = LaunchedSweep()
    token = _launched.set(launched)
    try:
        yield launched
    finally:
        _launched.reset(token)


class SweepCallback(Callback):  # type: ignore[misc]
    """Writes sweep.json before the first job, and prepares each worker; conf/config.yaml names this class."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Record the sweep; Hydra calls this in the process of the command, before it launches jobs."""
        task, hydras = map(_unresolved, (config.hydra.overrides.task, config.hydra.overrides.hydra))
        grid = _grid(config, task)
        if config.cluster.dry_run:
            _show_script(config.hydra, max(len(grid), 1))
        wanted = Path(config.hydra.sweep.dir)
        made = [folder for folder in (wanted, *wanted.parents) if not folder.exists()]
        directory = _claim(config, hydras)
        is_new = not (directory / IDENTITY).exists()
        if (launched := _launched.get()) is not None:
            launched.directory, launched.hydra_node = directory, config.hydra
            launched.made = [directory, *(folder for folder in made if folder != directory)] if is_new else []
            launched.is_new = is_new
        content = {"overrides": recorded_overrides([*task, *hydras]), "jobs": grid}
        if flags := config_flags(config.hydra):
            content["flags"] = flags
        if direction := OmegaConf.select(config, "hydra.sweeper.direction"):
            content["direction"] = direction.value
        # A sweep that is resumed keeps what was recorded when it started.
        if is_new:
            write_json(directory / IDENTITY, content)
        partition_resources(config.hydra.launcher, len(grid))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Prepare the process of a job; Hydra calls this in it before each of its jobs."""
        init_worker(config.hydra.job)


def _claim(config: DictConfig, overrides: list[str]) -> Path:
    """Return the folder of the sweep: another one if two sweeps were started in the same second."""
    directory = Path(config.hydra.sweep.dir)
    # A folder that was named may be that of a sweep to resume.
    if any(each.startswith("hydra.sweep.dir=") for each in overrides):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        with suppress(FileExistsError):
            directory.mkdir()
            break
        directory = Path(f"{config.hydra.sweep.dir}-{number}")
    if directory != Path(config.hydra.sweep.dir):
        # Each job is composed anew, from these.
        config.hydra.overrides.hydra.append(override("hydra.sweep.dir", str(directory)))
        config.hydra.sweep.dir = str(directory)
    return directory


def _show_script(hydra_node: DictConfig, n_jobs: int) -> NoReturn:
    """Print the script for SLURM and exit."""
    # Exit whatever happens: Hydra makes a warning of what a callback raises, and would go on to submit the jobs.
    try:
        print(sbatch_script(hydra_node, n_jobs))
    except Exception as error:
        sys.exit(f"pusht-act: {error}")
    sys.exit()


def _unresolved(overrides: ListConfig) -> list[str]:
    """Return overrides as they were typed: iterating over them would replace `${...}` by values."""
    typed: list[str] = OmegaConf.to_container(overrides, resolve=False)  # type: ignore[assignment]
    return typed


def _grid(config: DictConfig, overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job; where a sweeper chooses them as it goes, an empty list for each."""
    sweeper = config.hydra.sweeper
    if not is_basic_sweeper(sweeper._target_):
        return [[]] * max(sweeper.get("n_trials", 0), 0)
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    return expand_grid([*params, *overrides])
