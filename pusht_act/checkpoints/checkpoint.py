"""A checkpoint on disk, and how one is found: by path, `last`, or the latest valid one.

Imports neither torch nor lerobot, so that a refusal answers at once.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pusht_act.checkpoints.manifest import MANIFEST, find_corruption, verify_manifest
from pusht_act.config.schema import METADATA_FILE
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, with the training state beside it if a training run wrote it."""

    model_dir: Path

    @property
    def directory(self) -> Path:
        """The step's folder."""
        return self.model_dir.parent

    @property
    def training_dir(self) -> Path:
        """The training state, beside the model."""
        return self.directory / "training_state"

    @property
    def run_dir(self) -> Path | None:
        """The run directory it lies in, if it does."""
        parent = self.directory.resolve().parent
        return parent.parent if parent.name == "checkpoints" else None

    @property
    def name(self) -> str:
        """Its step as the folder's name has it."""
        return self.directory.resolve().name

    @property
    def step(self) -> int:
        """The optimizer step it was written at.

        Raises:
            UserError: there is no training state, so it can be evaluated but not resumed.
        """
        try:
            return int(json.loads((self.training_dir / "training_step.json").read_text())["step"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.directory} has no readable training_state/training_step.json, so nothing can be resumed from "
                "it: give a checkpoint that a training run wrote"
            ) from error

    @property
    def pending(self) -> int | None:
        """The step whose evaluation was under way when it was written; None, too, where that cannot be read."""
        try:
            pending: int | None = json.loads((self.training_dir / METADATA_FILE).read_text())["pending"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pending


def find_checkpoint(path: str, key: str) -> Checkpoint:
    """The checkpoint at `path`: a run directory (then its `last`), a step's folder, its model folder or a file in it.

    Raises:
        FileNotFoundError: there is none; `key` names the option in the message.
    """
    at = Path(path).expanduser()
    if at.is_file():
        at = at.parent
    for model in (at, at / "pretrained_model", at / "checkpoints" / "last" / "pretrained_model"):
        if (model / "config.json").is_file():
            return Checkpoint(model.parent.resolve() / model.name)
    if at.is_dir():
        raise FileNotFoundError(
            f"{key}={path} holds no checkpoint (no config.json): give .../checkpoints/STEP of a run"
        )
    raise FileNotFoundError(f"{key}={path} does not exist: give a checkpoint of a run, such as .../checkpoints/last")


def verify(checkpoint: Checkpoint, key: str, files: tuple[str, ...]) -> None:
    """A checkpoint that the user has named is the one written, in those of its `files` that are needed, or refused.

    Raises:
        UserError: a file is missing or damaged; `key` names the option in the message.
    """
    if checkpoint.model_dir.name == "pretrained_model" and (wrong := verify_manifest(checkpoint.directory, files)):
        raise UserError(
            f"{key}: {checkpoint.directory}/{wrong}; give another checkpoint "
            f"(or delete its {MANIFEST} if you changed the file yourself)"
        )


def latest_valid(run: RunDir, most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """`last` of a run or, where that is damaged, its newest sound checkpoint; and what is wrong with those before it.

    Only those of step `most` and before are looked at.
    """
    link, wrong = run.checkpoints / "last", []
    target = Path(os.path.realpath(link))  # resolve() raises at a link to itself
    steps = [path for path in run.checkpoints.glob("*") if path.name.isdigit()]
    others = sorted((path for path in steps if path.resolve() != target), key=lambda path: int(path.name), reverse=True)
    if not link.exists() and (steps or link.is_symlink()):
        wrong.append(f"{link} points to {target.name}, which is missing" if link.is_symlink() else f"{link} is missing")
    for path in [*([target] if link.exists() else []), *others]:
        if most is not None and path.name.isdigit() and int(path.name) > most:
            continue
        if (found := find_corruption(path)) is None:
            return Checkpoint(path.resolve() / "pretrained_model"), wrong
        wrong.append(f"{path}: {found}")
    return None, wrong


def last_checkpoint(
    run: RunDir,
    most: int | None = None,
    remedy: str = "name one elsewhere with resume.path=, or start afresh with overwrite=true",
) -> Checkpoint:
    """`last` of a run or, with a warning, the newest sound one; of step `most` or before.

    Raises:
        FileNotFoundError: nothing to resume.
        UserError: there are checkpoints, none of them sound.
    """
    sound, wrong = latest_valid(run, most)
    if sound is None and wrong:
        raise UserError(f"no checkpoint in {run.checkpoints} is sound ({'; '.join(wrong)}): {remedy}")
    if sound is not None:
        if wrong:
            log.warning("%s; going on from step %d instead, %s", "; ".join(wrong), sound.step, sound.directory)
        return sound
    others = sorted(str(p.parent.parent) for p in run.path.parent.glob("*/checkpoints/last"))
    hint = f"; there is {', '.join(others)} (give output_dir=)" if others else ""
    raise FileNotFoundError(
        f"nothing to resume in {run.path}{hint}: start with mode=full, or name a checkpoint with resume.path="
    )
