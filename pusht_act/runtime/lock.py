"""One writer per run directory: the file `lock` in it names the process that owns the directory.

    lock                 {"host", "pid", "started", "boot", "namespace", "slurm", "token", "since"}; the owner's
                         heartbeat sets its modification time every 30 s
    .lock.<token>        the right to take over from the stale owner <token>, itself a lock of this format
    .lock.<token>.new    a lock that is being written

An owner is stale when its process is gone. On the owner's machine that is looked up at once: the boot, the process
number and its start time must all match. A job that SLURM requeued supersedes its earlier run, wherever that ran. Any
other owner, on another machine or in another container, holds a lease: it is stale after 5 minutes without a heartbeat,
by the file server's clock.

filelock's SoftFileLease (4.2) is no substitute. On NFS it never takes over a stale lock, because it needs
RENAME_EXCHANGE, which NFS refuses. It must watch another machine's lock for a whole lease to call it stale, and it does
not know SLURM's jobs. Imports neither torch nor lerobot.
"""

import errno
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

from pusht_act.runtime.errors import DiskError
from pusht_act.runtime.stored import read_text

log = logging.getLogger(__name__)

NAME = "lock"
HEARTBEAT_S = 30.0
"""Seconds between two heartbeats."""
LEASE_S = 300.0
"""Seconds without a heartbeat after which an owner on another machine is stale."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without hard links answer."""


def _slurm_job() -> dict[str, int] | None:
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": int(job), "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0"))} if job else None


@dataclass(frozen=True)
class LockOwner:
    """Identify a process among all that have ever run; by default, this one."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: str | None = field(default_factory=lambda: _start_time(os.getpid()))
    """Clock ticks from the machine's boot to the process's start; None without /proc."""
    boot: str | None = field(default_factory=lambda: _text("/proc/sys/kernel/random/boot_id"))
    namespace: str | None = field(default_factory=lambda: _link("/proc/self/ns/pid"))
    """The pid namespace: containers may share a host name but number their processes separately."""
    slurm: dict[str, int] | None = field(default_factory=_slurm_job)
    """The SLURM job and how often it was requeued."""
    token: str = field(default_factory=lambda: uuid4().hex)
    """Unique to this acquisition."""
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def alive(self, silence: float) -> bool:
        """Return whether the process still runs, given the seconds of `silence` since its last heartbeat."""
        here = LockOwner()
        # SLURM starts a requeued job only once it counts the earlier run as over.
        if self.slurm is not None and here.slurm is not None:
            job, restarts = here.slurm["job"], here.slurm["restarts"]
            if self.slurm["job"] == job and self.slurm["restarts"] < restarts:
                return False
        # On this machine the process table has the answer, even for a process that is stopped and sends no heartbeat.
        if self.host == here.host and None not in (self.boot, here.boot):
            if self.boot != here.boot:
                return False
            if self.namespace == here.namespace:
                return self.started is not None and self.started == _start_time(self.pid)
        return silence < LEASE_S

    @classmethod
    def read(cls, content: dict[str, Any]) -> "LockOwner":
        """Build the owner that a lock file's `content` names.

        What an older version did not write counts as unknown instead of taking this process's value.

        Raises:
            TypeError: the fields are not an owner's.
        """
        owner = cls(**{"slurm": None, **content})
        if not isinstance(owner.slurm, dict | None):
            raise TypeError("not the fields of a lock's owner")
        texts = (owner.host, owner.token, owner.since, owner.started or "", owner.boot or "", owner.namespace or "")
        numbers = (owner.pid, *((owner.slurm or {}).get(key, 0) for key in ("job", "restarts")))
        if not all(isinstance(each, str) for each in texts) or not all(type(each) is int for each in numbers):
            raise TypeError("not the fields of a lock's owner")
        return owner

    def is_this_process(self) -> bool:
        """Return whether the owner is the calling process."""
        here = LockOwner()
        keys = ("host", "pid", "started", "boot", "namespace")
        return all(getattr(self, key) == getattr(here, key) for key in keys)


class Lock:
    """Own `directory` from construction until `release`.

    Args:
        directory: made if it does not exist.
        option: the option that names it, for error messages.
    """

    def __init__(self, directory: Path, option: str) -> None:
        self._path = directory / NAME
        self._option = option
        self._owner = LockOwner()
        self._released = threading.Event()
        self._made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{option}={directory} cannot be made ({error.strerror}): give {option}= where you may write"
            ) from error
        try:
            self._acquire()
        except OSError:
            self._remove_made()
            raise
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def relock(self, moved: Path) -> None:
        """Lock the directory's old path again after the directory, lock included, was `moved` aside.

        Raises:
            FileExistsError: another process locked the path first.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._acquire()
        (moved / NAME).unlink(missing_ok=True)

    def release(self) -> None:
        """Remove the lock, and the folders that were made for it if they are still empty.

        Does nothing in a process forked from the owner.
        """
        if os.getpid() != self._owner.pid:
            return
        self._released.set()
        with suppress(OSError):
            if (found := _read(self._path)) is not None and found.token == self._owner.token:
                self._path.unlink()
        self._remove_made()

    def _remove_made(self) -> None:
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _acquire(self) -> None:
        directory = self._path.parent
        try:
            _acquire(self._path, self._owner, self._option)
            remove_stale(directory)
        except FileExistsError:
            raise
        except OSError as error:
            raise DiskError(
                f"{self._option}={directory} cannot be written to ({error.strerror}): make room, or give another "
                f"{self._option}="
            ) from error

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            # The disk may come back.
            with suppress(OSError):
                os.utime(self._path)


@contextmanager
def locked(directory: Path, option: str = "output_dir") -> Iterator[Lock]:
    """Own `directory`, which `option` names and which is made if it does not exist.

    Raises:
        FileExistsError: another process owns it; the message names that process.
        OSError: the directory cannot be made or written to.
    """
    lock = Lock(directory, option)
    try:
        yield lock
    finally:
        lock.release()


def read_owner(directory: Path) -> tuple[LockOwner | None, bool]:
    """Return the owner of `directory`, None if it is not locked, and whether that process is alive."""
    owner = _read(directory / NAME)
    return owner, owner is not None and not _is_stale(directory / NAME, owner)


def is_lock(path: Path) -> bool:
    """Return whether `path` is a lock file that does not keep this process out: its own, or a stale one."""
    return _has_lock_name(path) and (
        (owner := _read(path)) is None or owner.is_this_process() or _is_stale(path, owner)
    )


def remove_stale(directory: Path) -> None:
    """Remove the lock files that processes which are gone have left in `directory`."""
    for path in filter(_has_lock_name, directory.iterdir()):
        if (owner := _read(path)) is not None and not owner.is_this_process() and _is_stale(path, owner):
            path.unlink(missing_ok=True)


def _has_lock_name(path: Path) -> bool:
    return path.name == NAME or path.name.startswith(f".{NAME}.")


def _is_stale(path: Path, owner: LockOwner) -> bool:
    try:
        return not owner.alive(time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return True


def _acquire(path: Path, owner: LockOwner, option: str) -> None:
    """Make `path` the lock of `owner`, taking over from a stale one.

    Raises:
        FileExistsError: a live process owns it.
    """
    new = path.with_name(f".{NAME}.{owner.token}.new")
    try:
        new.write_text(json.dumps(asdict(owner), indent=2) + "\n")
        while True:
            with suppress(FileExistsError):
                _create(path, new)
                return
            found, silence = _read(path), _silence(path, new)
            if found is None or silence is None:  # released just now
                continue
            if found.alive(silence):
                raise FileExistsError(_refusal(path.parent, found, silence, option))
            # Several processes may find the same stale owner. Only the one that locks its token may replace its lock,
            # and only while the token is still there: it is not once an earlier one has used that right.
            right = path.with_name(f".{NAME}.{found.token}")
            _acquire(right, LockOwner(), option)
            try:
                if (still := _read(path)) is not None and still.token == found.token:
                    log.warning("taking over %s from process %d on %s, which is gone", path, found.pid, found.host)
                    new.replace(path)
                    return
            finally:
                right.unlink(missing_ok=True)
    finally:
        new.unlink(missing_ok=True)


def _create(path: Path, new: Path) -> None:
    """Make a file `path` with the content of `new`.

    Raises:
        FileExistsError: there is one.
    """
    # A hard link shows the whole content at once, also on NFS.
    try:
        os.link(new, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # exFAT and some network disks have none. Who reads the file amid this sees an unknown owner that is alive.
        with path.open("x") as file:
            file.write(new.read_text())


def _read(path: Path) -> LockOwner | None:
    """Return the lock's owner; None without a lock, an unknown owner if this program did not write it."""
    try:
        return LockOwner.read(json.loads(read_text(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return LockOwner(
            host="unknown", pid=0, started=None, boot=None, namespace=None, slurm=None, token="unknown", since="unknown"
        )


def _silence(path: Path, new: Path) -> float | None:
    """Return the seconds since the last heartbeat at `path`; None without a lock.

    Touches `new` to ask the file server's clock, since another machine's may be minutes off.
    """
    os.utime(new)
    try:
        return new.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None


def _refusal(directory: Path, owner: LockOwner, silence: float, option: str) -> str:
    another = f"another {option}=" + (" or job_name=" if option == "output_dir" else "")
    return (
        f"{option}={directory} is being written by process {owner.pid} on {owner.host} since {owner.since}, last "
        f"heard of {max(silence, 0):.0f} s ago: wait for it or stop it, or give {another} "
        f"(if it is gone for certain, delete {directory / NAME})"
    )


def _start_time(pid: int) -> str | None:
    """Return the start time of process `pid`; None if there is none, or only a zombie."""
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
