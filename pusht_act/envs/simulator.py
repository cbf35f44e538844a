"""Simulate the one physics case that gym-pusht needs, compiled: a circle that pushes a T inside four walls.

It follows Chipmunk 7 (the C library under pymunk 6): cpSpaceStep.c for the order of a step, cpArbiter.c for the contact
solver and its bias term, cpCollision.c for the contacts. Three facts about gym-pusht 0.1.8 make the port small:

- `body.friction = 1` only sets a Python attribute (friction belongs to shapes), so contacts are frictionless;
- `space.damping = 0` zeroes the block's velocity in every sub-step, so pushing is quasi-static;
- the agent is kinematic: it pushes and is never pushed, and walls do not stop it.

The block's pose is kept at its centre of gravity, 45 px from the origin that the environment reports.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
from jaxtyping import Float64

# Constants of gym_pusht/envs/pusht.py.
ARENA = 512.0
"""Actions lie within [0, ARENA] px."""
MAX_STEPS = 300
"""max_episode_steps of gym_pusht/__init__.py."""
SUB_STEPS = 10
DT = 0.01
K_P, K_V = 100.0, 20.0
AGENT_RADIUS = 15.0
# The centre of gravity is (0, CENTRE) in the block's frame.
CENTRE = 45.0
MASS, MOMENT = 1.0, 3000.0
# The walls are segments at 5 and 506 px with a radius of 2.
WALL_LOW, WALL_HIGH = 7.0, 504.0
# No corner of the T is further than this from its centre of gravity (76.49 px).
REACH = 76.5
# The T's two rectangles about the centre of gravity: x_min, y_min, x_max, y_max.
RECTANGLES = np.array(((-60.0, -45.0, 60.0, -15.0), (-15.0, -15.0, 15.0, 75.0)))
# Inward normal and distance from the origin along it.
_WALLS = np.array(((1.0, 0.0, WALL_LOW), (0.0, 1.0, WALL_LOW), (-1.0, 0.0, -WALL_HIGH), (0.0, -1.0, -WALL_HIGH)))

# Chipmunk's defaults, which it writes as float32 constants (cpSpaceInit: 0.1f and (1.0f - 0.1f)^60).
ITERATIONS = 10
SLOP = float(np.float32(0.1))
BIAS = 1.0 - (float(np.float32(1.0) - np.float32(0.1)) ** 60) ** DT
# Physics steps for which the impulse of a lost contact is remembered.
PERSISTENCE = 3.0

# Slots of a state vector. Everything after ANGLE is hidden from an observation.
AGENT_X, AGENT_Y, CENTRE_X, CENTRE_Y, ANGLE = 0, 1, 2, 3, 4
AGENT_VX, AGENT_VY, VX, VY, SPIN, BIAS_VX, BIAS_VY, BIAS_SPIN = 5, 6, 7, 8, 9, 10, 11, 12
# Two slots each: one contact of the agent with each rectangle.
IMPULSE, AGE = 13, 15
STATE_SIZE = 17

# Columns of a contact: normal (into the block), arm from the centre of gravity, the velocity of the other body along
# the normal, the bias velocity, and the accumulated impulses.
_NX, _NY, _CROSS, _MASS, _SPEED, _BIAS, _IMPULSE, _PUSH = 0, 1, 2, 3, 4, 5, 6, 7
MAX_CONTACTS = 18


def compiled[F: Callable[..., Any]](function: F) -> F:
    """Compile by `numba.njit`, keep the result on disk, and keep the function's type for mypy.

    Numba writes beside the source, or into the user's cache folder where that is read-only.
    """
    try:
        dispatcher = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        # Numba found no folder that it may write to: compile in each process.
        return cast(F, numba.njit(nogil=True)(function))
    _drop_outdated(Path(dispatcher.stats.cache_path))
    return cast(F, dispatcher)


@cache
def _drop_outdated(folder: Path) -> None:
    """Delete cached machine code in `folder` that is older than the modules that other modules' kernels call.

    Numba compares only the file of a function, not those of the functions that it calls (numba documentation,
    "Caching limitations"): the planner would keep running the physics of before a change.
    """
    changed = max(Path(__file__).with_name(name).stat().st_mtime for name in ("simulator.py", "coverage.py"))
    for index in folder.glob("*.nbi"):
        # Another process may be deleting the same files.
        with suppress(FileNotFoundError):
            if index.stat().st_mtime < changed:
                index.unlink()


def new_state(
    observation: Float64[np.ndarray, " 5"], agent_velocity: tuple[float, float] = (0.0, 0.0)
) -> Float64[np.ndarray, " 17"]:
    """Make the simulator's state from what gym-pusht reports.

    Since damping leaves the block no momentum, its hidden velocity follows from the contacts at the present poses.

    Args:
        observation: Agent x, y, block x, y (px; the block's origin, not its centre of gravity), block angle (rad).
        agent_velocity: px/s.
    """
    state = np.zeros(STATE_SIZE)
    agent_x, agent_y, x, y, angle = (float(value) for value in observation)
    state[AGENT_X], state[AGENT_Y], state[ANGLE] = agent_x, agent_y, angle
    state[CENTRE_X], state[CENTRE_Y] = x - math.sin(angle) * CENTRE, y + math.cos(angle) * CENTRE
    state[AGENT_VX], state[AGENT_VY] = agent_velocity
    state[AGE : AGE + 2] = PERSISTENCE
    _react(state, new_contacts(), math.cos(angle), math.sin(angle))
    return state


@compiled
def observe(state: Float64[np.ndarray, " 17"]) -> Float64[np.ndarray, " 5"]:
    """Return what gym-pusht's `obs_type="state"` observes, with the angle unwrapped.

    That is agent x, y, block x, y (of its origin, px) and block angle (rad).
    """
    angle = state[ANGLE]
    x, y = state[CENTRE_X] + math.sin(angle) * CENTRE, state[CENTRE_Y] - math.cos(angle) * CENTRE
    return np.array((state[AGENT_X], state[AGENT_Y], x, y, angle))


@compiled
def agent_in_block_frame(state: Float64[np.ndarray, " 17"]) -> tuple[float, float]:
    """Return the agent's position in the block's frame about its centre of gravity, px."""
    c, s = math.cos(state[ANGLE]), math.sin(state[ANGLE])
    dx, dy = state[AGENT_X] - state[CENTRE_X], state[AGENT_Y] - state[CENTRE_Y]
    return c * dx + s * dy, c * dy - s * dx


@compiled
def new_contacts() -> Float64[np.ndarray, "18 8"]:
    """Allocate scratch space for `sim_step`.

    Use one for a whole simulation: an allocation takes as long as a physics step.
    """
    return np.empty((MAX_CONTACTS, 8))


@compiled
def _add_contact(
    contacts: Any, count: int, nx: float, ny: float, rx: float, ry: float, speed: float, gap: float
) -> int:
    """Write contact `count` as cpArbiterPreStep does and return the next free row.

    Args:
        nx, ny: Normal into the block. rx, ry: Contact point from the centre of gravity.
        speed: Velocity of the other body along the normal. gap: Distance along the normal, negative when overlapping.
    """
    cross = rx * ny - ry * nx
    contacts[count, _NX], contacts[count, _NY], contacts[count, _CROSS] = nx, ny, cross
    contacts[count, _MASS] = 1.0 / (1.0 / MASS + cross * cross / MOMENT)
    contacts[count, _SPEED] = speed
    contacts[count, _BIAS] = -BIAS * min(0.0, gap + SLOP) / DT
    contacts[count, _IMPULSE] = contacts[count, _PUSH] = 0.0
    return count + 1


@compiled
def sides(rectangle: int) -> tuple[float, float, float, float]:
    """Return the least x, y and the largest x, y of a rectangle about the centre of gravity."""
    return RECTANGLES[rectangle, 0], RECTANGLES[rectangle, 1], RECTANGLES[rectangle, 2], RECTANGLES[rectangle, 3]


@compiled
def _agent_contact(
    state: Any, contacts: Any, count: int, rectangle: int, x: float, y: float, c: float, s: float
) -> int:
    """Add the agent's contact with one rectangle; x, y is the agent in the block's frame, c, s the block's rotation."""
    x0, y0, x1, y1 = sides(rectangle)
    px, py = min(max(x, x0), x1), min(max(y, y0), y1)
    nx, ny = px - x, py - y
    square = nx * nx + ny * ny
    if square > AGENT_RADIUS * AGENT_RADIUS:
        return count
    distance = math.sqrt(square)
    if distance > 0.0:
        nx, ny = nx / distance, ny / distance
    else:
        # The agent's centre is inside the rectangle: leave by the nearest edge.
        depth = min(x - x0, x1 - x, y - y0, y1 - y)
        if depth == x - x0:
            nx, ny, px = 1.0, 0.0, x0
        elif depth == x1 - x:
            nx, ny, px = -1.0, 0.0, x1
        elif depth == y - y0:
            nx, ny, py = 0.0, 1.0, y0
        else:
            nx, ny, py = 0.0, -1.0, y1
        distance = -depth
    wx, wy = c * nx - s * ny, s * nx + c * ny
    rx, ry = c * px - s * py, s * px + c * py
    speed = state[AGENT_VX] * wx + state[AGENT_VY] * wy
    return _add_contact(contacts, count, wx, wy, rx, ry, speed, distance - AGENT_RADIUS)


@compiled
def _wall_contacts(contacts: Any, count: int, rectangle: int, cx: float, cy: float, c: float, s: float) -> int:
    """Add a rectangle's contacts with the walls: those of its two deepest corners that touch."""
    x0, y0, x1, y1 = sides(rectangle)
    for wall in range(4):
        nx, ny, offset = _WALLS[wall, 0], _WALLS[wall, 1], _WALLS[wall, 2]
        # The wall's normal in the block's frame gives the deepest point without rotating the corners.
        u, v = c * nx + s * ny, c * ny - s * nx
        if cx * nx + cy * ny + min(u * x0, u * x1) + min(v * y0, v * y1) > offset:
            continue
        first = second = math.inf
        fx = fy = sx = sy = 0.0
        for corner in range(4):
            x, y = (x0 if corner < 2 else x1), (y0 if corner % 2 == 0 else y1)
            rx, ry = c * x - s * y, s * x + c * y
            gap = (cx + rx) * nx + (cy + ry) * ny - offset
            if gap < first:
                second, sx, sy = first, fx, fy
                first, fx, fy = gap, rx, ry
            elif gap < second:
                second, sx, sy = gap, rx, ry
        if first <= 0.0:
            count = _add_contact(contacts, count, nx, ny, fx, fy, 0.0, first)
        if second <= 0.0:
            count = _add_contact(contacts, count, nx, ny, sx, sy, 0.0, second)
    return count


@compiled
def _find_contacts(state: Any, contacts: Any, c: float, s: float) -> int:
    """Fill `contacts` for the present poses and return their number; start them from the remembered impulses."""
    count = 0
    cx, cy = state[CENTRE_X], state[CENTRE_Y]
    dx, dy = state[AGENT_X] - cx, state[AGENT_Y] - cy
    near = dx * dx + dy * dy < (REACH + AGENT_RADIUS) ** 2
    x, y = c * dx + s * dy, c * dy - s * dx
    for rectangle in range(2):
        before = count
        if near:
            count = _agent_contact(state, contacts, count, rectangle, x, y, c, s)
        if count == before:
            state[AGE + rectangle] += 1.0
            continue
        if state[AGE + rectangle] < PERSISTENCE:
            contacts[before, _IMPULSE] = state[IMPULSE + rectangle]
            # Chipmunk applies a remembered impulse at once only where the contact was there in the step before.
            if state[AGE + rectangle] == 0.0:
                _push(state, contacts, before, contacts[before, _IMPULSE])
        state[AGE + rectangle] = 0.0
    # Only a block near a wall can touch it.
    low, high = WALL_LOW + REACH, WALL_HIGH - REACH
    if cx < low or cx > high or cy < low or cy > high:
        count = _wall_contacts(contacts, count, 0, cx, cy, c, s)
        count = _wall_contacts(contacts, count, 1, cx, cy, c, s)
    return count


@compiled
def _push(state: Any, contacts: Any, row: int, impulse: float) -> None:
    state[VX] += contacts[row, _NX] * impulse / MASS
    state[VY] += contacts[row, _NY] * impulse / MASS
    state[SPIN] += contacts[row, _CROSS] * impulse / MOMENT


@compiled
def _solve(state: Any, contacts: Any, count: int) -> None:
    """Apply cpArbiterApplyImpulse to all contacts, ten times or until nothing changes."""
    for _ in range(ITERATIONS):
        change = 0.0
        for row in range(count):
            nx, ny, cross, mass = contacts[row, _NX], contacts[row, _NY], contacts[row, _CROSS], contacts[row, _MASS]
            moving = state[BIAS_VX] * nx + state[BIAS_VY] * ny + state[BIAS_SPIN] * cross
            old = contacts[row, _PUSH]
            contacts[row, _PUSH] = max(0.0, old + (contacts[row, _BIAS] - moving) * mass)
            push = contacts[row, _PUSH] - old
            state[BIAS_VX] += nx * push / MASS
            state[BIAS_VY] += ny * push / MASS
            state[BIAS_SPIN] += cross * push / MOMENT
            closing = state[VX] * nx + state[VY] * ny + state[SPIN] * cross - contacts[row, _SPEED]
            old = contacts[row, _IMPULSE]
            contacts[row, _IMPULSE] = max(0.0, old - closing * mass)
            _push(state, contacts, row, contacts[row, _IMPULSE] - old)
            change = max(change, abs(push), abs(contacts[row, _IMPULSE] - old))
        # A single contact is solved exactly by one pass.
        if count == 1 or change < 1e-12:
            break


@compiled
def _react(state: Any, contacts: Any, c: float, s: float) -> None:
    """Give the block the velocities that its contacts demand at the present poses."""
    state[VX] = state[VY] = state[SPIN] = state[BIAS_VX] = state[BIAS_VY] = state[BIAS_SPIN] = 0.0
    count = _find_contacts(state, contacts, c, s)
    if count == 0:
        return
    _solve(state, contacts, count)
    row = 0
    for rectangle in range(2):
        if state[AGE + rectangle] == 0.0:
            state[IMPULSE + rectangle] = contacts[row, _IMPULSE]
            row += 1


@compiled
def sim_step(state: Float64[np.ndarray, " 17"], contacts: Float64[np.ndarray, "18 8"], x: float, y: float) -> None:
    """Advance `state` in place by one control step (0.1 s) towards the agent's target x, y (px)."""
    c, s = math.cos(state[ANGLE]), math.sin(state[ANGLE])
    for _ in range(SUB_STEPS):
        # The order is cpSpaceStep's: the controller sets the velocity, all positions move, contacts react.
        state[AGENT_VX] += (K_P * (x - state[AGENT_X]) - K_V * state[AGENT_VX]) * DT
        state[AGENT_VY] += (K_P * (y - state[AGENT_Y]) - K_V * state[AGENT_VY]) * DT
        state[AGENT_X] += state[AGENT_VX] * DT
        state[AGENT_Y] += state[AGENT_VY] * DT
        state[CENTRE_X] += (state[VX] + state[BIAS_VX]) * DT
        state[CENTRE_Y] += (state[VY] + state[BIAS_VY]) * DT
        spin = state[SPIN] + state[BIAS_SPIN]
        if spin != 0.0:
            state[ANGLE] += spin * DT
            c, s = math.cos(state[ANGLE]), math.sin(state[ANGLE])
        _react(state, contacts, c, s)


@compiled
def simulate(state: Float64[np.ndarray, " 17"], actions: Float64[np.ndarray, "T 2"]) -> Float64[np.ndarray, "T 17"]:
    """Return the states after each action, starting from `state`, which is not changed."""
    contacts = new_contacts()
    states = np.empty((len(actions), STATE_SIZE))
    now = state.copy()
    for t in range(len(actions)):
        sim_step(now, contacts, actions[t, 0], actions[t, 1])
        states[t] = now
    return states
