"""Replaying actions in gym-pusht, fast, to get back every observation of a demonstration."""

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
from jaxtyping import Bool, Float32, Float64, Shaped, UInt8

from pusht_act.demos.chipmunk import advance
from pusht_act.demos.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.demos.simulator import ARENA, CENTRE, RECTANGLES, WALL_HIGH, WALL_LOW
from pusht_act.demos.workers import in_order

cv2.setNumThreads(1)  # of pictures as small as ours two threads take twice the processor's time, and are no faster

State = tuple[float, float, float, float, float, float, float]
"""Agent x, y, block x, y (px), block angle (rad), agent velocity x, y (px/s)."""
Start = int | tuple[float, float, float, float, float] | State
"""Where an episode starts: a seed of gym-pusht's reset, or a state, whose agent is at rest if it has five numbers."""

SLACK = 20.0  # px: gym-pusht's own resets put corners of the T up to 17 px into a wall, which pushes them out


@dataclass(frozen=True)
class Episode:
    """What LeRobot's PushT data sets keep: the observation before each action, and what the next frame made of it."""

    observation_state: Float32[np.ndarray, "T 2"]
    """The agent's position, px."""
    environment_state: Float32[np.ndarray, "T 16"]
    """The block's eight keypoints in gym-pusht's order: x0, y0, x1, ... px."""
    image: UInt8[np.ndarray, "T 96 96 3"] | None
    """The picture that `obs_type="pixels_agent_pos"` gives; None unless asked for."""
    action: Float32[np.ndarray, "T 2"]
    """Target of the agent, px."""
    coverage: Float64[np.ndarray, " T"]
    """Share of the goal covered."""
    reward: Float32[np.ndarray, " T"]
    """clip(coverage / 0.95, 0, 1)."""
    done: Bool[np.ndarray, " T"]
    """True in the last row only."""
    success: Bool[np.ndarray, " T"]
    """Coverage above 0.95."""


def make_env() -> Any:
    """gym-pusht's PushTEnv as `gymnasium.make` builds it, without the wrappers that count steps and check types."""
    return gymnasium.make("gym_pusht/PushT-v0", obs_type="state", disable_env_checker=True).unwrapped


def check_state(state: Sequence[float] | np.ndarray, key: str = "state") -> tuple[float, ...]:
    """Return the first five numbers of a state as floats, after checking that they lie in the arena.

    Raises:
        ValueError: not five finite numbers, or the agent or a corner of the block lies outside the walls.
    """
    values = tuple(float(value) for value in state[:5])
    shown = ", ".join(f"{value:g}" for value in values)
    if len(values) != 5 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{key}=({shown}): give agent x, y, block x, y (px), block angle (rad), all finite")
    if not all(-SLACK <= value <= ARENA + SLACK for value in values[:2]):
        raise ValueError(f"{key}=({shown}): the agent is outside the arena; put it within [0, {ARENA:g}] px")
    corners = _corners(*values[2:])
    if corners.min() < WALL_LOW - SLACK or corners.max() > WALL_HIGH + SLACK:
        raise ValueError(
            f"{key}=({shown}): the block spans {corners.min():.0f} to {corners.max():.0f} px, through the walls at "
            f"{WALL_LOW:g} and {WALL_HIGH:g}; move it inside"
        )
    return values


def check_start(start: Start | Sequence[float] | np.ndarray) -> Start:
    """Return `start` in plain Python numbers, after checking that it is a seed or a state in the arena.

    Raises:
        ValueError: a negative seed, neither five nor seven finite numbers, or agent or block outside the walls.
    """
    if isinstance(start, int | np.integer):
        if start < 0:
            raise ValueError(f"start={start}: a reset seed is 0 or more")
        return int(start)
    if len(start) not in (5, 7):
        raise ValueError(
            f"start has {len(start)} numbers: give agent x, y, block x, y (px), block angle (rad), and no or two agent "
            "velocities (px/s)"
        )
    agent_x, agent_y, x, y, angle = check_state(start, "start")
    if len(start) == 5:
        return (agent_x, agent_y, x, y, angle)
    vx, vy = (float(value) for value in start[5:])
    if not (math.isfinite(vx) and math.isfinite(vy)):
        raise ValueError(f"start=(..., {vx:g}, {vy:g}): the agent's velocity is not finite; give px/s")
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


def replay(start: Start, action: Shaped[np.ndarray, "T 2"], image: bool = False) -> Episode:
    """Carry out `action` from `start` in gym-pusht's own world and return what its observations would have been.

    States equal those of `env.step` bit by bit. Only what does not touch the states is left out: the counting of
    contact points, and shapely's coverage in favour of a clipping one that agrees to 1e-12.

    Args:
        action: px; converted to float32, as data sets keep it.
        image: whether to render, which takes ten times as long.

    Raises:
        ValueError: an impossible start, no action at all, or an action that is not finite.
    """
    start = check_start(start)
    action = np.asarray(action, np.float32)
    if action.ndim != 2 or action.shape[1] != 2 or not len(action) or not np.isfinite(action).all():
        raise ValueError(f"action has shape {action.shape}: give one or more rows of two finite numbers (px)")
    env = make_env()
    reset_to(env, start)
    count_no_contacts(env)
    images = []
    poses = [np.array([[*env.agent.position, *env.block.position, env.block.angle]])]
    for each in action[:, None] if image else action[None]:
        if image:
            images.append(picture(env))
        poses.append(advance(env, each))
    states = np.concatenate(poses)
    covered = coverage_of_poses(states[1:, 2:])
    done = np.zeros(len(action), np.bool_)
    done[-1] = True
    return Episode(
        observation_state=states[:-1, :2].astype(np.float32),
        environment_state=keypoints(corners_of(env), states[:-1, 2:]).astype(np.float32),
        image=np.stack(images) if image else None,
        action=action,
        coverage=covered,
        reward=np.clip(covered / SUCCESS_COVERAGE, 0.0, 1.0).astype(np.float32),
        done=done,
        success=covered > SUCCESS_COVERAGE,
    )


def replayed(
    trajectories: Iterable[tuple[Start, Shaped[np.ndarray, "T 2"]]], image: bool, workers: int
) -> Generator[Episode]:
    """`replay` of each in order; pictures, which take milliseconds each, are drawn by `workers` processes.

    Raises:
        OSError: one of those was killed.
    """
    work = partial(_replay_pair, image)
    return in_order(work, trajectories, workers if image else 1, "give the same command again")


def _replay_pair(image: bool, trajectory: tuple[Start, np.ndarray]) -> Episode:
    return replay(*trajectory, image)


def count_no_contacts(env: Any) -> None:
    """After a reset: leave out gym-pusht's counting of contact points, which costs more than the physics."""
    for shape in env.space.shapes:
        shape.collision_type = 1  # the handler that counts is for type 0


def picture(env: Any) -> UInt8[np.ndarray, "96 96 3"]:
    """PushTEnv._get_img at the size of an observation, which copies the screen pixel by pixel and takes thrice this."""
    return _pixels(env, env.observation_width, env.observation_height)


def frame(env: Any) -> UInt8[np.ndarray, "H W 3"]:
    """PushTEnv.render, the same bytes in half the time; a cross marks the last action."""
    width, height = env.visualization_width, env.visualization_height
    pixels = _pixels(env, width, height)
    if env._last_action is not None:
        at, size = (np.array(env._last_action) / 512 * [height, width]).astype(np.int32), min(width, height)
        cross = {"markerType": cv2.MARKER_CROSS, "markerSize": int(8 / 96 * size), "thickness": int(size / 96)}
        cv2.drawMarker(pixels, at, color=(255, 0, 0), **cross)
    return pixels


def _pixels(env: Any, width: int, height: int) -> UInt8[np.ndarray, "H W 3"]:
    """Resizing the screen's four channels in memory and then picking three in order gives gym-pusht's bytes."""
    screen = env._draw()
    pixels = np.frombuffer(screen.get_buffer(), np.uint8).reshape(screen.get_height(), -1, screen.get_bytesize())
    small = cv2.resize(pixels, (width, height))
    picked = np.empty((height, width, 3), np.uint8)
    red, green, blue = (shift // 8 for shift in screen.get_shifts()[:3])
    cv2.mixChannels([small], [picked], [red, 0, green, 1, blue, 2])
    return picked


def corners_of(env: Any) -> Float64[np.ndarray, "8 2"]:
    """The block's, in its own frame; those of a PushTEnv that has been reset."""
    return np.array([vertex for shape in env._block_shapes for vertex in shape.get_vertices()])


def keypoints(corners: Float64[np.ndarray, "8 2"], poses: Float64[np.ndarray, "T 3"]) -> Float64[np.ndarray, "T 16"]:
    """PushTEnv.get_keypoints, the same bits, for many of the block's x, y (px) and angle (rad) at once."""
    cos = np.array([math.cos(angle) for angle in poses[:, 2]])[:, None]
    sin = np.array([math.sin(angle) for angle in poses[:, 2]])[:, None]
    x = corners[:, 0] * cos - corners[:, 1] * sin + poses[:, 0, None]
    y = corners[:, 0] * sin + corners[:, 1] * cos + poses[:, 1, None]
    return np.stack((x, y), axis=-1).reshape(len(poses), 16)
