"""Which checkpoints of a run stay, and how the others go, so that a kill at any moment leaves whole ones only.

<run>/checkpoints/
  005000/        whole, always
  .005000.part   being written
  .005000.old    being removed, or replaced by one of the same step
  .last.new      a link about to be switched
"""

import logging
import os
import re
import shutil
from pathlib import Path

from pusht_act.config import CheckpointsConfig
from pusht_act.run_dir import RunDir

log = logging.getLogger(__name__)

LEFTOVER = re.compile(r"\.\d+\.(part|old)|\.(last|best)\.new")


def link(run: RunDir, name: str, target: str) -> None:
    """Switch the symbolic link `name` atomically."""
    new = run.checkpoints / f".{name}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(run.checkpoints / name)


def prune(run: RunDir, config: CheckpointsConfig, pending: int | None = None) -> None:
    """Remove what `config` does not keep, once `last` points at a whole checkpoint; what cannot go is left, in a line.

    That of step `pending`, whose evaluation is under way, stays.
    Folders past `last` belong to no present run of steps and are left alone.
    """
    last = linked(run, "last")
    if not config.keep_last or last is None:
        return
    best = linked(run, "best")
    steps = [path for path in run.checkpoints.iterdir() if path.name.isdigit() and int(path.name) <= int(last.name)]
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True)[config.keep_last :]:
        for_ever = config.keep_every and int(path.name) % config.keep_every == 0
        if not for_ever and path not in (last, best) and int(path.name) != pending:
            try:
                remove(path)
            except OSError as error:
                log.warning("%s cannot be removed (%s): it stays", path, error.strerror)


def linked(run: RunDir, name: str) -> Path | None:
    """The checkpoint of this run that the link `name` points at; None if it points nowhere or out of the run."""
    target = Path(os.path.realpath(run.checkpoints / name))  # resolve() raises at a link to itself
    inside = target.parent == run.checkpoints.resolve() and target.name.isdigit() and target.is_dir()
    return run.checkpoints / target.name if inside else None


def remove(path: Path) -> None:
    """Remove a checkpoint: it is gone at once, its files follow.

    Raises:
        OSError: it is there still.
    """
    shutil.rmtree(hide(path), ignore_errors=True)


def hide(path: Path) -> Path:
    """Rename a checkpoint to the hidden name of one that is to go, and return that."""
    old = path.with_name(f".{path.name}.old")
    _delete(old)
    path.rename(old)
    return old


def clear_leftovers(run: RunDir) -> None:
    """Delete what a killed save or removal has left."""
    for path in run.checkpoints.iterdir():
        if LEFTOVER.fullmatch(path.name):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()
