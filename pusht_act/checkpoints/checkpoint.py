"""The paths of a checkpoint, and how one is found: by path, as `last`, or as the latest valid one.

Imports neither torch nor lerobot, so that a refusal is immediate.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pusht_act.checkpoints.manifest import MANIFEST, find_corruption, verify_manifest
from pusht_act.checkpoints.state import ModelRecord, TrainingStep, read_trainer_state
from pusht_act.config.schema import METADATA_FILE
from pusht_act.runs.run_dir import RunDir, follow
from pusht_act.runtime.errors import UserError, join_some
from pusht_act.runtime.stored import read_json

log = logging.getLogger(__name__)

MODEL_DIR = "pretrained_model"
EMA_DIR = "pretrained_model_ema"
"""In a checkpoint, the folders of the weights and of their average, by LeRobot's names."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, with the training state beside it if a training run wrote it."""

    model_dir: Path

    @property
    def directory(self) -> Path:
        """The folder of the step, which holds the model and the training state."""
        return self.model_dir.parent

    @property
    def training_dir(self) -> Path:
        """The folder of the training state, which may be missing."""
        return self.directory / "training_state"

    @property
    def is_of_training(self) -> bool:
        """Whether its folder is one of those that training writes, not a model on its own, such as one of the Hub."""
        return self.model_dir.name in (MODEL_DIR, EMA_DIR)

    @property
    def path(self) -> Path:
        """What it is named by: the folder of its step, or that of a model that is not the step's weights themselves."""
        return self.directory if self.model_dir.name == MODEL_DIR else self.model_dir

    @property
    def evaluated(self) -> "Checkpoint":
        """The same step with the weights that its run evaluates: their average, if there is one and it is for that."""
        average = Checkpoint(self.directory / EMA_DIR)
        if not (average.model_dir / "config.json").is_file():
            return self
        # Written by a later LeRobot, which has the same folder, it has no record.
        if (record := average.record) is None:
            return average
        ema = record.config.get("ema")
        return self if isinstance(ema, dict) and ema.get("use_for_eval") is False else average

    @property
    def record(self) -> ModelRecord | None:
        """What it was trained from; None if stock LeRobot wrote it.

        Raises:
            UserError: its file is damaged.
        """
        try:
            return read_json(self.model_dir / METADATA_FILE, ModelRecord)
        except FileNotFoundError:
            return None

    @property
    def wandb_run_id(self) -> str | None:
        """W&B's id of the run that wrote it; None if there was none, or its training state cannot be read."""
        try:
            return read_trainer_state(self.training_dir / METADATA_FILE).wandb_run_id
        except (OSError, UserError):
            return None

    @property
    def run_dir(self) -> Path | None:
        """The run directory that the checkpoint belongs to, or None."""
        parent = self.directory.resolve().parent
        return parent.parent if parent.name == "checkpoints" else None

    @property
    def name(self) -> str:
        """The name of its folder: the step, padded with zeros."""
        return self.directory.resolve().name

    @property
    def step(self) -> int:
        """The optimizer step that it was written at.

        Raises:
            UserError: there is no training state, so it can be evaluated but not resumed; or it is damaged.
        """
        try:
            return read_json(self.training_dir / "training_step.json", TrainingStep).step
        except FileNotFoundError as error:
            raise UserError(
                f"{self.directory} has no training_state/training_step.json, so nothing can be resumed from it: give "
                "a checkpoint that a training run wrote"
            ) from error

    @property
    def pending(self) -> list[int]:
        """The steps whose evaluations were due and not done when it was written; none if it cannot be read."""
        try:
            return read_trainer_state(self.training_dir / METADATA_FILE).pending
        except (OSError, UserError):
            return []


def find_checkpoint(path: str, key: str) -> Checkpoint:
    """Return the checkpoint at `path`.

    Args:
        path: A run directory (then its `last`), the folder of a step, its model folder, or a file in that.
        key: The option to name in the message.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        folder = follow(folder) or folder.parent
    last = follow(folder / "checkpoints" / "last")
    for model in (folder, folder / MODEL_DIR, *([last / MODEL_DIR] if last is not None else [])):
        if (model / "config.json").is_file():
            # `last` may move on while this checkpoint is in use, so the link is resolved now.
            return Checkpoint(model.parent.resolve() / model.name)
    if folder.is_dir():
        raise FileNotFoundError(
            f"{key}={path} holds no checkpoint (no config.json): give .../checkpoints/STEP of a run"
        )
    raise FileNotFoundError(f"{key}={path} does not exist: give a checkpoint of a run, such as .../checkpoints/last")


def verify(checkpoint: Checkpoint, key: str, files: tuple[str, ...]) -> None:
    """Refuse a checkpoint, named by the user, whose files are not those that were written.

    Args:
        checkpoint: The checkpoint.
        key: The option to name in the message.
        files: The beginnings of the names of the files to read, such as manifest.EVAL_FILES.

    Raises:
        UserError: a file is missing or damaged.
    """
    # A model folder alone, such as one from the Hub, has no manifest beside it.
    if checkpoint.is_of_training and (wrong := verify_manifest(checkpoint.directory, files)):
        raise UserError(
            f"{key}: {checkpoint.directory}/{wrong}; give another checkpoint "
            f"(or delete its {MANIFEST} if you changed the file yourself)"
        )


def latest_valid(run: RunDir, most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Return the latest valid checkpoint of a run: `last` or, if that is damaged, the newest that is not.

    Args:
        run: The run.
        most: Ignore checkpoints of later steps.

    Returns:
        The checkpoint, None if there is none, and a line for each one that was passed over.
    """
    last, wrong = run.checkpoints / "last", []
    target = follow(last)
    # `last` comes first even where another one has a higher step: a run that was resumed from an earlier step leaves
    # those of its former future behind. It may be a copy of its checkpoint.
    first = [path for path in (target, last) if path is not None and path.is_dir()]
    steps = [path for path in run.checkpoints.glob("*") if path.name.isdigit()]
    known = [path.resolve() for path in first]
    others = sorted((path for path in steps if path.resolve() not in known), key=lambda path: int(path.name))[::-1]
    # Checkpoints without a `last` that works: something went wrong, so falling back to one of them is worth a line.
    if not first and (steps or os.path.lexists(last)):
        if target is not None:
            wrong.append(f"{last} points to {target.name}, which is missing")
        else:
            wrong.append(f"{last} names no checkpoint" if last.exists() else f"{last} is missing")
    for path in dict.fromkeys([*(path.resolve() for path in first), *others]):
        if most is not None and path.name.isdigit() and int(path.name) > most:
            continue
        if (damage := find_corruption(path)) is None:
            return Checkpoint(path.resolve() / MODEL_DIR), wrong
        wrong.append(f"{path}: {damage}")
    return None, wrong


def last_checkpoint(
    run: RunDir,
    most: int | None = None,
    remedy: str = "name one elsewhere with resume.path=, or start afresh with overwrite=true",
) -> Checkpoint:
    """Return the checkpoint to resume a run from: `last` or, with a warning, the newest valid one.

    Args:
        run: The run.
        most: Ignore checkpoints of later steps.
        remedy: What the user can do if all are damaged, for the message.

    Raises:
        FileNotFoundError: there is nothing to resume.
        UserError: there are checkpoints, but none is valid.
    """
    checkpoint, wrong = latest_valid(run, most)
    if checkpoint is None and wrong:
        raise UserError(f"no checkpoint in {run.checkpoints} is valid ({'; '.join(wrong)}): {remedy}")
    if checkpoint is not None:
        if wrong:
            log.warning(
                "%s; resuming from step %d instead, %s", "; ".join(wrong), checkpoint.step, checkpoint.directory
            )
        return checkpoint
    # The run never came to a save: say how to start it again.
    if (option := run.restart_option()) is not None:
        command = run.restart_command()
        raise FileNotFoundError(
            f"nothing to resume in {run.path}, whose run saved no checkpoint: give the command that started it again "
            f"with {option}{f', `{command}`' if command else ''}"
        )
    # A run of another mode or name may lie beside it.
    others = sorted(str(p.parent.parent) for p in run.path.parent.glob("*/checkpoints/last"))
    hint = f"; there is {join_some(others)} (give output_dir=)" if others else ""
    raise FileNotFoundError(
        f"nothing to resume in {run.path}{hint}: start with mode=full, or name a checkpoint with resume.path="
    )
