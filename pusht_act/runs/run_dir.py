"""The paths within a run directory, and whether a run may use it: fresh, resumed or refused.

Imports neither torch nor lerobot, so that a refusal answers at once.
"""

import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pusht_act.runtime.lock import is_lock

log = logging.getLogger(__name__)


CONFIG_PART = ".config.yaml.part"
"""config.yaml being written: the first file of a run."""


@dataclass(frozen=True)
class RunDir:
    """The files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """One folder a step, and the links last and best."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the console showed."""
        return self.path / "train.log"

    def has_checkpoints(self) -> bool:
        """Whether a checkpoint was ever saved here, sound or not."""
        steps = (path.name.isdigit() for path in self.checkpoints.glob("*"))
        return (self.checkpoints / "last").is_symlink() or any(steps)

    def metrics_of(self, step: int) -> dict[str, float]:
        """What metrics.jsonl has of `step`, without the groups' names and but the validation loss."""
        lines = map(json.loads, self.metrics.read_text().splitlines())
        values = {key: value for line in lines if line["step"] == step for key, value in line.items()}
        return {key.partition("/")[2]: value for key, value in values.items() if key not in ("step", "eval/loss")}

    def configuration(self) -> dict[str, Any]:
        """config.yaml as the last start wrote it; empty when there is none that can be read."""
        try:
            content = yaml.safe_load((self.path / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return content if isinstance(content, dict) else {}

    def evaluation(self, step: int, start_seed: int, n_episodes: int) -> Path:
        """One folder a (checkpoint, seeds): evaluating again writes the same numbers to the same place."""
        return self.path / "eval" / f"step-{step:06d}_seeds-{start_seed}-{start_seed + n_episodes - 1}"


def ensure_unused(
    path: Path, overwrite: bool, remedy: str = "continue it with mode=resume, give another job_name= or output_dir="
) -> None:
    """Before a new run: its directory must be empty or absent, unless it may be moved aside.

    Raises:
        FileExistsError: it is in use.
    """
    if _in_use(path) and not overwrite:
        raise FileExistsError(f"output_dir={path} is in use: {remedy}, or move it aside with overwrite=true")
    if _in_use(path) and Path.cwd().is_relative_to(path.resolve()):
        raise FileExistsError(f"output_dir={path} is the working directory or above it: give a folder of the run's own")


def move_aside(path: Path) -> Path | None:
    """Rename a run directory in use to path.old-N, which is returned; nothing is ever deleted."""
    if not _in_use(path):
        return None
    names = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def _in_use(path: Path) -> bool:
    """A job that was killed before it wrote its configuration has left nothing that would be."""
    return path.exists() and (
        not path.is_dir() or any(not is_lock(each) and each.name != CONFIG_PART for each in path.iterdir())
    )
