"""Process pools whose workers end with the block that creates them, and with this process.

Imports neither torch nor lerobot, and neither do the workers.
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess

from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import signals

RETRY_HINT = "give the same command again, if it happens again with a smaller"
GUARD = 'a script has to call pusht_act.run below `if __name__ == "__main__":`, since each worker imports it'
"""What a script without a guard has to do."""
PREFETCH_ITEMS = 2
"""How many items for each worker are submitted ahead of the caller: the images of thousands would fill the memory."""


class _Worker(SpawnProcess):
    """A worker that can be ended although it blocks SIGTERM: the pool terminates the others when one is killed."""

    def terminate(self) -> None:
        """Kill the process."""
        self.kill()


class _WorkerContext(SpawnContext):
    """Starts workers by spawning: the caller may have threads or use a GPU, which do not survive a fork."""

    Process = _Worker


@contextmanager
def worker_processes(count: int, remedy: str) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of `count` processes, which end with the block. If the block raises, they are killed.

    Submit work with `signals.submit` and wait for it with `result`, so that a signal leaves no lock behind.

    Args:
        count: The number of workers.
        remedy: What is kept if one is killed and what to do then, for the message.

    Raises:
        OSError: a worker was killed.
        UserError: a worker could not start, since it runs the caller's script again.
    """
    pool: ProcessPoolExecutor | None = None
    # Where it starts, this unblocks signals, as those of the workers must not be.
    with signals.block():
        resource_tracker.ensure_running()
    try:
        # A signal in the middle of this would leave a half-started process behind. The first submission starts the
        # pool's thread and its first worker; `signals.submit` blocks signals for the others.
        with signals.block():
            pool = ProcessPoolExecutor(count, _WorkerContext(), _tie_to_parent)
            pool.submit(int)
        yield pool
    except BaseException as error:
        workers = _kill_workers(pool) if pool is not None else []
        if pool is not None and isinstance(error, BrokenProcessPool):
            # Until its thread has ended, which waits for the workers, too, their exit codes are not certain.
            pool.shutdown()
            if any((worker.exitcode or 0) > 0 for worker in workers):
                raise UserError(f"a worker process could not start, its error is above: {GUARD}") from None
            raise OSError(f"a worker process was killed, perhaps for want of memory: {remedy}") from error
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def refuse_in_starting_worker() -> None:
    """Refuse to work in a process that multiprocessing is starting: it is only to import the caller's script.

    Raises:
        UserError: this is one.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # This process ends by it, and each of its siblings says the same: in a line.
        sys.tracebacklimit = 0
        raise UserError(f"pusht_act.run was called by a worker process that was starting: {GUARD}")


def _kill_workers(pool: ProcessPoolExecutor) -> list[BaseProcess]:
    """Kill the workers of a pool, whose shutdown would wait until they have finished what they are doing."""
    # A private name of Python 3.12. From 3.14 on there is a public `ProcessPoolExecutor.kill_workers`.
    workers: list[BaseProcess] = list((pool._processes or {}).values())
    for process in workers:
        process.kill()
    return workers


def result[T](future: Future[T]) -> T:
    """Wait for a future and return its result.

    Raises:
        StopSignal: the process got a signal meanwhile.
    """
    signals.wait(future)
    return future.result()


def imap[T, U](work: Callable[[T], U], items: Iterable[T], workers: int, remedy: str) -> Generator[U]:
    """Yield `work` of each item, in order. Close the generator to end the workers.

    Args:
        work: A function that can be pickled.
        items: Consumed only a little ahead of what is yielded.
        workers: How many processes; 1: work in this one.
        remedy: As for `worker_processes`.

    Raises:
        OSError: as `worker_processes`.
    """
    if workers == 1:
        yield from map(work, items)
        return
    with worker_processes(workers, remedy) as pool:
        # Keep the workers busy, but no more results in memory than a few for each.
        pending: deque[Future[U]] = deque()
        for item in items:
            pending.append(signals.submit(pool, work, item))
            if len(pending) > PREFETCH_ITEMS * workers:
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())


def _tie_to_parent() -> None:
    """Start a thread in a worker that ends it with its parent."""
    # A worker whose parent was killed would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
