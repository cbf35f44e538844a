"""Work shared out among processes that end with the block they are made in, and with this process.

They import neither torch nor lerobot.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from pusht_act.runtime.signals import block_signals, submit_uninterrupted, wait_interruptible

RETRY_HINT = "give the same command again, if it happens again with a smaller"
PREFETCH_ITEMS = 2
"""Items that are begun before the caller wants them, for each process: pictures of thousands would fill the memory."""


@contextmanager
def worker_processes(count: int, remedy: str) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with this block, at once where that is left by an exception, and with this process.

    Give it work by `submit_uninterrupted`, and take that by `result`, so that a signal leaves no lock behind.

    Raises:
        OSError: one of them was killed; `remedy` says what is kept and what to do.
    """
    # spawn, since the caller may hold threads or a GPU, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool: ProcessPoolExecutor | None = None
    try:
        with block_signals():  # a signal amid this would leave half a process behind
            pool = ProcessPoolExecutor(count, context, _tie_to_parent)
            pool.submit(int)  # the first call begins all of them
        yield pool
    except BaseException as error:
        processes = pool._processes if pool is not None else None
        for process in list((processes or {}).values()):  # what they are at would be waited for
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise OSError(f"a worker process was killed, perhaps for want of memory: {remedy}") from error
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def result[T](coming: Future[T]) -> T:
    """What it came to.

    Raises:
        StopSignal: there was a signal.
    """
    wait_interruptible(coming)
    return coming.result()


def imap[T, U](work: Callable[[T], U], items: Iterable[T], workers: int, remedy: str) -> Generator[U]:
    """`work` of each item, in this process or by `workers` others; close it to end them.

    Raises:
        OSError: as `worker_processes`.
    """
    if workers == 1:
        yield from map(work, items)
        return
    with worker_processes(workers, remedy) as pool:
        coming: deque[Future[U]] = deque()
        for item in items:
            coming.append(submit_uninterrupted(pool, work, item))
            if len(coming) > PREFETCH_ITEMS * workers:
                yield result(coming.popleft())
        while coming:
            yield result(coming.popleft())


def _tie_to_parent() -> None:
    """A worker whose parent was killed must not wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
