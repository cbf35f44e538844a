"""Demonstrations planned on many cores, each kept in a file of its own, so that a job that was killed goes on.

    starts  -> worker processes: demonstrate -> <folder>/<seed>.npz or <hash of the state>.npz, atomically
            -> all that were tried, in the order of the starts, up to the last success

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
from tqdm import tqdm

from pusht_act.config.schema import DemosConfig
from pusht_act.demos.expert import Demonstration, demonstrate
from pusht_act.demos.initial_states import describe_start
from pusht_act.demos.planner import PlannerOptions
from pusht_act.envs.pusht import Start
from pusht_act.runtime.atomic import shared_file
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.process_pool import RETRY_HINT, result, worker_processes
from pusht_act.runtime.signals import submit_uninterrupted

log = logging.getLogger(__name__)

PATIENCE = 20
"""Failures before a low success rate ends the job; the default options had none in 2,000 resets."""
DECIDES = (
    *("demos/expert.py", "demos/planner.py", "demos/proposals.py"),
    *("envs/coverage.py", "envs/pusht.py", "envs/simulator.py"),
)
"""The sources that a demonstration depends on."""

Submit = Callable[[Start], Callable[[], Demonstration]]
"""start -> a call that waits for its demonstration."""


def planner_options(demos: DemosConfig) -> PlannerOptions:
    """What `demos` asks of the planner.

    Raises:
        UserError: an impossible value.
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
        raise UserError(f"demos.{error}".replace("demos.noise", "demos.action_noise")) from error


def options_key(options: PlannerOptions) -> str:
    """A name for everything but the start that a demonstration depends on: demonstrations of one name may be mixed."""
    digest = hashlib.sha256(repr(astuple(options)).encode())
    for package in ("gym-pusht", "pymunk", "numpy", "numba"):
        digest.update(version(package).encode())
    for name in DECIDES:
        digest.update((Path(__file__).parents[1] / name).read_bytes())
    return digest.hexdigest()[:16]


def collect(
    folder: Path, options: PlannerOptions, starts: Sequence[Start], count: int, workers: int
) -> list[Demonstration]:
    """Demonstrations from `starts` in order, failures included, up to the `count`-th success.

    Exactly these are planned, whatever the number of `workers`; those that have a file in `folder` are read.

    Raises:
        UserError: hardly any start is solved with these options, or fewer than `count` of them all.
        OSError: the disk is full, or the system killed a worker.
    """
    tried: list[Demonstration] = []
    solved = 0
    coming: deque[Callable[[], Demonstration]] = deque()
    kept = sum(_path(folder, start).exists() for start in starts[:count])
    log.info("planning %d demonstrations, workers: %d%s", count, workers, f", {kept} are there already" if kept else "")
    with (
        _planners(folder, options, workers) as submit,
        tqdm(total=count, desc="planning", unit="demo", disable=None) as bar,
    ):
        while solved < count:
            begun = len(tried) + len(coming)
            coming.extend(map(submit, starts[begun : len(tried) + count - solved]))  # all of these will be needed
            if not coming:
                fewer = f"demos.n_episodes={solved} or " if solved else ""
                raise UserError(
                    f"demos.initial_states is used up with {solved} of {len(starts)} solved, fewer than "
                    f"demos.n_episodes={count}: give {fewer}a longer list; what was planned is kept"
                )
            made = coming.popleft()()
            tried.append(made)
            if made.success:
                solved += 1
                bar.update()
                continue
            log.info("%s is skipped: not solved, %.3f covered", describe_start(made.start), made.coverage)
            failures = len(tried) - solved
            if failures >= PATIENCE and failures > 4 * solved:
                raise UserError(
                    f"only {solved} of {len(tried)} starts were solved with {options}: "
                    "give demos.speed, smoothness and action_noise nearer to their defaults"
                )
    return tried


@contextmanager
def _planners(folder: Path, options: PlannerOptions, workers: int) -> Iterator[Submit]:
    """A function that has a start planned, in this process or by `workers` others."""
    if workers == 1:
        yield lambda start: partial(_load_or_plan, folder, options, start)
        return

    def submit(start: Start) -> Callable[[], Demonstration]:
        there = _path(folder, start).exists()
        return (
            partial(_load_or_plan, folder, options, start)
            if there
            else partial(result, submit_uninterrupted(pool, _load_or_plan, folder, options, start))
        )

    with worker_processes(workers, f"what was planned is kept, {RETRY_HINT} demos.workers") as pool:
        yield submit


def _path(folder: Path, start: Start) -> Path:
    if isinstance(start, int):
        return folder / f"{start}.npz"
    return folder / f"state-{hashlib.sha256(struct.pack('<5d', *start)).hexdigest()[:32]}.npz"


def _load_or_plan(folder: Path, options: PlannerOptions, start: Start) -> Demonstration:
    """The demonstration in `start`'s file, or else a new one, which is written there."""
    path = _path(folder, start)
    try:
        return _read(path, start)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s): planning %s again", path, error, describe_start(start))
    made = demonstrate(start, options)
    with shared_file(path) as part, part.open("wb") as file:
        np.savez(file, action=made.action, executed=made.executed, coverage=made.coverage, success=made.success)
    return made


def _read(path: Path, start: Start) -> Demonstration:
    with np.load(path, allow_pickle=False) as file:
        return Demonstration(start, file["action"], file["executed"], float(file["coverage"]), bool(file["success"]))
