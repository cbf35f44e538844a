"""Which checkpoints of a run stay, and how the others go, so that a kill at any moment leaves whole ones only.

<run>/checkpoints/
  005000/        whole, always
  .005000.part   being written
  .005000.old    being removed, or replaced by one of the same step
  .last.new      a link about to be switched
"""

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection
from pathlib import Path

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.config.schema import METADATA_FILE, CheckpointsConfig, Config
from pusht_act.runs.run_dir import RunDir

log = logging.getLogger(__name__)

LEFTOVER = re.compile(r"\.\d+\.(part|old)|\.(last|best)\.new")
LINK_LOCK = threading.Lock()
"""Held while a link is switched or leftovers are deleted: a save may be under way beside the training."""


def set_symlink(run: RunDir, name: str, target: str) -> None:
    """Switch the symbolic link `name` atomically."""
    new = run.checkpoints / f".{name}.new"
    with LINK_LOCK:
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(run.checkpoints / name)


def prune(run: RunDir, config: CheckpointsConfig, needed: Collection[int | None] = ()) -> None:
    """Remove what `config` does not keep, once `last` points at a whole checkpoint; what cannot go is left, in a line.

    Those of the steps in `needed`, such as that whose evaluation is under way, stay.
    Folders past `last` belong to no present run of steps and are left alone.
    """
    last = resolve_symlink(run, "last")
    if not config.keep_last or last is None:
        return
    best = resolve_symlink(run, "best")
    steps = [path for path in run.checkpoints.iterdir() if path.name.isdigit() and int(path.name) <= int(last.name)]
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True)[config.keep_last :]:
        for_ever = config.keep_every and int(path.name) % config.keep_every == 0
        if not for_ever and path not in (last, best) and int(path.name) not in needed:
            try:
                remove(path)
            except OSError as error:
                log.warning("%s cannot be removed (%s): it stays", path, error.strerror)


def finish_cleanup(run: RunDir, config: Config, checkpoint: Checkpoint) -> None:
    """Do what a run that was killed after the save of its last `checkpoint` has left undone."""
    try:
        state = json.loads((checkpoint.training_dir / METADATA_FILE).read_text())
    except (OSError, ValueError):  # stock LeRobot's
        return
    folders = {int(path.name): path for path in run.checkpoints.iterdir() if path.name.isdigit()}
    best = state["best"]["step"] if state["best"] else None
    if best in folders and resolve_symlink(run, "best") != folders[best]:
        set_symlink(run, "best", folders[best].name)
    every = [freq for freq in (config.save_freq, config.checkpoints.keep_every) if freq]
    for step in {*state["spare"]} & folders.keys() - {best, checkpoint.step}:
        if all(step % freq for freq in every):
            remove(folders[step])
    prune(run, config.checkpoints)
    remove_temp_files(run)


def resolve_symlink(run: RunDir, name: str) -> Path | None:
    """The checkpoint of this run that the link `name` points at; None if it points nowhere or out of the run."""
    target = Path(os.path.realpath(run.checkpoints / name))  # resolve() raises at a link to itself
    inside = target.parent == run.checkpoints.resolve() and target.name.isdigit() and target.is_dir()
    return run.checkpoints / target.name if inside else None


def remove(path: Path) -> None:
    """Remove a checkpoint: it is gone at once, its files follow.

    Raises:
        OSError: it is there still.
    """
    shutil.rmtree(mark_deleted(path), ignore_errors=True)


def mark_deleted(path: Path) -> Path:
    """Rename a checkpoint to the hidden name of one that is to go, and return that."""
    old = path.with_name(f".{path.name}.old")
    _delete(old)
    path.rename(old)
    return old


def remove_temp_files(run: RunDir) -> None:
    """Delete what a killed save or removal has left."""
    with LINK_LOCK:
        for path in run.checkpoints.iterdir():
            if LEFTOVER.fullmatch(path.name):
                _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()
