"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 stop a job; the command then exits with 128 + the signal's number.

    listening()         a signal raises `StopSignal` wherever the job is, ...
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

POLL_S = 0.1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal(BaseException):
    """A signal stopped the job. No `Exception`: after one of those a sweep goes on to its next job."""

    def __init__(self, number: int, step: int | None = None, checkpoint: Path | None = None) -> None:
        super().__init__(number, step, checkpoint)
        self.signal = signal.Signals(number)
        self.step = step
        """That training came to; None: it was not in its loop."""
        self.checkpoint = checkpoint
        """The newest that this process has saved."""
        self.reported = False
        """Whether a line has said so."""

    @property
    def code(self) -> int:
        """What the command leaves with."""
        return 128 + self.signal

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}" + (f" after step {self.step}" if self.step is not None else "")


@dataclass
class SignalState:
    """Whether this process was told to stop: there is one, as there is one set of handlers."""

    received: int | None = None
    """The first signal."""
    listening: bool = False
    deferred: bool = False
    checkpoint_requested: bool = False
    """Whether there was a signal after which a checkpoint is wanted and the job goes on."""
    leaving: bool = False
    """For another reason, so that a signal changes nothing."""
    passes_on: bool = False

    @property
    def stop_requested(self) -> bool:
        """Whether there was a signal."""
        return self.received is not None

    def raise_if_stopped(self, step: int | None = None, checkpoint: Path | None = None) -> None:
        """Leave if there was a signal; what the handler raises within a destructor, say, Python drops.

        Raises:
            StopSignal: there was, with `step` and `checkpoint`.
        """
        if self.received is not None and not self.leaving:
            raise StopSignal(self.received, step, checkpoint)

    def pop_checkpoint_request(self) -> bool:
        """Whether one is wanted now, as it is once for a signal."""
        wanted, self.checkpoint_requested = self.stop_requested or self.checkpoint_requested, False
        return wanted


_stop = SignalState()


def _handle(number: int, _frame: object) -> None:
    """Runs between any two bytecodes of the main thread, so it notes the signal and logs nothing."""
    # SLURM announces a preemption by SIGTERM and kills later: a checkpoint is all that there is time for.
    if number == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        _stop.checkpoint_requested = True
        return
    # The first signal counts. A second Ctrl-C means that the user does not want to wait for a checkpoint.
    again, _stop.received = _stop.stop_requested, _stop.received or number
    if again and number == signal.SIGINT:
        raise KeyboardInterrupt
    if again:
        return
    # Worker processes that were started by multiprocessing end first, so that none outlives this process.
    workers = multiprocessing.active_children() if _stop.passes_on else []
    for worker in workers:
        worker.terminate()
    if not workers and not _stop.deferred and not _stop.leaving:
        raise StopSignal(number)


@contextmanager
def handle_signals() -> Iterator[None]:
    """Within this a signal stops the job; in another thread than the main one nothing changes.

    One that was ignored stays so, as a shell has it for the jobs in its background. The former handlers come back.

    Raises:
        StopSignal: there was a signal.
    """
    # Python runs handlers in the main thread alone, and only that thread may set them.
    if _stop.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in STOPPING}
    # A shell ignores SIGINT for the jobs in its background: that stays so.
    ours = [number for number, handler in former.items() if handler not in (signal.SIG_IGN, None)]
    _stop.received, _stop.deferred, _stop.listening = None, False, True
    _stop.checkpoint_requested = _stop.passes_on = False
    try:
        for number in ours:
            signal.signal(number, _handle)
        yield
        _stop.raise_if_stopped()
    finally:
        for number in ours:
            signal.signal(number, former[number])
        _stop.received, _stop.listening, _stop.leaving = None, False, False


def received_signal() -> int | None:
    """The first signal that there was."""
    return _stop.received


def record_peer_signal(number: int) -> None:
    """Another process of this job was sent a signal, which stops this one, too, where it asks."""
    _stop.received = _stop.received or number


def ignore_signals() -> None:
    """This process is about to leave since another one is gone; what its launcher sends to say so comes too late."""
    _stop.leaving = True


def handling_signals() -> bool:
    """Whether a `handle_signals` is around the caller."""
    return _stop.listening


def forward_to_children() -> None:
    """Send a signal on to multiprocessing's processes, if there are any, as SIGTERM, until `handle_signals` ends.

    It stops this one when they have ended, by `raise_if_stopped`.
    """
    _stop.passes_on = True


def raise_if_stopped() -> None:
    """Leave if there was a signal.

    Raises:
        StopSignal: there was.
    """
    _stop.raise_if_stopped()


@contextmanager
def defer_signals() -> Iterator[SignalState]:
    """Within this a signal is noted only.

    Raises:
        StopSignal: there was one before, or nobody acted upon it; not within another `defer_signals`.
    """
    # Only the outermost block acts: an inner one must not break what the outer one protects.
    if not _stop.deferred:
        _stop.raise_if_stopped()
    with _deferred():
        yield _stop


@contextmanager
def _deferred() -> Iterator[None]:
    former, _stop.deferred = _stop.deferred, True
    try:
        yield
    finally:
        _stop.deferred = former
    if not former:
        _stop.raise_if_stopped()


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this, in `defer_signals`, a signal breaks off what is being done; so does one that was noted before.

    Raises:
        StopSignal: there was one.
    """
    former, _stop.deferred = _stop.deferred, False
    try:
        _stop.raise_if_stopped()
        yield
    finally:
        _stop.deferred = former


@contextmanager
def block_signals() -> Iterator[None]:
    """Processes begun in here inherit that they never see the signals; this one acts upon them at the end.

    Blocking them does the first alone: another thread may take a signal, and Python's handler runs in the main one.

    Raises:
        StopSignal: there was one.
    """
    # Not `defer_signals`, which would raise at once: rank 0 announces its exit to the others after a signal, too.
    with _deferred():
        # A child inherits the mask, not the handlers. Blocking alone would not protect this process: another of its
        # threads could take the signal, and Python runs the handler in the main thread either way.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


def submit_uninterrupted[**P, T](
    executor: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Future[T]:
    """`executor.submit`, which a signal does not break off: a lock it holds just then would be held for ever.

    Python's locks that are written in Python, Condition's and with it those of Future, Queue, Event and Thread, are
    taken one bytecode before `with` knows of it (bpo-29988).

    Raises:
        StopSignal: there was a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return executor.submit(work, *args, **kwargs)
    with defer_signals():
        return executor.submit(work, *args, **kwargs)


def wait_interruptible(*futures: Future[Any]) -> None:
    """Until all are done or one has failed; for the same reason a signal breaks it off from time to time only.

    Raises:
        StopSignal: there was a signal, at most WAIT_S ago.
    """
    if threading.current_thread() is not threading.main_thread():
        wait(futures, return_when=FIRST_EXCEPTION)
        return
    # Wait in short stretches, each with signals deferred, and let one through in between.
    ended = False
    while not ended:
        with defer_signals():
            done = wait(futures, POLL_S, FIRST_EXCEPTION).done
            ended = len(done) == len(futures) or any(future.exception() for future in done)
