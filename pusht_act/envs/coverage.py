"""Compute the share of the goal that the block covers, and from which share on an episode succeeds.

This is gym-pusht's measure to 1e-12, without shapely, whose result also varies in the last bit from call to call.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float64

from pusht_act.envs.simulator import ANGLE, CENTRE, CENTRE_X, CENTRE_Y, REACH, compiled, sides

# Constants of gym_pusht/envs/pusht.py.
GOAL_ANGLE = math.pi / 4
GOAL_CENTRE_X = 256.0 - math.sin(GOAL_ANGLE) * CENTRE
GOAL_CENTRE_Y = 256.0 + math.cos(GOAL_ANGLE) * CENTRE
GOAL_AREA = 6300.0
"""Area of the T, px^2."""
SUCCESS_COVERAGE = 0.95
"""An episode succeeds when the block covers more than this share of the goal; 1 is all of it."""


@compiled
def _clip(polygon: Any, size: int, axis: int, sign: float, bound: float, out: Any) -> int:
    """Clip a polygon to the half-plane sign * coordinate <= sign * bound and return its number of corners.

    Sutherland and Hodgman 1974.
    """
    kept = 0
    for i in range(size):
        j = (i + 1) % size
        here = sign * (bound - polygon[i, axis])
        there = sign * (bound - polygon[j, axis])
        if here >= 0.0:
            out[kept] = polygon[i]
            kept += 1
        if (here > 0.0 and there < 0.0) or (here < 0.0 and there > 0.0):
            along = here / (here - there)
            out[kept, 0] = polygon[i, 0] + along * (polygon[j, 0] - polygon[i, 0])
            out[kept, 1] = polygon[i, 1] + along * (polygon[j, 1] - polygon[i, 1])
            kept += 1
    return kept


@compiled
def _overlap(c: float, s: float, x: float, y: float, moving: int, fixed: int) -> float:
    """Return the area (px^2) that a rectangle, rotated by (c, s) and moved by x, y, shares with a fixed one."""
    x0, y0, x1, y1 = sides(moving)
    a, b = np.empty((12, 2)), np.empty((12, 2))
    for i in range(4):
        px, py = (x0 if i in (0, 3) else x1), (y0 if i < 2 else y1)
        a[i, 0], a[i, 1] = x + c * px - s * py, y + s * px + c * py

    # Clip by the four sides of the fixed rectangle in turn. Each cut adds at most one corner: 8 in the end.
    x0, y0, x1, y1 = sides(fixed)
    size = _clip(a, 4, 0, -1.0, x0, b)
    size = _clip(b, size, 0, 1.0, x1, a)
    size = _clip(a, size, 1, -1.0, y0, b)
    size = _clip(b, size, 1, 1.0, y1, a)

    # The rest is convex: sum the triangles of a fan about its first corner.
    area = 0.0
    for i in range(1, size - 1):
        ux, uy, vx, vy = a[i, 0] - a[0, 0], a[i, 1] - a[0, 1], a[i + 1, 0] - a[0, 0], a[i + 1, 1] - a[0, 1]
        area += 0.5 * (ux * vy - uy * vx)
    return area


@compiled
def coverage(state: Float64[np.ndarray, " 17"]) -> float:
    """Return the share of the goal that the block covers, in [0, 1]: gym-pusht's `info["coverage"]`."""
    return _coverage(state[CENTRE_X], state[CENTRE_Y], state[ANGLE])


@compiled
def coverage_of_poses(poses: Float64[np.ndarray, "T 3"]) -> Float64[np.ndarray, " T"]:
    """Return the coverage for each row of block x, y (of its origin, px) and angle (rad)."""
    covered = np.empty(len(poses))
    for t in range(len(poses)):
        x, y, angle = poses[t]
        covered[t] = _coverage(x - math.sin(angle) * CENTRE, y + math.cos(angle) * CENTRE, angle)
    return covered


@compiled
def _coverage(centre_x: float, centre_y: float, angle: float) -> float:
    # Too far away to touch the goal.
    dx, dy = centre_x - GOAL_CENTRE_X, centre_y - GOAL_CENTRE_Y
    if dx * dx + dy * dy > (2.0 * REACH) ** 2:
        return 0.0

    # In the goal's frame the goal is two upright rectangles; the block's two do not overlap each other, nor do the
    # goal's, so the four overlaps add up.
    c, s = math.cos(GOAL_ANGLE), math.sin(GOAL_ANGLE)
    x, y = c * dx + s * dy, c * dy - s * dx
    c, s = math.cos(angle - GOAL_ANGLE), math.sin(angle - GOAL_ANGLE)
    area = 0.0
    for moving in range(2):
        for fixed in range(2):
            area += _overlap(c, s, x, y, moving, fixed)
    return area / GOAL_AREA
