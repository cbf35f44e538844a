"""A signal that comes as a lock is taken does not leave it held for ever."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from types import FrameType

import pytest

from pusht_act.runtime.process_pool import imap
from pusht_act.runtime.signals import StopSignal, signals


@contextmanager
def signal_when_a_lock_is_taken(nth: int) -> Iterator[list[int]]:
    """SIGTERM in the instant in which the main thread has its `nth` lock of a Condition and `with` has not; its times.

    What an exception does there to a Future, a Queue, an Event or a Thread: the lock is held for ever.
    """
    times: list[int] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "c_return" and frame.f_code is threading.Condition.__enter__.__code__:
            times.append(len(times))
            if len(times) == nth:
                signal.raise_signal(signal.SIGTERM)

    sys.setprofile(profile)
    try:
        yield times
    finally:
        sys.setprofile(None)


def by_processes() -> None:
    with closing(imap(abs, range(-3, 0), 2, "")) as results:
        assert list(results) == [3, 2, 1]


def by_threads() -> None:
    with ThreadPoolExecutor(2) as threads:
        futures = [signals.submit(threads, abs, number) for number in range(-3, 0)]
        signals.wait(*futures)
        assert [future.result() for future in futures] == [3, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("work", [by_processes, by_threads], ids=lambda work: work.__name__)
def test_a_signal_leaves_no_lock_behind(work: Callable[[], None]) -> None:
    former, nth, sent = signal.signal(signal.SIGTERM, signal.default_int_handler), 0, True
    try:
        while sent:
            nth += 1
            with suppress(StopSignal), signals.handle(), signal_when_a_lock_is_taken(nth) as times:
                work()
            sent = len(times) >= nth
    finally:
        signal.signal(signal.SIGTERM, former)
    assert nth > 10
