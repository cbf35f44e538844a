"""Reflect demonstrations: the mirror image of one usually solves PushT, too, and needs no planning.

The T is symmetric about its stem, and the goal's stem lies on x + y = ARENA, a diagonal of the square arena. The
reflection across that diagonal, (x, y) -> (ARENA - y, ARENA - x), maps the task to itself. Of the 2,000 built-in
demonstrations 1,936 have a mirror image that solves it. The others fail since the walls are not quite symmetric, by a
pixel, and contacts amplify the last bits of a number. So each mirror image is replayed in gym-pusht.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float

from pusht_act.demos.expert import Demonstration
from pusht_act.demos.replay import replay
from pusht_act.envs.pusht import make_env, reset_to
from pusht_act.envs.simulator import ARENA


def reflect(points: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
    """Reflect points x, y (px) across the diagonal."""
    return (ARENA - points[..., ::-1]).astype(points.dtype)


def reflect_angle(angle: float) -> float:
    """Reflect the angle (rad) of a block, whose stem points along (-sin, cos), across the diagonal."""
    return math.pi / 2 - angle


def with_mirror_images(demonstrations: Iterable[Demonstration]) -> Iterator[Demonstration]:
    """Yield each demonstration, followed by its mirror image if gym-pusht counts that as a success."""
    env = make_env()
    for demo in demonstrations:
        yield demo
        reset_to(env, demo.start)
        # Where the seed's reset put them; the image's start is a state.
        agent, block = reflect(np.array([env.agent.position, env.block.position]))
        start = (float(agent[0]), float(agent[1]), float(block[0]), float(block[1]), reflect_angle(env.block.angle))

        # With noise, the executed actions decide whether the image succeeds, and the clean ones remain its labels.
        executed = reflect(demo.executed)
        episode = replay(start, executed)
        if episode.success[-1]:
            yield Demonstration(start, reflect(demo.action), executed, float(episode.coverage[-1]), True)
