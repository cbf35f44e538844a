"""The scripted expert: solve PushT by planning, in gym-pusht itself, which decides whether an episode succeeded."""

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
"""Called with the number of finished episodes and the number of all."""

# A PD controller follows a target that moves evenly at this distance in time.
LAG = K_V / K_P
"""How far the agent is behind its target, s."""


@dataclass(frozen=True)
class Demonstration:
    """One episode of the expert."""

    start: Start
    """A seed of gym-pusht's reset, or a state."""
    action: Float32[np.ndarray, "T 2"]
    """The labels: what the planner chose, px."""
    executed: Float32[np.ndarray, "T 2"]
    """What was executed: `action` plus the noise that was asked for, px."""
    coverage: float
    """Share of the goal covered after the last action."""
    success: bool
    """Whether gym-pusht counts it as a success: coverage above 0.95 within 300 steps."""


def demonstrate(start: Start, options: PlannerOptions | None = None) -> Demonstration:
    """Solve PushT from `start` in gym-pusht, planning each action from the state that the environment is really in.

    The episode ends once the coverage exceeds `options.coverage`; one that does not get there in 300 steps is cut after
    its best step. Equal arguments give equal demonstrations on the same kind of machine; on another one the last bits
    of a sum may lead the search elsewhere.

    Raises:
        UserError: A negative seed, a state outside the arena, or the agent inside the block.
    """
    options, start = options or PlannerOptions(), check_plannable(start)
    env = make_env()
    reset_to(env, start)
    # A moving agent is on its way to a target ahead of it, which is the action before the first.
    planner = Planner(options, _key(start), np.array(env.agent.position) + LAG * np.array(env.agent.velocity))
    # One more number in the seed than the planner's, so that the noise is independent of its draws.
    noise = np.random.default_rng([options.seed, *_key(start), 1]).standard_normal((MAX_STEPS, 2)) * options.noise

    planned, executed = np.empty((MAX_STEPS, 2), np.float32), np.empty((MAX_STEPS, 2), np.float32)
    covered: list[float] = []
    solved: list[bool] = []
    for t in range(MAX_STEPS):
        planned[t] = planner.next_action(_read(env))
        executed[t] = np.clip(planned[t] + noise[t], 0.0, ARENA)
        solved.append(bool(env.step(executed[t])[4]["is_success"]))
        # Not info["coverage"]: shapely's result varies in the last bit from call to call.
        covered.append(coverage(_read(env)))
        if covered[t] > options.coverage:
            break
    # The last step, unless the expert ran out of time: then the best one.
    last = int(np.argmax(covered))
    return Demonstration(start, planned[: last + 1].copy(), executed[: last + 1].copy(), covered[last], solved[last])


def demonstrate_many(
    starts: Sequence[Start], options: PlannerOptions | None = None, workers: int = 1, progress: Progress | None = None
) -> list[Demonstration]:
    """Demonstrate from each start, in order, and return all episodes, failures included.

    Args:
        starts: Where the episodes start; all are checked before the first is planned.
        options: Options of the planner.
        workers: Number of processes; it does not change the result.
        progress: Called in this process after each episode.

    Raises:
        UserError: An impossible start, or `workers` below 1.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: give at least 1 process")
    # All at once, so that a bad start is refused before hours of planning.
    starts, demos = [check_plannable(start) for start in starts], []
    workers = min(workers, max(1, len(starts)))
    with closing(imap(partial(demonstrate, options=options), starts, workers, f"{RETRY_HINT} workers")) as results:
        for demo in results:
            demos.append(demo)
            if progress is not None:
                progress(len(demos), len(starts))
    return demos


def check_plannable(start: Start | Sequence[float]) -> Start:
    """Check a start as `check_start` does, and that the agent is not inside the block.

    From there the physics would push the block out of the overlap, which the planner cannot foresee.

    Raises:
        UserError: As `check_start`, or the agent's centre is inside the block.
    """
    start = check_start(start)
    if isinstance(start, tuple):
        x, y = agent_in_block_frame(new_state(np.array(start[:5])))
        if any(x0 < x < x1 and y0 < y < y1 for x0, y0, x1, y1 in RECTANGLES):
            shown = ", ".join(f"{value:g}" for value in start)
            raise UserError(f"start=({shown}): the agent's centre is inside the block; move it {AGENT_RADIUS:g} px off")
    return start


def _read(env: Any) -> Float64[np.ndarray, " 17"]:
    """Return the simulator's state for a PushTEnv."""
    pose = np.array((*env.agent.position, *env.block.position, env.block.angle))
    return new_state(pose, tuple(env.agent.velocity))


def _key(start: Start) -> tuple[int, ...]:
    """Return integers that identify a start, to seed random generators; the bits of its floats if it is a state."""
    return (
        (start,) if isinstance(start, int) else struct.unpack(f"{len(start)}Q", struct.pack(f"{len(start)}d", *start))
    )
