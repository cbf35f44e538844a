"""Demonstrations of PushT, judged by gym-pusht itself."""

import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from pusht_act.demos.planner import Planner, PlannerOptions
from pusht_act.envs.coverage import coverage
from pusht_act.envs.pusht import Start, check_start, make_env, reset_to
from pusht_act.envs.simulator import (
    AGENT_RADIUS,
    ARENA,
    K_P,
    K_V,
    MAX_STEPS,
    RECTANGLES,
    agent_in_block_frame,
    new_state,
)
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.process_pool import RETRY_HINT, imap

Progress = Callable[[int, int], None]
"""Called with (episodes done, episodes in all)."""

LAG = K_V / K_P  # s by which the agent trails a target that moves evenly


@dataclass(frozen=True)
class Demonstration:
    """One episode, from a start to its last action."""

    start: Start
    """A seed of gym-pusht's reset, or a state."""
    action: Float32[np.ndarray, "T 2"]
    """The labels: what the planner wanted, px."""
    executed: Float32[np.ndarray, "T 2"]
    """What was done: `action` plus the noise that was asked for, px."""
    coverage: float
    """Share of the goal covered after the last action."""
    success: bool
    """Whether gym-pusht counts it: coverage above 0.95 within 300 steps."""


def demonstrate(start: Start, options: PlannerOptions | None = None) -> Demonstration:
    """Solve PushT from `start` in the real environment, planning again from the state that it is really in.

    The episode ends once `options.coverage` is passed; one that does not get there in 300 steps is cut where it covered
    most. Equal arguments give equal demonstrations on the same kind of machine; elsewhere the last bits of a sum may
    tip the search another way.

    Raises:
        UserError: a negative seed, a state outside the arena, or the agent inside the block.
    """
    options, start = options or PlannerOptions(), check_plannable(start)
    env = make_env()
    reset_to(env, start)
    planner = Planner(options, _key(start), np.array(env.agent.position) + LAG * np.array(env.agent.velocity))
    noise = np.random.default_rng([options.seed, *_key(start), 1]).standard_normal((MAX_STEPS, 2)) * options.noise
    wanted, executed = np.empty((MAX_STEPS, 2), np.float32), np.empty((MAX_STEPS, 2), np.float32)
    covered: list[float] = []
    solved: list[bool] = []
    for t in range(MAX_STEPS):
        wanted[t] = planner.next_action(_read(env))
        executed[t] = np.clip(wanted[t] + noise[t], 0.0, ARENA)
        solved.append(bool(env.step(executed[t])[4]["is_success"]))
        covered.append(coverage(_read(env)))  # shapely's own is not the same to the last bit from call to call
        if covered[t] > options.coverage:
            break
    last = int(np.argmax(covered))
    return Demonstration(start, wanted[: last + 1].copy(), executed[: last + 1].copy(), covered[last], solved[last])


def demonstrate_many(
    starts: Sequence[Start], options: PlannerOptions | None = None, workers: int = 1, progress: Progress | None = None
) -> list[Demonstration]:
    """`demonstrate` for each start, in order, over `workers` processes; their number changes nothing but the time.

    The list holds failures too. `progress` is called in this process after each episode.

    Raises:
        UserError: an impossible start, found before any work is done, or `workers` below 1.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: give at least 1 process")
    starts, made = [check_plannable(start) for start in starts], []
    workers = min(workers, max(1, len(starts)))
    with closing(imap(partial(demonstrate, options=options), starts, workers, f"{RETRY_HINT} workers")) as coming:
        for demonstration in coming:
            made.append(demonstration)
            if progress is not None:
                progress(len(made), len(starts))
    return made


def check_plannable(start: Start | Sequence[float]) -> Start:
    """`check_start`, and no start from which only the solver's push out of an overlap would move the block.

    Raises:
        UserError: as `check_start`, or the agent's centre is inside the block.
    """
    start = check_start(start)
    if isinstance(start, tuple):
        x, y = agent_in_block_frame(new_state(np.array(start[:5])))
        if any(x0 < x < x1 and y0 < y < y1 for x0, y0, x1, y1 in RECTANGLES):
            shown = ", ".join(f"{value:g}" for value in start)
            raise UserError(f"start=({shown}): the agent's centre is inside the block; move it {AGENT_RADIUS:g} px off")
    return start


def _read(env: Any) -> Float64[np.ndarray, " 17"]:
    """The simulator's state for a PushTEnv."""
    pose = np.array((*env.agent.position, *env.block.position, env.block.angle))
    return new_state(pose, tuple(env.agent.velocity))


def _key(start: Start) -> tuple[int, ...]:
    """Whole numbers that name a start to a random generator."""
    return (
        (start,) if isinstance(start, int) else struct.unpack(f"{len(start)}Q", struct.pack(f"{len(start)}d", *start))
    )
