"""Replay the actions of a demonstration in gym-pusht, fast, to recover its observations."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial

import gym_pusht  # noqa: F401  (registers the environment)
import numpy as np
from jaxtyping import Bool, Float32, Float64, Shaped, UInt8

from pusht_act.envs.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.envs.gym_pusht_internals import block_corners
from pusht_act.envs.physics import advance
from pusht_act.envs.pusht import (
    Start,
    check_start,
    disable_contact_counting,
    keypoints,
    make_env,
    reset_to,
)
from pusht_act.envs.rendering import render_observation
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.process_pool import imap


@dataclass(frozen=True)
class ReplayedEpisode:
    """What LeRobot's PushT data sets hold: the observation before each action, and what the action led to."""

    observation_state: Float32[np.ndarray, "T 2"]
    """The agent's position, px."""
    environment_state: Float32[np.ndarray, "T 16"]
    """The block's eight keypoints in gym-pusht's order: x0, y0, x1, ... px."""
    image: UInt8[np.ndarray, "T 96 96 3"] | None
    """The image that `obs_type="pixels_agent_pos"` gives; None unless it was asked for."""
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


def replay(start: Start, action: Shaped[np.ndarray, "T 2"], image: bool = False) -> ReplayedEpisode:
    """Execute `action` from `start` in gym-pusht's own physics and return the observations it would have given.

    States are bit-identical to those of `env.step`. What does not affect them is left out or replaced: contact points
    are not counted, and the coverage is computed by clipping, which agrees with shapely's to 1e-12.

    Args:
        start: A seed of gym-pusht's reset, or a state.
        action: Targets of the agent, px; converted to float32, as data sets store them.
        image: Whether to render, which takes ten times as long.

    Raises:
        UserError: An impossible start, no action at all, or an action that is not finite.
    """
    start = check_start(start)
    # Data sets store float32, and the replay is exact only with the same bits.
    action = np.asarray(action, np.float32)
    if action.ndim != 2 or action.shape[1] != 2 or not len(action) or not np.isfinite(action).all():
        raise UserError(f"action has shape {action.shape}: give one or more rows of two finite numbers (px)")
    env = make_env()
    reset_to(env, start)
    disable_contact_counting(env)

    # Images need a stop before each action; without them the whole episode is one call.
    images = []
    poses = [np.array([[*env.agent.position, *env.block.position, env.block.angle]])]
    for chunk in action[:, None] if image else action[None]:
        if image:
            images.append(render_observation(env))
        poses.append(advance(env, chunk))
    # One row more than actions: the first is the start itself.
    states = np.concatenate(poses)
    covered = coverage_of_poses(states[1:, 2:])
    done = np.zeros(len(action), np.bool_)
    done[-1] = True
    # Row t holds the observation before action t, and the coverage, reward and success after it.
    return ReplayedEpisode(
        observation_state=states[:-1, :2].astype(np.float32),
        environment_state=keypoints(block_corners(env), states[:-1, 2:]).astype(np.float32),
        image=np.stack(images) if image else None,
        action=action,
        coverage=covered,
        reward=np.clip(covered / SUCCESS_COVERAGE, 0.0, 1.0).astype(np.float32),
        done=done,
        success=covered > SUCCESS_COVERAGE,
    )


def replay_all(
    trajectories: Iterable[tuple[Start, Shaped[np.ndarray, "T 2"]]], image: bool, workers: int
) -> Generator[ReplayedEpisode]:
    """Yield the replay of each trajectory, in order.

    Args:
        trajectories: Start and actions (px) of each.
        image: Whether to render; this is done in `workers` processes, since an image takes milliseconds.
        workers: Number of processes.

    Raises:
        OSError: A worker process was killed.
    """
    # Without images a replay is too short to be worth a trip to a worker.
    work = partial(_replay_pair, image)
    return imap(work, trajectories, workers if image else 1, "give the same command again")


def _replay_pair(image: bool, trajectory: tuple[Start, np.ndarray]) -> ReplayedEpisode:
    return replay(*trajectory, image)
