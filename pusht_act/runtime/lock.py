"""One writer to a run directory: a file `lock` in it that names the process which holds it.

    lock                 {"host", "pid", "started", "boot", "namespace", "slurm", "token", "since"}, touched every 30 s
    .lock.<token>        held as the lock is, by whoever is taking the place of the dead holder <token>
    .lock.<token>.new    about to become one of these

On the holder's own machine its process is looked up, start time included, since numbers are used again; one of an
earlier boot is dead. So is the one that a SLURM job was before SLURM queued it again, wherever that ran. Of any other
holder elsewhere, another container included, only the touches tell: it is dead when there was none for 5 minutes by the
file server's clock. Imports neither torch nor lerobot.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

log = logging.getLogger(__name__)

NAME = "lock"
TOUCHED = 30.0
"""Seconds between two signs of life."""
DEAD = 300.0
"""Seconds without one after which a holder on another machine counts as dead."""


def _slurm() -> dict[str, int] | None:
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": int(job), "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))} if job else None


@dataclass(frozen=True)
class Holder:
    """A process, told apart from all others that there have been."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: str | None = field(default_factory=lambda: _started(os.getpid()))
    """In ticks since its machine's boot; None where there is no /proc."""
    boot: str | None = field(default_factory=lambda: _text("/proc/sys/kernel/random/boot_id"))
    namespace: str | None = field(default_factory=lambda: _link("/proc/self/ns/pid"))
    """That its pid is of: a container has one of its own."""
    slurm: dict[str, int] | None = field(default_factory=_slurm)
    """The SLURM job that it is of, and how often that was begun before."""
    token: str = field(default_factory=lambda: uuid4().hex)
    """Of this holding."""
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def alive(self, untouched: float) -> bool:
        """Whether the process still holds what it last touched `untouched` seconds ago."""
        here = Holder()
        if self.slurm is not None and here.slurm is not None:
            job, restarts = here.slurm["job"], here.slurm["restarts"]
            if self.slurm["job"] == job and self.slurm["restarts"] < restarts:
                return False
        if self.host == here.host and None not in (self.boot, here.boot):
            if self.boot != here.boot:
                return False
            if self.namespace == here.namespace:
                return self.started is not None and self.started == _started(self.pid)
        return untouched < DEAD

    @classmethod
    def read(cls, content: dict[str, Any]) -> "Holder":
        """The one whose fields are `content`; what an older version did not write is unknown, not this process's.

        Raises:
            TypeError: they are no holder's.
        """
        return cls(**{"slurm": None, **content})

    def is_here(self) -> bool:
        """Whether it is this process."""
        here = Holder()
        keys = ("host", "pid", "started", "boot", "namespace")
        return all(getattr(self, key) == getattr(here, key) for key in keys)


class Lock:
    """That this process holds `directory`."""

    def __init__(self, directory: Path, option: str) -> None:
        self._path = directory / NAME
        self._option = option
        self._holder = Holder()
        self._released = threading.Event()
        self._made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{option}={directory} cannot be made ({error.strerror}): give {option}= where you may write"
            ) from error
        try:
            self._take()
        except OSError:
            self._remove_made()
            raise
        threading.Thread(target=self._touch, name="lock", daemon=True).start()

    def take_again(self, moved: Path) -> None:
        """After the directory was `moved` away, lock and all: hold the one that is to be in its place.

        Raises:
            FileExistsError: another process was quicker.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._take()
        (moved / NAME).unlink(missing_ok=True)

    def release(self) -> None:
        """Remove the lock, and the folders that were made for it if there is nothing else in them.

        In a process forked from the holder's nothing happens.
        """
        if os.getpid() != self._holder.pid:
            return
        self._released.set()
        with suppress(OSError):
            if (held := _read(self._path)) is not None and held.token == self._holder.token:
                self._path.unlink()
        self._remove_made()

    def _remove_made(self) -> None:
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _take(self) -> None:
        directory = self._path.parent
        try:
            _take(self._path, self._holder, self._option)
            remove_dead(directory)
        except FileExistsError:
            raise
        except OSError as error:
            raise OSError(
                f"{self._option}={directory} cannot be written to ({error.strerror}): make room, or give another "
                f"{self._option}="
            ) from error

    def _touch(self) -> None:
        while not self._released.wait(TOUCHED):
            with suppress(OSError):  # the disk may come back
                os.utime(self._path)


@contextmanager
def locked(directory: Path, option: str = "output_dir") -> Iterator[Lock]:
    """This process alone works in `directory`, which `option` names and which is made if need be.

    Raises:
        FileExistsError: another process does; the message names it.
        OSError: the directory cannot be made or written to.
    """
    lock = Lock(directory, option)
    try:
        yield lock
    finally:
        lock.release()


def held_by(directory: Path) -> tuple[Holder | None, bool]:
    """Whose lock is on `directory`, if there is one, and whether that process is alive."""
    holder = _read(directory / NAME)
    return holder, holder is not None and not _dead(directory / NAME, holder)


def is_lock(path: Path) -> bool:
    """Whether a file is part of a lock that keeps this process out of nothing: its own, or that of a dead one."""
    return _named_so(path) and ((holder := _read(path)) is None or holder.is_here() or _dead(path, holder))


def remove_dead(directory: Path) -> None:
    """Remove what dead processes have left of their locks on `directory`."""
    for path in filter(_named_so, directory.iterdir()):
        if (holder := _read(path)) is not None and not holder.is_here() and _dead(path, holder):
            path.unlink(missing_ok=True)


def _named_so(path: Path) -> bool:
    return path.name == NAME or path.name.startswith(f".{NAME}.")


def _dead(path: Path, holder: Holder) -> bool:
    try:
        return not holder.alive(time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return True


def _take(path: Path, holder: Holder, option: str) -> None:
    """Make `path` the lock of `holder`.

    A dead holder's is replaced by whoever holds the right to do so, itself a lock: so there is one, and since nobody
    else replaces that lock, it is still the dead one's or the right has been used.

    Raises:
        FileExistsError: another process holds it.
    """
    new = path.with_name(f".{NAME}.{holder.token}.new")
    try:
        new.write_text(json.dumps(asdict(holder), indent=2) + "\n")
        while True:
            with suppress(FileExistsError):
                os.link(new, path)  # all of its content at once, or not at all
                return
            found, untouched = _read(path), _age(path, new)
            if found is None or untouched is None:  # released just now
                continue
            if found.alive(untouched):
                raise FileExistsError(_refused(path.parent, found, untouched, option))
            right = path.with_name(f".{NAME}.{found.token}")
            _take(right, Holder(), option)
            try:
                if (still := _read(path)) is not None and still.token == found.token:
                    log.warning("taking over %s from process %d on %s, which is gone", path, found.pid, found.host)
                    new.replace(path)
                    return
            finally:
                right.unlink(missing_ok=True)
    finally:
        new.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Whose lock it is; None when there is none, a holder unknown when it was not written by this program."""
    try:
        return Holder.read(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder(
            host="unknown", pid=0, started=None, boot=None, namespace=None, slurm=None, token="unknown", since="unknown"
        )


def _age(path: Path, new: Path) -> float | None:
    """Seconds since `path` was touched, by the clock that has just touched `new`; None when it is not there."""
    os.utime(new)
    try:
        return new.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _refused(directory: Path, holder: Holder, untouched: float, option: str) -> str:
    another = f"another {option}=" + (" or job_name=" if option == "output_dir" else "")
    return (
        f"{option}={directory} is being written by process {holder.pid} on {holder.host} since {holder.since}, last "
        f"heard of {max(untouched, 0):.0f} s ago: wait for it or stop it, or give {another} "
        f"(if it is gone for certain, delete {directory / NAME})"
    )


def _started(pid: int) -> str | None:
    """When process `pid` began; None when there is none, or one that has ended and was not waited for."""
    stat = _text(f"/proc/{pid}/stat")
    words = stat.rpartition(")")[2].split() if stat else []
    return words[19] if words and words[0] not in "ZX" else None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return str(Path(path).readlink())
    except OSError:
        return None
