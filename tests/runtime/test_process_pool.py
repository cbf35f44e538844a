"""Work shared out among processes: in order, not far ahead, and an end for all of them however it ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from pusht_act.runtime.process_pool import PREFETCH_ITEMS, imap, worker_processes
from pusht_act.runtime.signals import signals


def doubled(number: int) -> int:
    return 2 * number


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_work_is_begun_a_little_ahead(workers: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    found = []
    with closing(imap(doubled, items(), workers, "")) as results:
        for result in results:
            found.append(result)
            assert len(taken) <= len(found) + PREFETCH_ITEMS * workers
    assert found == [2 * number for number in range(20)]


def test_a_killed_process_is_an_error_that_says_what_to_do() -> None:
    found: list[int] = []
    with pytest.raises(OSError, match="a worker process was killed, perhaps for want of memory: try again"):
        found.extend(imap(killed, range(9), 2, "try again"))
    assert not multiprocessing.active_children()


def test_a_killed_process_ends_those_that_are_at_work() -> None:
    """Also while the caller submits more: the pool's thread holds a lock until all processes have ended."""

    def submit() -> None:
        with worker_processes(2, "try again") as pool:
            signals.submit(pool, time.sleep, 600)
            signals.submit(pool, killed, 3)
            while True:
                signals.submit(pool, int)
                time.sleep(0.01)

    began = time.monotonic()
    with pytest.raises(OSError, match="a worker process was killed"):
        submit()
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()


def test_processes_end_with_the_caller_who_has_enough() -> None:
    with closing(imap(doubled, range(9), 2, "")) as results:
        assert next(results) == 0
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_a_block_that_raises_does_not_wait_for_its_workers() -> None:
    """By a private name of Python 3.12's; from 3.14 on, use `ProcessPoolExecutor.kill_workers`."""
    assert sys.version_info[:2] == (3, 12)
    with suppress(ValueError), worker_processes(2, "") as pool:
        for _ in range(4):
            signals.submit(pool, time.sleep, 600)
        assert len(multiprocessing.active_children()) == 2
        began = time.monotonic()
        raise ValueError
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()


UNGUARDED = """
import pusht_act
pusht_act.run(["mode=demos", "output_dir=demos", "demos.n_episodes=2", "demos.workers=2"])
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "collect.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pusht_act.runtime.errors.UserError: a worker process could not start, its error is above: ")
    assert last.endswith(
        'a script has to call pusht_act.run below `if __name__ == "__main__":`, since each worker imports it'
    )
    assert "pusht_act.run was called by a worker process that was starting: a script has to" in done.stderr
    assert "want of memory" not in done.stderr
    assert not (tmp_path / "demos").exists()
