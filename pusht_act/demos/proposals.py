"""Propose plans: walk around the T to a point of its outline, then push straight in.

All geometry is in the block's frame about its centre of gravity, where the T is two upright rectangles and most of the
visibility graph is constant.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float64

from pusht_act.envs.simulator import AGENT_RADIUS, AGENT_X, AGENT_Y, ANGLE, ARENA, CENTRE_X, CENTRE_Y, compiled, sides

SPACING = 9.0
"""Distance between neighbouring contact points, px."""
STANDOFF = AGENT_RADIUS + 6.0
"""Distance of the agent's centre from the surface before a push starts, px."""
CLEARANCE = AGENT_RADIUS + 1.0
"""Least distance on the way there, px."""
CORNER = AGENT_RADIUS + 6.0
"""Distance of the graph's corners from the T's convex corners along each axis, px."""

_OUTLINE = np.array(
    [(-60, -45), (60, -45), (60, -15), (15, -15), (15, 75), (-15, 75), (-15, -15), (-60, -15)], dtype=np.float64
)
# The two concave corners of the T are on no shortest path.
_CORNERS = np.array(
    [
        (-60 - CORNER, -45 - CORNER),
        (60 + CORNER, -45 - CORNER),
        (60 + CORNER, -15 + CORNER),
        (15 + CORNER, 75 + CORNER),
        (-15 - CORNER, 75 + CORNER),
        (-60 - CORNER, -15 + CORNER),
    ]
)


def _contact_points() -> tuple[Float64[np.ndarray, "C 2"], Float64[np.ndarray, "C 2"]]:
    """Return points on the outline, about `SPACING` apart, and their inward normals."""
    points, normals = [], []
    for start, end in zip(_OUTLINE, np.roll(_OUTLINE, -1, axis=0), strict=True):
        edge = end - start
        length = float(np.hypot(*edge))
        count = round(length / SPACING)
        for k in range(count):
            points.append(start + edge * (k + 0.5) / count)
            normals.append(np.array((-edge[1], edge[0])) / length)
    return np.array(points), np.array(normals)


POINTS, NORMALS = _contact_points()
_STANDOFFS = POINTS - NORMALS * STANDOFF


@compiled
def _box_gap(x: float, y: float, rectangle: int) -> float:
    """Return the largest g for which x, y is not inside the rectangle grown by g on every side."""
    x0, y0, x1, y1 = sides(rectangle)
    return max(x0 - x, x - x1, y0 - y, y - y1)


@compiled
def _sees(ax: float, ay: float, bx: float, by: float) -> bool:
    """Return whether the straight line from a to b stays clear of both rectangles."""
    for rectangle in range(2):
        # An end that is already closer than the clearance, as after a push, may leave but not come closer.
        grow = min(CLEARANCE, _box_gap(ax, ay, rectangle) - 1e-6, _box_gap(bx, by, rectangle) - 1e-6)
        x0, y0, x1, y1 = sides(rectangle)
        x0, y0, x1, y1 = x0 - grow, y0 - grow, x1 + grow, y1 + grow
        if x0 >= x1 or y0 >= y1:
            continue
        # Clip the line to the rectangle by its two slabs (Liang and Barsky 1984).
        enter, leave = 0.0, 1.0
        for start, way, low, high in ((ax, bx - ax, x0, x1), (ay, by - ay, y0, y1)):
            if abs(way) < 1e-12:
                if start <= low or start >= high:
                    leave = -1.0
                continue
            first, second = (low - start) / way, (high - start) / way
            enter, leave = max(enter, min(first, second)), min(leave, max(first, second))
        if enter < leave:
            return False
    return True


@compiled
def _shortest(start: Any, corners: Any, usable: Any, lengths: Any, last: Any) -> None:
    """Fill in the length of the shortest path from `start` to each corner, and the corner before it (-1: none)."""
    count = len(corners)
    for i in range(count):
        lengths[i], last[i] = math.inf, -1
        if usable[i] and _sees(start[0], start[1], corners[i, 0], corners[i, 1]):
            lengths[i] = math.hypot(corners[i, 0] - start[0], corners[i, 1] - start[1])
    # Bellman and Ford; with six corners nothing faster is needed.
    for _ in range(count):
        for i in range(count):
            for j in range(count):
                if not usable[j] or not _sees(corners[i, 0], corners[i, 1], corners[j, 0], corners[j, 1]):
                    continue
                through = lengths[i] + math.hypot(corners[i, 0] - corners[j, 0], corners[i, 1] - corners[j, 1])
                if through < lengths[j] - 1e-9:
                    lengths[j], last[j] = through, i


@compiled
def _in_arena(x: float, y: float, cx: float, cy: float, c: float, s: float) -> bool:
    wx, wy = cx + c * x - s * y, cy + s * x + c * y
    return 0.0 <= wx <= ARENA and 0.0 <= wy <= ARENA


@compiled
def _walk(path: Any, size: int, stride: float, actions: Any) -> int:
    """Fill `actions` with points every `stride` px along the first `size` points of `path`; return how many."""
    t, along = 0, stride
    for leg in range(size - 1):
        dx, dy = path[leg + 1, 0] - path[leg, 0], path[leg + 1, 1] - path[leg, 1]
        length = math.hypot(dx, dy)
        while along <= length and t < len(actions):
            actions[t, 0] = path[leg, 0] + dx * along / length
            actions[t, 1] = path[leg, 1] + dy * along / length
            along += stride
            t += 1
        along -= length
    return t


@compiled
def propose(
    state: Float64[np.ndarray, " 17"],
    origin: Float64[np.ndarray, " 2"],
    horizon: int,
    approach: float,
    pushes: Float64[np.ndarray, "P 3"],
    first: int = 0,
    stride: int = 1,
) -> Float64[np.ndarray, "N horizon 2"]:
    """Return plans that approach and push each reachable contact point in each way of `pushes`.

    Args:
        state: State of the simulator.
        origin: The last action, from which the target moves on.
        horizon: Number of actions in a plan.
        approach: Speed on the way around the T, px a step.
        pushes: Rows of speed (px a step), number of steps, and angle to the inward normal (rad).
        first, stride: Try every `stride`-th contact point from `first` on.
    """
    cx, cy = state[CENTRE_X], state[CENTRE_Y]
    c, s = math.cos(state[ANGLE]), math.sin(state[ANGLE])
    dx, dy = origin[0] - cx, origin[1] - cy
    start = np.array((c * dx + s * dy, c * dy - s * dx))
    # A target inside the T, as in the middle of a push, cannot be walked from: start at the agent.
    if min(_box_gap(start[0], start[1], 0), _box_gap(start[0], start[1], 1)) <= 0.0:
        dx, dy = state[AGENT_X] - cx, state[AGENT_Y] - cy
        start = np.array((c * dx + s * dy, c * dy - s * dx))
    count = len(_CORNERS)
    usable, lengths, last = np.empty(count, np.bool_), np.empty(count), np.empty(count, np.int64)
    for i in range(count):
        usable[i] = _in_arena(_CORNERS[i, 0], _CORNERS[i, 1], cx, cy, c, s)
    _shortest(start, _CORNERS, usable, lengths, last)

    plans = np.empty((len(POINTS) * len(pushes), horizon, 2))
    filled = 0
    for k in range(first, len(POINTS), stride):
        path = np.empty((count + 2, 2))
        size = _route(start, _STANDOFFS[k], lengths, last, path)
        if size == 0 or not _in_arena(_STANDOFFS[k, 0], _STANDOFFS[k, 1], cx, cy, c, s):
            continue
        for p in range(len(pushes)):
            plan = plans[filled]
            t = _walk(path, size, approach, plan)
            # The walk alone takes the whole horizon.
            if t + 3 > horizon:
                break
            _add_push(plan, t, _STANDOFFS[k], NORMALS[k], pushes[p])
            # Back into the arena's frame, and within the bounds of actions.
            for i in range(horizon):
                x, y = plan[i, 0], plan[i, 1]
                plan[i, 0] = min(max(cx + c * x - s * y, 0.0), ARENA)
                plan[i, 1] = min(max(cy + s * x + c * y, 0.0), ARENA)
            filled += 1
    return plans[:filled]


@compiled
def _route(start: Any, goal: Any, lengths: Any, last: Any, path: Any) -> int:
    """Write the shortest path from `start` to a standoff into `path`; return its number of points, or 0."""
    if min(_box_gap(goal[0], goal[1], 0), _box_gap(goal[0], goal[1], 1)) < CLEARANCE:
        return 0
    path[0] = start
    if _sees(start[0], start[1], goal[0], goal[1]):
        path[1] = goal
        return 2
    # Not in sight: by way of the corner that makes the path shortest.
    best, corner = math.inf, -1
    for i in range(len(_CORNERS)):
        if lengths[i] < math.inf and _sees(_CORNERS[i, 0], _CORNERS[i, 1], goal[0], goal[1]):
            length = lengths[i] + math.hypot(goal[0] - _CORNERS[i, 0], goal[1] - _CORNERS[i, 1])
            if length < best:
                best, corner = length, i
    if corner < 0:
        return 0

    # Follow the corners back to the start: once to count them, once to write them in order.
    size, at = 2, corner
    while at >= 0:
        size, at = size + 1, last[at]
    path[size - 1] = goal
    row, at = size - 2, corner
    while at >= 0:
        path[row] = _CORNERS[at]
        row, at = row - 1, last[at]
    return size


@compiled
def _add_push(plan: Any, t: int, standoff: Any, normal: Any, push: Any) -> None:
    """From row t on, move in from the standoff for the number of steps in `push`, then hold."""
    speed, steps, turn = push[0], push[1], push[2]
    c, s = math.cos(turn), math.sin(turn)
    nx, ny = c * normal[0] - s * normal[1], s * normal[0] + c * normal[1]
    for i in range(t, len(plan)):
        far = speed * min(i - t + 1.0, steps)
        plan[i, 0], plan[i, 1] = standoff[0] + nx * far, standoff[1] + ny * far
