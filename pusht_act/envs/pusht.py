"""Make gym-pusht's environment, put it into a given state, compute the block's keypoints."""

import math
from collections.abc import Sequence
from typing import Any

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
from jaxtyping import Float64

from pusht_act.envs.gym_pusht_internals import controller
from pusht_act.envs.simulator import ARENA, CENTRE, RECTANGLES, WALL_HIGH, WALL_LOW
from pusht_act.runtime.errors import UserError

Start = (
    int | tuple[float, float, float, float, float] | tuple[float, float, float, float, float, float, float]
)  # fmt: skip
"""Where an episode starts: a seed of gym-pusht's reset, or a state.

A state is agent x, y, block x, y (px), block angle (rad) and agent velocity x, y (px/s). Without the last two numbers
the agent is at rest.
"""

# gym-pusht's own resets put corners of the T up to 17 px into a wall, which then pushes them out.
SLACK = 20.0
"""How far outside the walls a state may be, px."""


def make_env() -> Any:
    """Make a PushTEnv as `gymnasium.make` does, without the wrappers that count steps and check types."""
    return gymnasium.make("gym_pusht/PushT-v0", obs_type="state", disable_env_checker=True).unwrapped


def check_state(state: Sequence[float] | np.ndarray, key: str = "state") -> tuple[float, ...]:
    """Check that a state lies in the arena and return its first five numbers as floats.

    Args:
        state: At least agent x, y, block x, y (px) and block angle (rad).
        key: Name of the state in messages.

    Raises:
        UserError: Fewer than five numbers, one that is not finite, or the agent or a corner of the block outside the
            walls.
    """
    values = tuple(float(value) for value in state[:5])
    shown = ", ".join(f"{value:g}" for value in values)
    if len(values) != 5 or not all(math.isfinite(value) for value in values):
        raise UserError(f"{key}=({shown}): give agent x, y, block x, y (px), block angle (rad), all finite")
    # The simulator would push agent and block out of a wall with a jump, or through it.
    if not all(-SLACK <= value <= ARENA + SLACK for value in values[:2]):
        raise UserError(f"{key}=({shown}): the agent is outside the arena; put it within [0, {ARENA:g}] px")
    corners = _corners(*values[2:])
    if corners.min() < WALL_LOW - SLACK or corners.max() > WALL_HIGH + SLACK:
        raise UserError(
            f"{key}=({shown}): the block spans {corners.min():.0f} to {corners.max():.0f} px, through the walls at "
            f"{WALL_LOW:g} and {WALL_HIGH:g}; move it inside"
        )
    return values


def check_start(start: Start | Sequence[float] | np.ndarray) -> Start:
    """Check that `start` is a seed or a state in the arena and return it in plain Python numbers.

    Raises:
        UserError: A negative seed, neither five nor seven finite numbers, or agent or block outside the walls.
    """
    # A reset seed, from which gym-pusht draws the state.
    if isinstance(start, int | np.integer):
        if start < 0:
            raise UserError(f"start={start}: a reset seed is 0 or more")
        return int(start)
    # A state, with the agent's velocity or at rest.
    if len(start) not in (5, 7):
        raise UserError(
            f"start has {len(start)} numbers: give agent x, y, block x, y (px), block angle (rad), and no or two agent "
            "velocities (px/s)"
        )
    agent_x, agent_y, x, y, angle = check_state(start, "start")
    if len(start) == 5:
        return (agent_x, agent_y, x, y, angle)
    vx, vy = (float(value) for value in start[5:])
    if not (math.isfinite(vx) and math.isfinite(vy)):
        raise UserError(f"start=(..., {vx:g}, {vy:g}): the agent's velocity is not finite; give px/s")
    return (agent_x, agent_y, x, y, angle, vx, vy)


def _corners(x: float, y: float, angle: float) -> Float64[np.ndarray, "8 2"]:
    c, s = math.cos(angle), math.sin(angle)
    corners = np.array([(px, py + CENTRE) for x0, y0, x1, y1 in RECTANGLES for px in (x0, x1) for py in (y0, y1)])
    rotated: np.ndarray = corners @ np.array(((c, s), (-s, c))) + (x, y)
    return rotated


def reset_to(env: Any, start: Start) -> None:
    """Reset a PushTEnv to `start`.

    gym-pusht's own `reset_to_state` sets the block's position before its angle, which moves the block again. Here the
    angle comes first, so that the block is where `start` says.
    """
    if isinstance(start, int):
        env.reset(seed=start)
        return
    env.reset(seed=0)
    vx, vy = start[5:] or (0.0, 0.0)
    dt = controller(env).dt

    # Start the agent one physics step back: the step below then brings it to `start` as it came there in the episode.
    env.agent.position = (start[0] - vx * dt, start[1] - vy * dt)
    env.agent.velocity = (vx, vy)
    env.block.angle = start[4]
    env.block.position = start[2:4]

    # gym-pusht's own reset ends with a physics step, too: contacts at the start act from the first action on.
    env.space.step(dt)
    # The step's arithmetic may have missed `start` by the last bit.
    env.agent.position = start[:2]


def disable_contact_counting(env: Any) -> None:
    """Stop a PushTEnv, after its reset, from counting contact points, which costs more than the physics."""
    # The handler that counts is registered for collisions of type 0.
    for shape in env.space.shapes:
        shape.collision_type = 1


def keypoints(corners: Float64[np.ndarray, "8 2"], poses: Float64[np.ndarray, "T 3"]) -> Float64[np.ndarray, "T 16"]:
    """Compute PushTEnv.get_keypoints, bit-identical, for many poses at once.

    Args:
        corners: Corners of the block in its own frame, px.
        poses: Block x, y (px) and angle (rad) in each row.

    Returns:
        x0, y0, x1, y1, ... of the eight corners in the arena, px.
    """
    # By math, not numpy: numpy's vectorized sine may differ from it in the last bit.
    cos = np.array([math.cos(angle) for angle in poses[:, 2]])[:, None]
    sin = np.array([math.sin(angle) for angle in poses[:, 2]])[:, None]
    x = corners[:, 0] * cos - corners[:, 1] * sin + poses[:, 0, None]
    y = corners[:, 0] * sin + corners[:, 1] * cos + poses[:, 1, None]
    return np.stack((x, y), axis=-1).reshape(len(poses), 16)
