"""The mirror image of a demonstration, which solves PushT as the demonstration does and costs no planning.

The T is its own mirror image about its stem, and the goal's stem lies along x + y = ARENA, a diagonal of the square
table: the reflection across that, (x, y) -> (ARENA - y, ARENA - x), takes the task to itself. Of the 2,000 embedded
demonstrations 1,936 have an image that solves it; for the others the last bits of a contact, or the walls, which are a
pixel off the middle, tip an episode the other way. So each is judged in gym-pusht again.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float

from pusht_act.demos.expert import Demonstration
from pusht_act.demos.replay import replay
from pusht_act.envs.pusht import make_env, reset_to
from pusht_act.envs.simulator import ARENA


def mirrored(points: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
    """Points x, y (px) across the diagonal."""
    return (ARENA - points[..., ::-1]).astype(points.dtype)


def mirrored_angle(angle: float) -> float:
    """A block's angle (rad): its stem, which points along (-sin, cos), across the diagonal."""
    return math.pi / 2 - angle


def with_mirror_images(demonstrations: Iterable[Demonstration]) -> Iterator[Demonstration]:
    """Each of them, and after it its mirror image if gym-pusht counts that as a success.

    Where noise was added, the image has what was carried out reflected, and the clean labels.
    """
    env = make_env()
    for made in demonstrations:
        yield made
        reset_to(env, made.start)
        agent, block = mirrored(np.array([env.agent.position, env.block.position]))
        start = (float(agent[0]), float(agent[1]), float(block[0]), float(block[1]), mirrored_angle(env.block.angle))
        executed = mirrored(made.executed)
        episode = replay(start, executed)
        if episode.success[-1]:
            yield Demonstration(start, mirrored(made.action), executed, float(episode.coverage[-1]), True)
