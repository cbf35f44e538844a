"""Demonstrations reflected across the goal's axis, to be replayed in gym-pusht."""

import math

import numpy as np
import torch

from pusht_act.data.mirror import reflect_points
from pusht_act.demos.expert import Demonstration
from pusht_act.envs.pusht import Start, make_env, reset_to


def reflect_angle(angle: float) -> float:
    """Return the angle (rad) of a reflected block, whose stem points along (-sin, cos)."""
    return math.pi / 2 - angle


def mirror_image(demo: Demonstration) -> tuple[Start, np.ndarray]:
    """Return the start and the executed actions of a demonstration's mirror image."""
    env = make_env()
    reset_to(env, demo.start)
    # Where the seed's reset put them; the image's start is a state.
    placed = reflect_points(torch.tensor([[*env.agent.position], [*env.block.position]], dtype=torch.float64))
    start = (*placed.flatten().tolist(), reflect_angle(env.block.angle))
    return start, reflect_points(torch.from_numpy(demo.executed)).numpy()
