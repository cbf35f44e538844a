"""What the environments are asked for, and what they answer: a record for each episode."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401  (registers the environment)
import numpy as np
from jaxtyping import Float64

Observation = dict[str, np.ndarray]
"""As gym-pusht names it: agent_pos, and pixels or environment_state."""
State = Float64[np.ndarray, " 7"]
"""Agent x, y, block x, y (px), block angle (rad), agent velocity x, y (px/s)."""


@dataclass(frozen=True)
class EnvSpec:
    """What the environments are, and when an episode is over."""

    gym_id: str
    kwargs: dict[str, Any]
    """Of `gymnasium.make`."""
    obs_type: str
    """What the policy sees: pixels_agent_pos or environment_state_agent_pos."""
    max_steps: int


@dataclass(frozen=True)
class VideoRequest:
    """What is drawn of an episode: before each step, and after the last."""

    video: Path
    fps: int
    film_strip: Path | None = None


@dataclass
class EpisodeResult:
    """What came of one episode; `reward` is clip(coverage / 0.95, 0, 1) of every step."""

    episode_ix: int
    seed: int
    success: bool = False
    max_reward: float = 0.0
    sum_reward: float = 0.0
    coverage: float = 0.0
    """Share of the goal covered at the end."""
    steps: int = 0


@dataclass(frozen=True)
class StepResult:
    """How an environment stands when the policy looks again."""

    episode: EpisodeResult
    """So far."""
    running: bool
    state: State
    observation: Observation
