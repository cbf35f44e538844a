"""Plan demonstrations on many cores and keep each in a file of its own, so that a killed job can resume.

    starts  -> worker processes: demonstrate -> <folder>/<seed>.npz or state-<hash of the state>.npz, atomically
            -> all attempts in the order of the starts, up to the last success that is needed

Workers import neither torch nor lerobot.
"""

import hashlib
import logging
import struct
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pusht_act.config.schema import DemosConfig
from pusht_act.demos.expert import Demonstration, demonstrate
from pusht_act.demos.initial_states import describe_start
from pusht_act.demos.planner import PlannerOptions
from pusht_act.envs.pusht import Start
from pusht_act.runtime.atomic import shared_file
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.process_pool import RETRY_HINT, result, worker_processes
from pusht_act.runtime.signals import signals

log = logging.getLogger(__name__)

MIN_FAILURES_TO_STOP = 20
"""Failures before a low success rate ends the job; the default options had no failure in 2,000 resets."""
EXPERT_SOURCES = (
    *("demos/expert.py", "demos/planner.py", "demos/proposals.py"),
    *("envs/coverage.py", "envs/gym_pusht_internals.py", "envs/pusht.py", "envs/simulator.py"),
)
"""The source files that decide how a demonstration turns out."""

Submit = Callable[[Start], Callable[[], Demonstration]]
"""start -> a function that waits for its demonstration and returns it."""


def planner_options(demos: DemosConfig) -> PlannerOptions:
    """Return the planner's options in the `demos` section of the configuration.

    Raises:
        UserError: A value is out of its range.
    """
    try:
        return PlannerOptions(
            coverage=demos.coverage,
            speed=demos.speed,
            smoothness=demos.smoothness,
            noise=demos.action_noise,
            replan=demos.replan,
            seed=demos.seed,
        )
    except ValueError as error:
        # The planner names its own options; name the key of the configuration.
        raise UserError(f"demos.{error}".replace("demos.noise", "demos.action_noise")) from error


def options_key(options: PlannerOptions) -> str:
    """Return a hash of everything but the start that a demonstration depends on.

    That is the options, the versions of the libraries, and our own sources. Demonstrations with the same key may go
    into one data set.
    """
    digest = hashlib.sha256(repr(astuple(options)).encode())
    # The libraries whose numbers end up in a demonstration.
    for package in ("gym-pusht", "pymunk", "numpy", "numba"):
        digest.update(version(package).encode())
    for name in EXPERT_SOURCES:
        digest.update((Path(__file__).parents[1] / name).read_bytes())
    return digest.hexdigest()[:16]


def collect(
    folder: Path, options: PlannerOptions, starts: Sequence[Start], count: int, workers: int
) -> list[Demonstration]:
    """Collect demonstrations from `starts`, in order, until `count` of them have succeeded.

    Args:
        folder: Holds a file for each demonstration; those that are there are read, the others planned and written.
        options: Options of the planner.
        starts: Where the episodes start.
        count: Number of successes.
        workers: Number of processes; it does not change which starts are planned.

    Returns:
        All attempts, failures included, up to the `count`-th success.

    Raises:
        UserError: Hardly any start is solved with these options, or fewer than `count` of all of them.
        OSError: The disk is full, or the system killed a worker.
    """
    attempts: list[Demonstration] = []
    solved = 0
    pending: deque[Callable[[], Demonstration]] = deque()
    kept = sum(_path(folder, start).exists() for start in starts[:count])
    log.info("planning %d demonstrations, workers: %d%s", count, workers, f", {kept} are there already" if kept else "")
    with (
        _planners(folder, options, workers) as submit,
        tqdm(total=count, desc="planning", unit="demo", disable=None) as bar,
    ):
        while solved < count:
            # Submit as many starts as successes are missing: each of them will be needed, whatever becomes of the
            # others, so that nothing is planned that one process would not plan.
            submitted = len(attempts) + len(pending)
            pending.extend(map(submit, starts[submitted : len(attempts) + count - solved]))
            if not pending:
                fewer = f"demos.n_episodes={solved} or " if solved else ""
                raise UserError(
                    f"demos.initial_states is used up with {solved} of {len(starts)} solved, fewer than "
                    f"demos.n_episodes={count}: give {fewer}a longer list; what was planned is kept"
                )

            demo = pending.popleft()()
            attempts.append(demo)
            if demo.success:
                solved += 1
                bar.update()
                continue
            log.info("%s is skipped: not solved, %.3f covered", describe_start(demo.start), demo.coverage)
            failures = len(attempts) - solved
            # A few failures may be bad luck; four of five are not.
            if failures >= MIN_FAILURES_TO_STOP and failures > 4 * solved:
                raise UserError(
                    f"only {solved} of {len(attempts)} starts were solved with {options}: "
                    "bring demos.speed, smoothness and action_noise closer to their defaults"
                )
    return attempts


@contextmanager
def _planners(folder: Path, options: PlannerOptions, workers: int) -> Iterator[Submit]:
    """Yield a function that submits a start to `workers` processes; with one worker, to this process."""
    if workers == 1:
        yield lambda start: partial(_load_or_plan, folder, options, start)
        return

    def submit(start: Start) -> Callable[[], Demonstration]:
        # Reading a file is not worth a trip to a worker.
        return (
            partial(_load_or_plan, folder, options, start)
            if _path(folder, start).exists()
            else partial(result, signals.submit(pool, _load_or_plan, folder, options, start))
        )

    with worker_processes(workers, f"what was planned is kept, {RETRY_HINT} demos.workers") as pool:
        yield submit


def _path(folder: Path, start: Start) -> Path:
    if isinstance(start, int):
        return folder / f"{start}.npz"
    # Five floats make no good file name, and their text would lose the last bits.
    return folder / f"state-{hashlib.sha256(struct.pack('<5d', *start)).hexdigest()[:32]}.npz"


def _load_or_plan(folder: Path, options: PlannerOptions, start: Start) -> Demonstration:
    """Read the demonstration in the file of `start`; if there is none, plan it and write the file."""
    path = _path(folder, start)
    try:
        return _read(path, start)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        # Half a file, as after a power cut.
        log.warning("%s is damaged (%s): planning %s again", path, error, describe_start(start))
    made = demonstrate(start, options)
    with shared_file(path) as part, part.open("wb") as file:
        np.savez(file, action=made.action, executed=made.executed, coverage=made.coverage, success=made.success)
    return made


def _read(path: Path, start: Start) -> Demonstration:
    with np.load(path, allow_pickle=False) as file:
        return Demonstration(start, file["action"], file["executed"], float(file["coverage"]), bool(file["success"]))
