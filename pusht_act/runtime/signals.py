"""SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop a job; the command then exits with 128 + the signal's number.

    signals.handle()              a signal raises `StopSignal` wherever the job is, ...
      forward_to_children()       ... but with worker processes of multiprocessing, which are stopped first, ...
      defer()                     ... but in the training loop, which asks after each step whether there was one, ...
        interruptible()           ... but where the loop waits or evaluates, which is interrupted
    signals.block()               processes started in here never see a signal: they end with their parent
    signals.submit(), wait()      hand work to threads and processes and wait for it, which no signal may break

A second Ctrl-C is a KeyboardInterrupt at once. In a job that SLURM runs, SIGTERM only asks for a checkpoint: it comes
before a kill, after which SLURM queues the job again, or before SIGUSR2, at which submitit does. The training loop
saves the step and stops (training/trainer.py, `_fit`), and job.py, `_print_how_to_resume`, logs the command that
continues. Imports neither torch nor lerobot.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

POLL_S = 0.1
"""Seconds for which a wait defers signals at a time."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SIGHUP comes where the terminal or the ssh connection is closed; after nohup it is ignored and stays so."""


class StopSignal(SystemExit):
    """A signal stopped the job. Not an `Exception`: after one of those a sweep continues with its next job.

    As a SystemExit it ends a script that does not catch it with exit code 128 + the signal's number, without a
    traceback; a notebook shows it in a line and stays alive.
    """

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
    def code(self) -> int:  # type: ignore[override]
        """What the command leaves with."""
        return 128 + self.signal

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}" + (f" after step {self.step}" if self.step is not None else "")


class SignalHandler:
    """The signals of this process. There is one, `signals`, as a process has one set of handlers."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal; another rank's, too, once the ranks have agreed on it."""
        self.is_active = False
        """Whether a `handle` is around the caller."""
        self._deferred = False
        self._until = ""
        self._checkpoint_requested = False
        self._ignored = False
        self._forwards = False

    def __reduce__(self) -> str:
        """Pickle as a reference: a launcher's process has signals of its own, not a copy of its launcher's."""
        return "signals"

    @contextmanager
    def handle(self) -> Iterator[None]:
        """Let a signal stop the job within this; do nothing in another thread than the main one.

        The former handlers come back in the end.

        Raises:
            StopSignal: there was a signal.
        """
        # Python runs handlers in the main thread alone, and only that thread may set them.
        if self.is_active or threading.current_thread() is not threading.main_thread():
            yield
            return
        # A shell ignores SIGINT for the jobs in its background: that stays so.
        former = {number: signal.getsignal(number) for number in STOPPING}
        ours = [number for number, handler in former.items() if handler not in (signal.SIG_IGN, None)]
        self.received, self._deferred, self.is_active = None, False, True
        self._checkpoint_requested = self._forwards = False
        try:
            for number in ours:
                signal.signal(number, self._on_signal)
            yield
            self.raise_if_stopped()
        finally:
            for number in ours:
                signal.signal(number, former[number])
            self.received, self.is_active, self._ignored = None, False, False

    def _on_signal(self, number: int, _frame: object) -> None:
        """Note the signal. This runs between any two bytecodes of the main thread, so it logs nothing."""
        # SLURM announces a preemption by SIGTERM and kills later: a checkpoint is all that there is time for.
        if number == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            self._checkpoint_requested = True
            return
        # The first signal counts. A second Ctrl-C means that the user does not want to wait for a checkpoint.
        again, self.received = self.received is not None, self.received or number
        if again and number == signal.SIGINT:
            _say("leaving at once")
            raise KeyboardInterrupt("interrupted by a second Ctrl-C, without a checkpoint of the last step")
        if again:
            return
        # Worker processes that were started by multiprocessing end first, so that none outlives this process.
        workers = multiprocessing.active_children() if self._forwards else []
        for worker in workers:
            worker.terminate()
        if workers:
            _say(f"{signal.Signals(number).name}: waiting for {len(workers)} processes to save and end")
        elif self._deferred and self._until:
            _say(f"{signal.Signals(number).name}: {self._until}")
        if not workers and not self._deferred and not self._ignored:
            raise StopSignal(number)

    def raise_if_stopped(self, step: int | None = None, checkpoint: Path | None = None) -> None:
        """Raise if there was a signal, also where Python dropped what the handler raised, as in a destructor.

        Raises:
            StopSignal: there was, with `step` and `checkpoint`.
        """
        if self.received is not None and not self._ignored:
            raise StopSignal(self.received, step, checkpoint)

    def pop_checkpoint_request(self) -> bool:
        """Return whether a signal asks for a checkpoint, and forget it: it is answered once."""
        wanted, self._checkpoint_requested = self.received is not None or self._checkpoint_requested, False
        return wanted

    def record_peer(self, number: int) -> None:
        """Note that another rank was sent a signal, which stops this one, too, where it asks."""
        self.received = self.received or number

    def ignore(self) -> None:
        """Ignore further signals: this process exits already because a peer died, and SIGTERM would hide why."""
        self._ignored = True

    def forward_to_children(self) -> None:
        """Send a signal on to multiprocessing's processes, if there are any, as SIGTERM, until `handle` ends.

        It stops this process when they have ended, by `raise_if_stopped`.
        """
        self._forwards = True

    @contextmanager
    def defer(self, until: str = "") -> Iterator["SignalHandler"]:
        """Only note a signal within this.

        Args:
            until: What is finished first, in words, to be printed at a signal; empty where it takes no time.

        Raises:
            StopSignal: there was one before, or nobody acted upon it; not within another `defer`.
        """
        # Only the outermost block acts: an inner one must not break what the outer one protects.
        if not self._deferred:
            self.raise_if_stopped()
        with self._noting(until):
            yield self

    @contextmanager
    def _noting(self, until: str = "") -> Iterator[None]:
        former, self._deferred = self._deferred, True
        former_until, self._until = self._until, until or self._until
        try:
            yield
        finally:
            self._deferred, self._until = former, former_until
        if not former:
            self.raise_if_stopped()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within `defer`, let a signal interrupt what is being done; so does one that was noted before.

        Raises:
            StopSignal: there was one.
        """
        former, self._deferred = self._deferred, False
        try:
            self.raise_if_stopped()
            yield
        finally:
            self._deferred = former

    @contextmanager
    def block(self) -> Iterator[None]:
        """Let processes that are started within this inherit that they never see the signals.

        This process acts upon them at the end.

        Raises:
            StopSignal: there was one.
        """
        # Not `defer`, which would raise at once: rank 0 announces its exit to the others after a signal, too.
        with self._noting():
            # A child inherits the mask, not the handlers. Blocking alone would not protect this process: another of
            # its threads could take the signal, and Python runs the handler in the main thread either way.
            former = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def submit[**P, T](self, executor: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit work to `executor` with signals deferred: a lock that it holds just then would be held for ever.

        Python's locks that are written in Python, Condition's and with it those of Future, Queue, Event and Thread, are
        taken one bytecode before `with` knows of it (bpo-29988). A pool of processes starts one here: it inherits that
        it never sees a signal.

        Raises:
            StopSignal: there was a signal.
        """
        if threading.current_thread() is not threading.main_thread():
            return executor.submit(work, *args, **kwargs)
        with self.defer(), self.block():
            return executor.submit(work, *args, **kwargs)

    def wait(self, *futures: Future[Any]) -> None:
        """Wait until all are done or one has failed; for the same reason a signal interrupts that only now and then.

        Raises:
            StopSignal: there was a signal, at most POLL_S ago.
        """
        if threading.current_thread() is not threading.main_thread():
            wait(futures, return_when=FIRST_EXCEPTION)
            return
        # Wait in short stretches, each with signals deferred, and let one through in between.
        ended = False
        while not ended:
            with self.defer():
                done = wait(futures, POLL_S, FIRST_EXCEPTION).done
                ended = len(done) == len(futures) or any(future.exception() for future in done)


def _say(text: str) -> None:
    """Print a line from within a signal handler: no buffer of Python's may be touched there."""
    # In a process without a standard error, number 2 may be any file.
    if sys.__stderr__ is not None:
        with suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno(), f"\npusht-act: {text}\n".encode())


signals = SignalHandler()
