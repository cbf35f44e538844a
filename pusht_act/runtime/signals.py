"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 stop a job; the command then leaves with 128 + the signal's number.

    listening()         a signal raises `Stopped` wherever the job is, ...
      pass_on()         ... but with workers, which are stopped first, ...
      deferred()        ... but in the training loop, which asks between two steps whether there was one, ...
        at_once()       ... but where that waits or evaluates, which is broken off
    withheld()          processes begun in here never see a signal: they end with their parent
    begin(), wait_for() work for other threads and processes; what a signal must not break off is not

A second Ctrl-C is a KeyboardInterrupt at once. In a job that SLURM runs SIGTERM only asks for a checkpoint: it comes
before a kill, after which SLURM queues the job again, or before SIGUSR2, at which submitit does. Imports neither torch
nor lerobot.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT_S = 0.1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(BaseException):
    """A signal stopped the job. No `Exception`: after one of those a sweep goes on to its next job."""

    def __init__(self, number: int, step: int | None = None, checkpoint: Path | None = None) -> None:
        super().__init__(number, step, checkpoint)
        self.signal = signal.Signals(number)
        self.step = step
        """That training came to; None: it was not in its loop."""
        self.checkpoint = checkpoint
        """The newest that this process has saved."""
        self.told = False
        """Whether a line has said so."""

    @property
    def code(self) -> int:
        """What the command leaves with."""
        return 128 + self.signal

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}" + (f" after step {self.step}" if self.step is not None else "")


@dataclass
class Stop:
    """Whether this process was told to stop: there is one, as there is one set of handlers."""

    received: int | None = None
    """The first signal."""
    listening: bool = False
    deferred: bool = False
    save_asked: bool = False
    """Whether there was a signal after which a checkpoint is wanted and the job goes on."""
    leaving: bool = False
    """For another reason, so that a signal changes nothing."""
    passes_on: bool = False

    @property
    def asked(self) -> bool:
        """Whether there was a signal."""
        return self.received is not None

    def check(self, step: int | None = None, checkpoint: Path | None = None) -> None:
        """Leave if there was a signal; what the handler raises within a destructor, say, Python drops.

        Raises:
            Stopped: there was, with `step` and `checkpoint`.
        """
        if self.received is not None and not self.leaving:
            raise Stopped(self.received, step, checkpoint)

    def wants_checkpoint(self) -> bool:
        """Whether one is wanted now, as it is once for a signal."""
        wanted, self.save_asked = self.asked or self.save_asked, False
        return wanted


_stop = Stop()


def _handle(number: int, _frame: object) -> None:
    """Runs between any two bytecodes of the main thread, so it notes the signal and logs nothing."""
    if number == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        _stop.save_asked = True
        return
    again, _stop.received = _stop.asked, _stop.received or number
    if again and number == signal.SIGINT:
        raise KeyboardInterrupt
    if again:
        return
    workers = multiprocessing.active_children() if _stop.passes_on else []
    for worker in workers:
        worker.terminate()
    if not workers and not _stop.deferred and not _stop.leaving:
        raise Stopped(number)


@contextmanager
def listening() -> Iterator[None]:
    """Within this a signal stops the job; in another thread than the main one nothing changes.

    One that was ignored stays so, as a shell has it for the jobs in its background. The former handlers come back.

    Raises:
        Stopped: there was a signal.
    """
    if _stop.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in STOPPING}
    ours = [number for number, handler in former.items() if handler not in (signal.SIG_IGN, None)]
    _stop.received, _stop.deferred, _stop.listening = None, False, True
    _stop.save_asked = _stop.passes_on = False
    try:
        for number in ours:
            signal.signal(number, _handle)
        yield
        _stop.check()
    finally:
        for number in ours:
            signal.signal(number, former[number])
        _stop.received, _stop.listening, _stop.leaving = None, False, False


def heard() -> int | None:
    """The first signal that there was."""
    return _stop.received


def note(number: int) -> None:
    """Another process of this job was sent a signal, which stops this one, too, where it asks."""
    _stop.received = _stop.received or number


def leave() -> None:
    """This process is about to leave since another one is gone; what its launcher sends to say so comes too late."""
    _stop.leaving = True


def in_charge() -> bool:
    """Whether a `listening` is around the caller."""
    return _stop.listening


def pass_on() -> None:
    """Until the end of `listening` a signal goes to the processes of multiprocessing's, if there are any, as SIGTERM.

    It stops this one when they have ended, by `check`.
    """
    _stop.passes_on = True


def check() -> None:
    """Leave if there was a signal.

    Raises:
        Stopped: there was.
    """
    _stop.check()


@contextmanager
def deferred() -> Iterator[Stop]:
    """Within this a signal is noted only.

    Raises:
        Stopped: there was one before or, in the end, nobody has acted upon it; not from within another `deferred`.
    """
    if not _stop.deferred:
        _stop.check()
    with _noted():
        yield _stop


@contextmanager
def _noted() -> Iterator[None]:
    former, _stop.deferred = _stop.deferred, True
    try:
        yield
    finally:
        _stop.deferred = former
    if not former:
        _stop.check()


@contextmanager
def at_once() -> Iterator[None]:
    """Within this, in `deferred`, a signal breaks off what is being done; so does one that was noted before.

    Raises:
        Stopped: there was one.
    """
    former, _stop.deferred = _stop.deferred, False
    try:
        _stop.check()
        yield
    finally:
        _stop.deferred = former


@contextmanager
def withheld() -> Iterator[None]:
    """Processes begun in here inherit that they never see the signals; this one acts upon them at the end.

    Blocking them does the first alone: another thread may take a signal, and Python's handler runs in the main one.

    Raises:
        Stopped: there was one.
    """
    with _noted():  # without asking at first: process 0 says farewell to the others after a signal, too
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


def begin[**P, T](executor: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """`executor.submit`, which a signal does not break off: a lock it holds just then would be held for ever.

    Python's locks that are written in Python, Condition's and with it those of Future, Queue, Event and Thread, are
    taken one bytecode before `with` knows of it (bpo-29988).

    Raises:
        Stopped: there was a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return executor.submit(work, *args, **kwargs)
    with deferred():
        return executor.submit(work, *args, **kwargs)


def wait_for(*futures: Future[Any]) -> None:
    """Until all are done or one has failed; for the same reason a signal breaks it off from time to time only.

    Raises:
        Stopped: there was a signal, at most WAIT_S ago.
    """
    if threading.current_thread() is not threading.main_thread():
        wait(futures, return_when=FIRST_EXCEPTION)
        return
    ended = False
    while not ended:
        with deferred():
            done = wait(futures, WAIT_S, FIRST_EXCEPTION).done
            ended = len(done) == len(futures) or any(future.exception() for future in done)
