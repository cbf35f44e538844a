"""Replace files and folders atomically: write under a temporary name beside the target, then rename.

A reader finds the old content or the new, never a part of it, and a process that is killed leaves the old one:

    .NAME.part   being written; the next write of the same target starts it anew
    .NAME.old    the former folder, moved out of the way for as long as the rename takes

Renaming protects against a crash of the process. Against a crash of the machine, call `fsync` first.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def part_path(path: Path) -> Path:
    """Return the name that `path` has while it is being written."""
    return path.with_name(f".{path.name}.part")


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Write `text` to the file `path`, which one process at a time may do.

    Args:
        path: The file.
        text: Its content.
        sync: Wait until it is on the disk: else a crash of the machine may leave an empty file under the new name.
    """
    # A rename is atomic only within a file system, so the temporary file lies beside the target.
    part = part_path(path)
    try:
        part.write_text(text, encoding="utf-8")
        if sync:
            fsync(part)
        part.replace(path)
    except OSError as error:
        # The system names a file that it cannot open, but none that it has no room for.
        error.filename = error.filename or str(path)
        raise


@contextmanager
def shared_file(path: Path) -> Iterator[Path]:
    """Yield the name to write to in place of `path`, which several processes may be writing at the same time.

    Each has a temporary name of its own; the last one to finish wins. Nothing is left if the block raises.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces the folder `path` after the block; nothing is left if it raises."""
    # A process that was killed may have left its folder.
    part = part_path(path)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        replace_dir(part, path)
    except BaseException:
        # A signal, too, leaves nothing behind.
        shutil.rmtree(part, ignore_errors=True)
        raise


def replace_dir(part: Path, path: Path) -> None:
    """Rename the folder `part` to `path`, in place of what may be there.

    Raises:
        OSError: it cannot be renamed; what was at `path` is still there.
    """
    # A folder that is not empty cannot be renamed over, so the former one has to step aside.
    old = _old_path(path)
    delete(old)
    if os.path.lexists(path):
        path.rename(old)
    try:
        part.rename(path)
    except OSError:
        if os.path.lexists(old):
            old.rename(path)
        raise
    delete(old)


def remove_dir(path: Path) -> None:
    """Remove a folder: it is gone at once, its files follow.

    Raises:
        OSError: it is still there.
    """
    old = _old_path(path)
    delete(old)
    path.rename(old)
    delete(old)


def _old_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def delete(path: Path) -> None:
    """Delete a file, a link or a folder if it is there; files of a folder that cannot be deleted stay."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    # A folder can be opened for reading only, which is enough.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
