"""Replaying actions in gym-pusht, fast, to get back every observation of a demonstration."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial

import cv2
import gym_pusht  # noqa: F401  (registers the environment)
import numpy as np
from jaxtyping import Bool, Float32, Float64, Shaped, UInt8

from pusht_act.envs.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.envs.physics import advance
from pusht_act.envs.pusht import (
    Start,
    block_corners,
    check_start,
    disable_contact_counting,
    keypoints,
    make_env,
    reset_to,
)
from pusht_act.envs.rendering import render_observation
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.process_pool import imap

cv2.setNumThreads(1)  # of pictures as small as ours two threads take twice the processor's time, and are no faster


@dataclass(frozen=True)
class ReplayedEpisode:
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


def replay(start: Start, action: Shaped[np.ndarray, "T 2"], image: bool = False) -> ReplayedEpisode:
    """Carry out `action` from `start` in gym-pusht's own world and return what its observations would have been.

    States equal those of `env.step` bit by bit. Only what does not touch the states is left out: the counting of
    contact points, and shapely's coverage in favour of a clipping one that agrees to 1e-12.

    Args:
        action: px; converted to float32, as data sets keep it.
        image: whether to render, which takes ten times as long.

    Raises:
        UserError: an impossible start, no action at all, or an action that is not finite.
    """
    start = check_start(start)
    action = np.asarray(action, np.float32)
    if action.ndim != 2 or action.shape[1] != 2 or not len(action) or not np.isfinite(action).all():
        raise UserError(f"action has shape {action.shape}: give one or more rows of two finite numbers (px)")
    env = make_env()
    reset_to(env, start)
    disable_contact_counting(env)
    images = []
    poses = [np.array([[*env.agent.position, *env.block.position, env.block.angle]])]
    for each in action[:, None] if image else action[None]:
        if image:
            images.append(render_observation(env))
        poses.append(advance(env, each))
    states = np.concatenate(poses)
    covered = coverage_of_poses(states[1:, 2:])
    done = np.zeros(len(action), np.bool_)
    done[-1] = True
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
    """`replay` of each in order; pictures, which take milliseconds each, are drawn by `workers` processes.

    Raises:
        OSError: one of those was killed.
    """
    work = partial(_replay_pair, image)
    return imap(work, trajectories, workers if image else 1, "give the same command again")


def _replay_pair(image: bool, trajectory: tuple[Start, np.ndarray]) -> ReplayedEpisode:
    return replay(*trajectory, image)
