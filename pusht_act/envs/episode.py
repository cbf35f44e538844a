"""What is asked of an environment, and what it answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401  (registers the environment)
import numpy as np

# Everything in this module is pickled and sent between processes.
Observation = dict[str, np.ndarray]
"""With gym-pusht's keys: agent_pos, and pixels or environment_state."""


@dataclass(frozen=True)
class EnvSpec:
    """How to make an environment, and when its episodes end."""

    gym_id: str
    kwargs: dict[str, Any]
    """Arguments of `gymnasium.make`."""
    obs_type: str
    """What the policy observes: pixels_agent_pos or environment_state_agent_pos."""
    max_steps: int


@dataclass(frozen=True)
class VideoRequest:
    """Where to write an episode's video; its frames are those before each step and the one after the last."""

    video: Path
    fps: int
    film_strip: Path | None = None


@dataclass
class EpisodeResult:
    """The record of one episode; the reward of a step is clip(coverage / 0.95, 0, 1)."""

    # Names and order of the fields are the columns of episodes.csv, but for the last two, which are in episodes.npz and
    # the last is set when the rollout ends: this is sent between processes with each chunk.
    episode_ix: int
    seed: int
    success: bool = False
    max_reward: float = 0.0
    sum_reward: float = 0.0
    coverage: float = 0.0
    """Share of the goal covered at the end."""
    steps: int = 0
    start: tuple[float, ...] = ()
    """Agent x, y, block x, y (px), block angle (rad) after the reset."""
    coverage_by_step: tuple[float, ...] = ()
    """The coverage after each step."""


@dataclass(frozen=True)
class StepResult:
    """An environment's answer to a reset or to a chunk of actions."""

    episode: EpisodeResult
    """The record of the episode so far."""
    # An episode that has ended answers later chunks with its last result.
    running: bool
    observation: Observation
    covered: tuple[float, ...] = ()
    """The coverage after each step of this chunk."""
