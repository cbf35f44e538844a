"""Which checkpoints of a run stay, and how the others are removed.

Which one is `best` is decided in training/checkpoint_manager.py, `update_best`: that of the highest success rate, then
of the highest mean max reward (`Evaluation.score` in evaluation/records.py).

A process killed at any moment leaves complete checkpoints, and these names beside them:

<run>/checkpoints/
  005000/        complete, always
  .005000.part   being written
  .005000.old    being removed, or replaced by one of the same step
  .last.new      a link about to be switched
"""

import logging
import os
import re
import threading
from collections.abc import Collection
from pathlib import Path

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.state import read_trainer_state
from pusht_act.config.schema import METADATA_FILE, CheckpointsConfig, Config
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.atomic import delete, remove_dir
from pusht_act.runtime.errors import UserError

log = logging.getLogger(__name__)

LEFTOVER = re.compile(r"\.\d+\.(part|old)|\.(last|best)\.new")
LINK_LOCK = threading.Lock()
"""Held while a link is switched or leftovers are deleted: a save may be running in a thread beside the training."""


def set_symlink(run: RunDir, name: str, target: str) -> None:
    """Point the link `name`, last or best, at the checkpoint `target`, atomically."""
    new = run.checkpoints / f".{name}.new"
    # A link cannot be changed in place, but a new one can be renamed over it.
    with LINK_LOCK:
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(run.checkpoints / name)


def prune(run: RunDir, config: CheckpointsConfig, needed: Collection[int | None] = ()) -> None:
    """Remove the checkpoints that need not be kept; one that cannot be removed is a warning.

    Args:
        run: The run.
        config: How many to keep, and which for ever. `last` and `best` always stay.
        needed: Steps that must stay for now, such as one that is being evaluated.
    """
    last = resolve_symlink(run, "last")
    if not config.keep_last or last is None:
        return
    best = resolve_symlink(run, "best")
    # Steps past `last` are those of a run that was resumed from an earlier step. They are nobody's to remove.
    steps = [path for path in run.checkpoints.iterdir() if path.name.isdigit() and int(path.name) <= int(last.name)]
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True)[config.keep_last :]:
        for_ever = config.keep_every and int(path.name) % config.keep_every == 0
        if not for_ever and path not in (last, best) and int(path.name) not in needed:
            try:
                remove_dir(path)
            except OSError as error:
                log.warning("%s cannot be removed (%s): it stays", path, error.strerror)


def finish_cleanup(run: RunDir, config: Config, checkpoint: Checkpoint) -> None:
    """Finish the cleanup of a run that was killed right after it saved its last `checkpoint`."""
    try:
        state = read_trainer_state(checkpoint.training_dir / METADATA_FILE)
    except (OSError, UserError):
        # Stock LeRobot keeps no such state, and has nothing to clean up.
        return
    folders = {int(path.name): path for path in run.checkpoints.iterdir() if path.name.isdigit()}
    best = state.best["step"] if state.best else None
    if best in folders and resolve_symlink(run, "best") != folders[best]:
        set_symlink(run, "best", folders[best].name)
    # Checkpoints that were written for their evaluation alone go, unless a regular save was due at the same step.
    every = [freq for freq in (config.save_freq, config.checkpoints.keep_every) if freq]
    for step in {*state.spare} & folders.keys() - {best, checkpoint.step}:
        if all(step % freq for freq in every):
            remove_dir(folders[step])
    prune(run, config.checkpoints)
    remove_temp_files(run)


def resolve_symlink(run: RunDir, name: str) -> Path | None:
    """Return the checkpoint of this run that the link `name` points at; None if it points nowhere or elsewhere."""
    # Path.resolve() would raise at a link to itself.
    target = Path(os.path.realpath(run.checkpoints / name))
    inside = target.parent == run.checkpoints.resolve() and target.name.isdigit() and target.is_dir()
    return run.checkpoints / target.name if inside else None


def remove_temp_files(run: RunDir) -> None:
    """Delete what a save or a removal that was killed has left behind."""
    with LINK_LOCK:
        for path in run.checkpoints.iterdir():
            if LEFTOVER.fullmatch(path.name):
                delete(path)
