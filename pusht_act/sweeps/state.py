"""The state of a sweep on disk: sweep.json, its identity, and jobs/N.json, what became of each job.

The files alone determine the state, so it is the same from every machine. Imports neither torch nor lerobot.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Predicate

from pusht_act.config.aliases import rename_overrides
from pusht_act.config.optuna import Metric
from pusht_act.runtime.atomic import write_text
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import NAME as LOCK
from pusht_act.runtime.lock import LockOwner
from pusht_act.runtime.stored import read_json

log = logging.getLogger(__name__)

IDENTITY = "sweep.json"
LAUNCH_KEYS = (
    *("hydra.launcher.", "hydra/launcher", "cluster=", "hydra.verbose"),
    *("sweep.max_tries", "hydra.sweeper.n_trials="),
)
"""Beginnings of overrides that may change when a sweep is resumed: where and how often its jobs run."""
STATES = ("done", "pruned", "failed", "interrupted", "running", "waiting")
FINISHED = ("done", "pruned")
"""States in which a job is left alone."""


@dataclass
class Job:
    """What is known of one job; `state` is done, pruned, failed, interrupted, running or waiting."""

    number: int
    overrides: list[str]
    state: Annotated[str, Predicate(STATES.__contains__)] = "waiting"
    tries: int = 0
    """How often it was started."""
    failures: int = 0
    """How often it failed."""
    step: int | None = None
    objective: float | None = None
    """The value of `metric`, if it was evaluated."""
    metric: str = Metric.pc_success.value
    n_episodes: int | None = None
    """Episodes of that evaluation."""
    low: float | None = None
    """Lower end of the 95 % interval of its success, in percent."""
    high: float | None = None
    error: str | None = None
    """Why it failed, in one line."""
    seconds: float = 0.0
    """How long its last try took."""
    output_dir: str = ""
    holder: dict[str, Any] = field(default_factory=dict)
    """The process that started it last, as a lock's owner is described."""


@dataclass(frozen=True)
class Identity:
    """What a sweep was started as. Its fields are the keys of sweep.json."""

    overrides: list[str]
    """The command line's, with the present names of options."""
    jobs: list[list[str]]
    """The overrides of each job of a grid; empty for a job whose values Optuna chooses."""
    direction: str | None = None
    """Whether Optuna looks for the largest or the smallest value."""
    flags: list[str] = field(default_factory=list)
    """The flags that it was started with, such as --config-dir DIR."""


def read_identity(directory: Path) -> Identity | None:
    """Return what the sweep in `directory` was started as; None where there is no sweep.

    Raises:
        UserError: sweep.json is damaged.
    """
    try:
        found = read_json(directory / IDENTITY, Identity, "begin another sweep")
    except FileNotFoundError:
        return None
    jobs = [rename_overrides(job, quiet=True) for job in found.jobs]
    return replace(found, overrides=rename_overrides(found.overrides, quiet=True), jobs=jobs)


def load_jobs(directory: Path) -> list[Job]:
    """Return all jobs of the sweep in `directory`, including those that were never started.

    Raises:
        UserError: sweep.json is damaged.
    """
    identity = read_identity(directory)
    # A sweep that was given more trials on resume has more jobs than its identity lists.
    grid = dict(enumerate(identity.jobs if identity is not None else []))
    started = (int(path.stem) for path in (directory / "jobs").glob("*.json") if path.stem.isdigit())
    return [load_job(directory, number, grid.get(number, [])) for number in sorted({*grid, *started})]


def load_job(directory: Path, number: int, overrides: list[str]) -> Job:
    """Return job `number`. If its process was killed, its state is interrupted.

    Args:
        directory: The sweep's.
        number: The job's.
        overrides: The job's, for one that was never started.
    """
    path = directory / "jobs" / f"{number}.json"
    found = _read_job(path)
    if found is None:
        return Job(number, overrides)
    # Read a second time: it may have ended just now, and its process with it.
    if found.state == "running" and not _is_alive(found, path) and _read_job(path) == found:
        found.state = "interrupted"
    # A damaged file does not tell them.
    return replace(found, overrides=found.overrides or list(overrides))


def recorded_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that identify a sweep: all but its folder, those of its jobs before Hydra's own."""
    # A sweep stays the same one where it is moved.
    left_out = ("hydra.sweep.dir=", "hydra.mode=")
    kept = [override for override in overrides if not override.startswith(left_out)]
    return sorted(kept, key=lambda override: override.startswith(("hydra.", "hydra/")))


def varied_overrides(directory: Path, overrides: Sequence[str]) -> list[str]:
    """Return those of a job's overrides that its sweep does not give to every job."""
    identity = read_identity(directory)
    given = identity.overrides if identity is not None else []
    return [override for override in overrides if override not in given and not override.startswith("output_dir=")]


def result_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that affect the results of jobs."""
    return [override for override in overrides if not override.startswith(LAUNCH_KEYS)]


def describe_difference(was: list[str], now: list[str]) -> str:
    """Return which overrides are gone and which are new, as "was ..., now ..."."""
    lost, new = (" ".join(item for item in a if item not in b) for a, b in ((was, now), (now, was)))
    return f"was {lost or 'without that'}, now {new or 'without that'}" if lost or new else "in order"


def _read_job(path: Path) -> Job | None:
    """Return what the file of a job says; None if there is none.

    A job whose file is damaged was started, and may have been interrupted: resuming it does no work twice.
    """
    try:
        return replace(read_json(path, Job), number=int(path.stem))
    except FileNotFoundError:
        return None
    except UserError as error:
        log.warning("%s: the job counts as interrupted", str(error).rpartition(": ")[0])
        return Job(int(path.stem), [], "interrupted", tries=1)


def _is_alive(found: Job, path: Path) -> bool:
    """Return whether the process that started `found`, read from `path`, is still running."""
    try:
        # On another machine only signs of life tell: the job touches the lock of its run directory every 30 s.
        lock = Path(found.output_dir) / LOCK
        touched = max(file.stat().st_mtime for file in (path, lock) if file.exists())
        return LockOwner.read(found.holder).alive(time.time() - touched)
    except (OSError, TypeError, ValueError):
        # Removed just now, or not written by this program.
        return False


def write_job(directory: Path, found: Job) -> None:
    """Write the state of a job."""
    write_json(directory / "jobs" / f"{found.number}.json", asdict(found))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, since another process may be reading it, and make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n", sync=True)
