"""The state of a sweep on disk: what each job is and what it came to.

Files alone tell the state, so it is the same from every machine. Imports neither torch nor lerobot.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusht_act.config.aliases import rename_overrides
from pusht_act.config.schema import Metric
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import NAME as LOCK
from pusht_act.runtime.lock import Holder

if TYPE_CHECKING:
    pass


IDENTITY = "sweep.json"
LAUNCH_KEYS = (
    *("hydra.launcher.", "hydra/launcher", "cluster=", "hydra.verbose"),
    *("sweep.max_tries", "hydra.sweeper.n_trials="),
)
"""Overrides that a sweep may go on with other values of: where and how often its jobs run, not what they come to."""
FINISHED = ("done", "pruned")
"""States of a job that is left alone."""


@dataclass
class Job:
    """What is known of one job; `state` is done, pruned, failed, interrupted, running or waiting."""

    number: int
    overrides: list[str]
    state: str = "waiting"
    tries: int = 0
    """How often it was begun."""
    failures: int = 0
    """How often it failed."""
    step: int | None = None
    objective: float | None = None
    """Its `metric` if it was evaluated."""
    metric: str = Metric.pc_success.value
    error: str | None = None
    """Why it failed, in a line."""
    seconds: float = 0.0
    """Of its last try."""
    output_dir: str = ""
    holder: dict[str, Any] = field(default_factory=dict)
    """The process that began it last."""


def load_jobs(directory: Path) -> list[Job]:
    """All jobs of the sweep in `directory`, those that were not begun too."""
    content = json.loads((directory / IDENTITY).read_text())
    grid = dict(enumerate(content["jobs"]))
    begun = (int(path.stem) for path in (directory / "jobs").glob("*.json") if path.stem.isdigit())
    return [load_job(directory, number, grid.get(number, [])) for number in sorted({*grid, *begun})]


def load_job(directory: Path, number: int, overrides: list[str]) -> Job:
    """Job `number`; one that a killed process has left running is interrupted."""
    path = directory / "jobs" / f"{number}.json"
    found = _read_job(path)
    if found is None:
        return Job(number, overrides)
    if (
        found.state == "running" and not _is_alive(found, path) and _read_job(path) == found
    ):  # it has not ended just now
        found.state = "interrupted"
    return found


def recorded_overrides(overrides: Sequence[str]) -> list[str]:
    """All but where the sweep lies: those of its jobs, then Hydra's."""
    left_out = ("hydra.sweep.dir=", "hydra.mode=", "-m", "--multirun")
    said = [each for each in overrides if not each.startswith(left_out)]
    return sorted(said, key=lambda each: each.startswith(("hydra.", "hydra/")))


def result_overrides(overrides: Sequence[str]) -> list[str]:
    """Those that say what its jobs come to."""
    return [each for each in overrides if not each.startswith(LAUNCH_KEYS)]


def describe_difference(was: list[str], now: list[str]) -> str:
    """Say which overrides are gone and which are new."""
    lost, new = (" ".join(each for each in a if each not in b) for a, b in ((was, now), (now, was)))
    return f"was {lost or 'without that'}, now {new or 'without that'}" if lost or new else "in order"


def read_direction(directory: Path) -> str | None:
    """Return maximize or minimize; None for a sweep that seeks no best job."""
    direction: str | None = json.loads((directory / IDENTITY).read_text()).get("direction")
    return direction


def read_identity(directory: Path) -> list[str] | None:
    """Return the overrides that the sweep in `directory` was started with; None where there is no sweep."""
    try:
        overrides = rename_overrides(json.loads((directory / IDENTITY).read_text())["overrides"], quiet=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / IDENTITY} is damaged ({error}): begin another sweep") from error
    return overrides


def _read_job(path: Path) -> Job | None:
    """What a job's file says; None when there is none that can be read."""
    try:
        return Job(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_alive(found: Job, path: Path) -> bool:
    """Return whether the process that started `found`, as the file at `path` says, is at work."""
    try:
        lock = Path(found.output_dir) / LOCK  # touched every 30 s
        touched = max(each.stat().st_mtime for each in (path, lock) if each.exists())
        return Holder.read(found.holder).alive(time.time() - touched)
    except (OSError, TypeError, ValueError):  # removed just now, or not written by this program
        return False


def write_job(directory: Path, found: Job) -> None:
    """Write down what is known of a job."""
    write_json(directory / "jobs" / f"{found.number}.json", asdict(found))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All at once: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
