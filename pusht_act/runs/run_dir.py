"""The paths within a run directory, and whether a new run may use that directory.

Its own path is `output_dir`, which conf/config.yaml and conf/mode/ compose from the job's name and mode.
Imports neither torch nor lerobot, so that a refusal is immediate.
"""

import itertools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pusht_act.config.schema import TRAIN_MODES
from pusht_act.runs.commands import follow_up, read_command, resume_command
from pusht_act.runtime.atomic import part_path
from pusht_act.runtime.errors import DiskError
from pusht_act.runtime.lock import is_lock
from pusht_act.runtime.stored import read_text

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
"""The composed configuration of the last start: the first file that a run writes."""
RUNS_FILE = "runs.jsonl"
"""What made each start of the run, a line for each."""
NAME_LENGTH = 32
"""Characters to read of a file that holds the name of a checkpoint."""


@dataclass(frozen=True)
class RunDir:
    """The files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints: one folder for each step, and last and best, which `follow` resolves."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object a line (loggers.py)."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """A copy of what the console showed."""
        return self.path / "train.log"

    def folder_id(self) -> tuple[int, int] | None:
        """Return what tells its folder from any other that may come to this path; None if there is none."""
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino

    def check_folder(self, was: tuple[int, int] | None) -> None:
        """Refuse to write where another folder is by now, or none, than the one whose `folder_id` was `was`.

        Raises:
            DiskError: the run was moved or deleted.
        """
        if self.folder_id() != was:
            raise DiskError(f"output_dir={self.path} was moved or deleted while it is written: move it back")

    def has_checkpoints(self) -> bool:
        """Return whether a checkpoint was ever saved here, valid or not."""
        # A link that points nowhere counts: a resume should say what happened, and not start from scratch.
        steps = (path.name.isdigit() for path in self.checkpoints.glob("*"))
        return os.path.lexists(self.checkpoints / "last") or any(steps)

    def finished_steps(self) -> int | None:
        """Return the steps of the run that was trained to its end here; None where it was not."""
        steps, last = self.configuration().get("steps"), follow(self.checkpoints / "last")
        reached = last.name if last is not None else ""
        return steps if isinstance(steps, int) and reached.isdigit() and int(reached) >= steps else None

    def metrics_of(self, step: int) -> dict[str, float]:
        """Return the metrics of `step` in metrics.jsonl, without the names of their groups.

        The validation loss is left out: eval/loss would take the place of train/loss.
        """
        lines = map(parse_metrics, read_text(self.metrics, errors="replace").splitlines())
        values = {key: value for line in lines if line and line["step"] == step for key, value in line.items()}
        return {key.partition("/")[2]: value for key, value in values.items() if "/" in key and key != "eval/loss"}

    def last_start(self) -> dict[str, Any] | None:
        """Return what runs.jsonl says of the last start: command, commit, versions, host; None if there is none."""
        try:
            started = json.loads(read_text(self.path / RUNS_FILE).splitlines()[-1])
        except (OSError, ValueError, IndexError, RecursionError):
            return None
        return started if isinstance(started, dict) else None

    def configuration(self) -> dict[str, Any]:
        """Return config.yaml as the last start wrote it; empty if there is none that can be read."""
        # After a crash of the machine the file may have any content, also valid YAML that is no mapping.
        try:
            content = yaml.safe_load(read_text(self.path / CONFIG_FILE))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        return content if isinstance(content, dict) else {}

    def restart_option(self) -> str | None:
        """Return the option with which the command of a run that saved no checkpoint works again; None for another."""
        mode = self.configuration().get("mode")
        if mode is None or self.has_checkpoints():
            return None
        # What mode=resume branches off has no resume.auto.
        return "resume.auto=true" if mode in [each.value for each in TRAIN_MODES] else "overwrite=true"

    def starts(self) -> list[dict[str, Any]]:
        """Return what runs.jsonl has of each start of the run; a line that cannot be read is left out."""
        try:
            lines = read_text(self.path / RUNS_FILE, errors="replace").splitlines()
        except OSError:
            return []
        return [start for line in lines if (start := _parse_start(line))]

    def restart_command(self) -> str | None:
        """Return the command that starts a run again which saved no checkpoint; None if that is not known."""
        option, starts = self.restart_option(), self.starts()
        if option is None or not starts:
            return None
        again = read_command(str(starts[-1].get("command", "")))
        key = option.partition("=")[0]
        return follow_up([*(each for each in again if not each.startswith(f"{key}=")), option])

    def continue_command(self) -> str:
        """Return the command that resumes the run: to its last step or, if it has come there, to twice as many."""
        steps, last = self.configuration().get("steps"), follow(self.checkpoints / "last")
        step = read_step(last) if last is not None else None
        steps = steps if isinstance(steps, int) else step or 1
        return resume_command(self.path, steps if step is None or step < steps else 2 * step)

    @property
    def evaluations(self) -> Path:
        """The list of all evaluations of the run, one JSON object a line."""
        return self.path / "evaluations.jsonl"

    def evaluation(self, step: int, start_seed: int, n_episodes: int, identity: str) -> Path:
        """Return the folder of an evaluation; `identity` is the hash of all that decides its numbers."""
        seeds = f"seeds-{start_seed}-{start_seed + n_episodes - 1}"
        return self.path / "eval" / f"step-{step:06d}_{seeds}_{identity[:8]}"


def parse_metrics(line: str) -> dict[str, Any] | None:
    """Return the values in a line of metrics.jsonl; None for one that is torn, or that this program did not write."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    numbers = [value for key, value in values.items() if "/" in key]
    return values if all(type(value) in (int, float) for value in numbers) else None


def _parse_start(line: str) -> dict[str, Any] | None:
    """Return the start of a run in a line of runs.jsonl; None if it is still being written, or is not ours."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    texts = isinstance(values, dict) and all(isinstance(values.get(key, ""), str) for key in ("command", "host"))
    return values if texts else None


def follow(pointer: Path) -> Path | None:
    """Return the checkpoint that `pointer`, such as checkpoints/last, stands for; it may be missing.

    A run that was copied, or lies on a file system without links, has a file with the folder's name in place of the
    link, or a whole copy of the checkpoint.

    Returns:
        The folder of the step, or the copy if there is no such folder; None if `pointer` names none.
    """
    if pointer.is_dir() and not pointer.is_symlink():
        step = read_step(pointer)
        folders = [path for path in pointer.parent.glob("*") if path.name.isdigit() and int(path.name) == step]
        return folders[0] if folders else pointer
    # Path.resolve() would raise at a link to itself.
    if pointer.is_symlink():
        return Path(os.path.realpath(pointer))
    if not pointer.is_file():
        return None
    try:
        with pointer.open(encoding="utf-8") as file:
            name = file.read(NAME_LENGTH).strip()
    except (OSError, ValueError):
        return None
    return pointer.with_name(name) if name.isdecimal() else None


def read_step(folder: Path) -> int | None:
    """Return the step that the checkpoint in `folder` was written at; None if it does not say."""
    try:
        step = json.loads(read_text(folder / "training_state" / "training_step.json"))["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def ensure_unused(path: Path, overwrite: bool, remedy: str | None = None) -> None:
    """Refuse a directory for a new run unless it is empty or absent, or may be moved aside.

    Args:
        path: The directory, named output_dir= in the message.
        overwrite: Whether what is there may be moved aside.
        remedy: What to do instead, for the message; None: what helps with the run that is there.

    Raises:
        FileExistsError: it is in use.
    """
    if _in_use(path) and not overwrite:
        if remedy is None and (steps := RunDir(path).finished_steps()) is not None:
            raise FileExistsError(
                f"output_dir={path} holds a finished run of {steps} steps: train it further with "
                f"`{RunDir(path).continue_command()}`, give another job_name= or output_dir=, or move it aside with "
                "overwrite=true"
            )
        remedy = _remedy(RunDir(path)) if remedy is None else f": {remedy}"
        raise FileExistsError(f"output_dir={path} is in use{remedy}, or move it aside with overwrite=true")
    # If it were renamed, the process and the user's shell would find themselves in the former run.
    if _in_use(path) and Path.cwd().is_relative_to(path.resolve()):
        raise FileExistsError(f"output_dir={path} is the working directory or above it: give a folder of the run's own")


def _remedy(run: RunDir) -> str:
    """Return how to go on with the run that is there, or where to begin another."""
    elsewhere = "give another job_name= or output_dir="
    if run.has_checkpoints():
        return f": continue it with `{run.continue_command()}`, {elsewhere}"
    if run.restart_option() == "resume.auto=true":
        again = f"with `{command}`" if (command := run.restart_command()) else "with resume.auto=true"
        return f" by a run that saved no checkpoint: start it again {again}, {elsewhere}"
    return f": {elsewhere}"


def move_aside(path: Path) -> Path | None:
    """Rename a run directory in use to PATH.old-N and return that; nothing is ever deleted."""
    if not _in_use(path):
        return None
    # The first free number, so that former runs keep their names.
    names = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def _in_use(path: Path) -> bool:
    """Return whether there is anything at `path` that somebody may want to keep."""
    if not path.is_dir():
        return path.exists()
    # A lock and a half-written configuration are what is left of a job that was killed before it began.
    unfinished = part_path(path / CONFIG_FILE)
    return any(not is_lock(entry) and entry != unfinished for entry in path.iterdir())
