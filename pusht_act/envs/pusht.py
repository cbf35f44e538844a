"""gym-pusht's environment: making one, putting it into a state, the block's keypoints."""

import math
from collections.abc import Sequence
from typing import Any

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
from jaxtyping import Float64

from pusht_act.envs.simulator import ARENA, CENTRE, RECTANGLES, WALL_HIGH, WALL_LOW
from pusht_act.runtime.errors import UserError

State = tuple[float, float, float, float, float, float, float]
"""Agent x, y, block x, y (px), block angle (rad), agent velocity x, y (px/s)."""
Start = int | tuple[float, float, float, float, float] | State
"""Where an episode starts: a seed of gym-pusht's reset, or a state, whose agent is at rest if it has five numbers."""

SLACK = 20.0  # px: gym-pusht's own resets put corners of the T up to 17 px into a wall, which pushes them out


def make_env() -> Any:
    """gym-pusht's PushTEnv as `gymnasium.make` builds it, without the wrappers that count steps and check types."""
    return gymnasium.make("gym_pusht/PushT-v0", obs_type="state", disable_env_checker=True).unwrapped


def check_state(state: Sequence[float] | np.ndarray, key: str = "state") -> tuple[float, ...]:
    """Return the first five numbers of a state as floats, after checking that they lie in the arena.

    Raises:
        UserError: not five finite numbers, or the agent or a corner of the block lies outside the walls.
    """
    values = tuple(float(value) for value in state[:5])
    shown = ", ".join(f"{value:g}" for value in values)
    if len(values) != 5 or not all(math.isfinite(value) for value in values):
        raise UserError(f"{key}=({shown}): give agent x, y, block x, y (px), block angle (rad), all finite")
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
    """Return `start` in plain Python numbers, after checking that it is a seed or a state in the arena.

    Raises:
        UserError: a negative seed, neither five nor seven finite numbers, or agent or block outside the walls.
    """
    if isinstance(start, int | np.integer):
        if start < 0:
            raise UserError(f"start={start}: a reset seed is 0 or more")
        return int(start)
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
    turned: np.ndarray = corners @ np.array(((c, s), (-s, c))) + (x, y)
    return turned


def reset_to(env: Any, start: Start) -> None:
    """Put a PushTEnv at `start`, the agent at rest unless `start` has its velocity.

    gym-pusht's own `reset_to_state` sets the block's position before its angle and so ends elsewhere; here the angle
    comes first, and the block is where `start` says.
    """
    if isinstance(start, int):
        env.reset(seed=start)
        return
    env.reset(seed=0)
    vx, vy = start[5:] or (0.0, 0.0)
    # One sub-step back, so that the step below brings the agent to `start` as it came there in the episode.
    env.agent.position = (start[0] - vx * env.dt, start[1] - vy * env.dt)
    env.agent.velocity = (vx, vy)
    env.block.angle = start[4]
    env.block.position = start[2:4]
    env.space.step(env.dt)  # as gym-pusht's reset ends: contacts at the start act from the first step on
    env.agent.position = start[:2]  # to the last bit


def disable_contact_counting(env: Any) -> None:
    """After a reset: leave out gym-pusht's counting of contact points, which costs more than the physics."""
    for shape in env.space.shapes:
        shape.collision_type = 1  # the handler that counts is for type 0


def block_corners(env: Any) -> Float64[np.ndarray, "8 2"]:
    """The block's, in its own frame; those of a PushTEnv that has been reset."""
    return np.array([vertex for shape in env._block_shapes for vertex in shape.get_vertices()])


def keypoints(corners: Float64[np.ndarray, "8 2"], poses: Float64[np.ndarray, "T 3"]) -> Float64[np.ndarray, "T 16"]:
    """PushTEnv.get_keypoints, the same bits, for many of the block's x, y (px) and angle (rad) at once."""
    cos = np.array([math.cos(angle) for angle in poses[:, 2]])[:, None]
    sin = np.array([math.sin(angle) for angle in poses[:, 2]])[:, None]
    x = corners[:, 0] * cos - corners[:, 1] * sin + poses[:, 0, None]
    y = corners[:, 0] * sin + corners[:, 1] * cos + poses[:, 1, None]
    return np.stack((x, y), axis=-1).reshape(len(poses), 16)
