"""Which checkpoints of a run stay, and how the others are removed.

Which one is `best` is decided in training/checkpoint_manager.py, `update_best`: that of the highest success rate, then
of the highest mean max reward (`Evaluation.score` in evaluation/records.py).

A process killed at any moment leaves complete checkpoints, and these names beside them:

<run>/checkpoints/
  005000/        complete, always
  .005000.part   being written
  .005000.old    being removed, or replaced by one of the same step
  .last.new      a link about to be switched, or a file with the folder's name where there are no links
"""

import logging
import re
import threading
from collections.abc import Collection
from pathlib import Path

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.state import read_trainer_state
from pusht_act.config.schema import METADATA_FILE, CheckpointsConfig, Config
from pusht_act.runs.run_dir import RunDir, follow, read_step
from pusht_act.runtime.atomic import delete, fsync, remove_dir
from pusht_act.runtime.errors import UserError

log = logging.getLogger(__name__)

LEFTOVER = re.compile(r"\.\d+\.(part|old)|\.(last|best)\.(new|old)")
LINK_LOCK = threading.Lock()
"""Held while a link is switched or leftovers are deleted: a save may be running in a thread beside the training."""


def set_pointer(run: RunDir, name: str, target: str) -> None:
    """Let `name`, last or best, stand for the checkpoint `target`, atomically: a link or, without links, a file.

    Raises:
        OSError: it cannot be written.
    """
    path, new = run.checkpoints / name, run.checkpoints / f".{name}.new"
    # A link cannot be changed in place, but a new one can be renamed over it.
    with LINK_LOCK:
        delete(new)
        try:
            new.symlink_to(target)
        except OSError:
            # exFAT, some network disks and some clouds have no links. Where there is no room, this raises, too.
            new.write_text(target)
            fsync(new)
        if path.is_dir() and not path.is_symlink():
            _put_away(path, len(target))
        new.replace(path)


def _put_away(copy: Path, digits: int) -> None:
    """Remove a copy of a checkpoint that stands in place of a link; if it is the only one, name it by its step.

    Args:
        copy: checkpoints/last or checkpoints/best.
        digits: The length of a step's name.
    """
    step = read_step(copy)
    if follow(copy) == copy and step is not None:
        copy.rename(copy.with_name(f"{step:0{digits}d}"))
    else:
        remove_dir(copy)


def prune(run: RunDir, config: CheckpointsConfig, needed: Collection[int | None] = ()) -> None:
    """Remove the checkpoints that need not be kept; one that cannot be removed is a warning.

    Args:
        run: The run.
        config: How many to keep, and which for ever. `last` and `best` always stay.
        needed: Steps that must stay for now, such as one that is being evaluated.
    """
    last = resolve_pointer(run, "last")
    if not config.keep_last or last is None:
        return
    best = resolve_pointer(run, "best")
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
    if best in folders and resolve_pointer(run, "best") != folders[best]:
        set_pointer(run, "best", folders[best].name)
    # Checkpoints that were written for their evaluation alone go, unless a regular save was due at the same step.
    every = [freq for freq in (config.save_freq, config.checkpoints.keep_every) if freq]
    for step in {*state.spare} & folders.keys() - {best, checkpoint.step}:
        if all(step % freq for freq in every):
            remove_dir(folders[step])
    prune(run, config.checkpoints)
    remove_temp_files(run)


def resolve_pointer(run: RunDir, name: str) -> Path | None:
    """Return the checkpoint of this run that `name`, last or best, stands for; None if that is none of its steps."""
    target = follow(run.checkpoints / name)
    if target is None or not target.name.isdigit() or not target.is_dir():
        return None
    return run.checkpoints / target.name if target.resolve().parent == run.checkpoints.resolve() else None


def remove_temp_files(run: RunDir) -> None:
    """Delete what a save or a removal that was killed has left behind."""
    with LINK_LOCK:
        for path in run.checkpoints.iterdir():
            if LEFTOVER.fullmatch(path.name):
                delete(path)
