"""A receding-horizon planner that solves PushT from the simulator's full state.

Every few steps it simulates a push at each reachable point of the T, refines the best pushes and its previous plan by
smooth random changes, keeps the plan of least cost, and executes its first steps. When the block stops getting closer
it searches harder.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from pusht_act.demos.proposals import propose
from pusht_act.envs.coverage import GOAL_ANGLE, GOAL_CENTRE_X, GOAL_CENTRE_Y, SUCCESS_COVERAGE, coverage
from pusht_act.envs.simulator import (
    AGENT_RADIUS,
    ANGLE,
    ARENA,
    CENTRE_X,
    CENTRE_Y,
    agent_in_block_frame,
    compiled,
    new_contacts,
    sides,
    sim_step,
)
from pusht_act.runtime.errors import UserError

# Nearly half the length of the T.
RADIAN = 50.0
"""Distance that a rotation of the block by one radian counts as, px."""
# With 15 steps a walk around the T would already count as a stall.
STALL_PX, STALL_STEPS = 1.0, 30
"""A block that comes less than so many px closer in so many steps has stalled."""
KEEP = 0.97
"""A new plan replaces the present one only if it costs less than this share of it."""


@dataclass(frozen=True, kw_only=True)
class PlannerOptions:
    """Options of the demonstrations."""

    coverage: float = 0.97
    """Share of the goal to cover before an episode ends, in [0.95, 1). The environment demands 0.95, but demonstrations
    that stop right there teach a policy too little."""
    speed: float = 9.0
    """Speed of the target around the T, px a step; pushes take 7/9 of it, and 11/9 is the soft limit."""
    smoothness: float = 1.0
    """Weight of changes of speed and direction; 0 ignores them."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on each coordinate of an executed action, px; labels stay clean."""
    replan: int = 5
    """Steps between two searches for a plan. With noise, the steps in between adapt the plan to where the noise led; 1
    or 2 searches again there, in 2 to 3 times the time."""
    seed: int = 0
    """Seed of the planner and of the noise; together with a start it determines the demonstration."""

    def __post_init__(self) -> None:
        if not SUCCESS_COVERAGE <= self.coverage < 1.0:
            raise UserError(f"coverage={self.coverage}: choose one in [{SUCCESS_COVERAGE}, 1), such as 0.97")
        if not 1.0 <= self.speed <= 30.0:
            raise UserError(f"speed={self.speed}: choose one in [1, 30] px a step, such as 9")
        if not 0.0 <= self.smoothness < math.inf:
            raise UserError(f"smoothness={self.smoothness}: choose one from 0 up, such as 1")
        if not 0.0 <= self.noise <= 100.0:
            raise UserError(f"noise={self.noise}: choose one in [0, 100] px, such as 6")
        if self.replan < 1:
            raise UserError(f"replan={self.replan}: choose at least 1 step, such as 5")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: choose one from 0 up")


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """How hard one search for a plan tries."""

    horizon: int
    """Number of steps in a plan."""
    push_steps: tuple[int, ...]
    angles: tuple[float, ...]
    """Angles of a push to the inward normal, rad."""
    push_speed: float
    """Px a step, at PlannerOptions.speed 9."""
    stride: int
    """Try every so many contact points; a stride of 2 alternates between the even and the odd ones."""
    candidates: int
    """Number of proposals to refine."""
    refine: tuple[int, int]
    """Iterations and samples for each candidate."""
    finish: tuple[int, int]
    """Iterations and samples for the winner."""
    sigma: float
    """Standard deviation of the first iteration's changes, px."""
    smoothness: float
    """Factor on PlannerOptions.smoothness."""


_USUAL = _Budget(
    horizon=40,
    push_steps=(6, 20),
    angles=(0.0,),
    push_speed=7.0,
    stride=2,
    candidates=3,
    refine=(2, 12),
    finish=(4, 16),
    sigma=14.0,
    smoothness=1.0,
)
_STALLED = _Budget(
    horizon=60,
    push_steps=(4, 16),
    angles=(-0.5, 0.0, 0.5),
    push_speed=6.0,
    stride=1,
    candidates=8,
    refine=(3, 24),
    finish=(6, 40),
    sigma=18.0,
    smoothness=0.5,
)
_CORRECTION, _CORRECTION_SIGMA = (2, 12), 6.0
_LAST_SIGMA = 2.5
_ELITE = 4


@compiled
def _distances(state: Any) -> tuple[float, float]:
    """Return the distances of the block from the goal and of the agent's rim from the block, px."""
    c, s = math.cos(state[ANGLE]), math.sin(state[ANGLE])
    dx, dy = state[CENTRE_X] - GOAL_CENTRE_X, state[CENTRE_Y] - GOAL_CENTRE_Y
    # One minus the cosine of the remaining angle: half its square where that is small.
    turn = 1.0 - c * math.cos(GOAL_ANGLE) - s * math.sin(GOAL_ANGLE)
    distance = math.sqrt(max(0.0, dx * dx + dy * dy + 2.0 * RADIAN**2 * turn))
    x, y = agent_in_block_frame(state)
    nearest = math.inf
    for rectangle in range(2):
        x0, y0, x1, y1 = sides(rectangle)
        gx, gy = max(x0 - x, 0.0, x - x1), max(y0 - y, 0.0, y - y1)
        nearest = min(nearest, gx * gx + gy * gy)
    return distance, max(0.0, math.sqrt(nearest) - AGENT_RADIUS)


@compiled
def _cost(state: Any, plan: Any, recent: Any, weights: Any, bound: float) -> float:
    """Return the cost of executing `plan`; infinite as soon as it exceeds `bound`.

    Args:
        recent: The two actions before the plan, oldest first, [2, 2].
        weights: Of squared second differences and of squared differences; then the soft limit (px a step), and the
            coverage to reach.
    """
    second, first, limit, enough = weights
    contacts, now = new_contacts(), state.copy()
    x1, y1 = recent[1, 0], recent[1, 1]
    ux, uy = x1 - recent[0, 0], y1 - recent[0, 1]
    cost: float = 0.0
    goal: float = 0.0
    for t in range(len(plan)):
        x, y = plan[t, 0], plan[t, 1]
        sim_step(now, contacts, x, y)
        vx, vy = x - x1, y - y1
        square, bend = vx * vx + vy * vy, (vx - ux) ** 2 + (vy - uy) ** 2
        fast = max(0.0, math.sqrt(square) - limit)
        cost += second * bend + first * square + 0.1 * fast * fast
        distance, gap = _distances(now)
        if distance < 12.0 and coverage(now) > enough:
            return cost
        # The exponential makes the last few px worth the walk around the T that they take; each step costs 4.
        goal = distance + 20.0 * (1.0 - math.exp(-distance / 8.0))
        cost += goal + 4.0 + 0.02 * gap
        if cost > bound:
            return math.inf
        x1, y1, ux, uy = x, y, vx, vy
    return cost + 20.0 * goal


@compiled
def _costs(state: Any, plans: Any, recent: Any, weights: Any, keep: int) -> Float64[np.ndarray, " N"]:
    """Return the costs of many plans; those that cannot be among the `keep` cheapest may be infinite."""
    costs = np.full(len(plans), np.inf)
    best = np.full(keep, np.inf)
    for i in range(len(plans)):
        costs[i] = _cost(state, plans[i], recent, weights, best[keep - 1])
        # Insert the cost into the sorted list of the cheapest, whose last entry bounds the next plans.
        at = keep - 1
        if costs[i] < best[at]:
            while at > 0 and best[at - 1] > costs[i]:
                best[at] = best[at - 1]
                at -= 1
            best[at] = costs[i]
    return costs


@functools.cache
def _spline(horizon: int, spacing: int) -> Float64[np.ndarray, "horizon K"]:
    """Return the weights of Catmull-Rom knots that are `spacing` steps apart; the curve starts from zero."""
    count = -(-horizon // spacing) + 2
    weights = np.zeros((horizon, count + 2))
    for t in range(horizon):
        knot, u = divmod((t + 1) / spacing, 1.0)
        k = int(knot)
        curve = (-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, -(u**2) + u**3)
        for offset, weight in enumerate(curve):
            # Knots 0 and 1, before the plan and at the action before it, are zero.
            if k + offset > 1:
                weights[t, k + offset] += 0.5 * weight
    return weights[:, 2:]


def _smoothed(plan: Float64[np.ndarray, "T 2"], last: Float64[np.ndarray, " 2"]) -> Float64[np.ndarray, "T 2"]:
    longer = np.concatenate((last[None], plan, plan[-1:]))
    smoother: np.ndarray = 0.25 * longer[:-2] + 0.5 * longer[1:-1] + 0.25 * longer[2:]
    return smoother


class Planner:
    """Plan the actions of one episode, one at a time.

    Args:
        options: Options of the demonstration.
        key: Integers that identify the start; with `options.seed` they determine all random draws.
        previous: The action before the first one; the position of the agent, if it is at rest.
    """

    def __init__(self, options: PlannerOptions, key: Sequence[int], previous: Float64[np.ndarray, " 2"]) -> None:
        self.options = options
        self._random = np.random.default_rng([options.seed, *key])
        self._recent = np.stack((previous, previous)).astype(np.float64)
        self._plan: Float64[np.ndarray, "H 2"] = np.empty((0, 2))
        self._executed = 0
        self._searches = 0
        self._best_distance = math.inf
        self._steps_since_best = 0

    def next_action(self, state: Float64[np.ndarray, " 17"]) -> Float64[np.ndarray, " 2"]:
        """Return the action to execute in `state` (px): the next of the plan, or the first of a new one."""
        distance = _distances(state)[0]
        if distance < self._best_distance - STALL_PX:
            self._best_distance, self._steps_since_best = distance, 0
        rest = self._plan[self._executed :]
        if not len(rest) or self._executed >= self.options.replan:
            self._plan, self._executed = self._search(state, rest, self._steps_since_best >= STALL_STEPS), 0
        elif self.options.noise > 0.0:
            # Noise led to a state that the plan did not foresee: adapt it. Without noise the simulator foresaw it.
            weights = self._weights(_USUAL)
            cost = _cost(state, rest, self._recent, weights, math.inf)
            rest[:] = self._refine(state, rest, cost, weights, _CORRECTION, _CORRECTION_SIGMA)[0]
        # Data sets store float32, and a replay is exact only if that is what was executed.
        action: np.ndarray = self._plan[self._executed].astype(np.float32).astype(np.float64)
        self._recent = np.stack((self._recent[1], action))
        self._executed += 1
        self._steps_since_best += 1
        return action

    def _weights(self, budget: _Budget) -> tuple[float, float, float, float]:
        """Return the `weights` of `_cost`."""
        smoothness, limit = self.options.smoothness * budget.smoothness, 11.0 * self.options.speed / 9.0
        return 0.3 * smoothness, 0.04 * smoothness, limit, self.options.coverage

    def _search(
        self, state: Float64[np.ndarray, " 17"], old: Float64[np.ndarray, "T 2"], stalled: bool
    ) -> Float64[np.ndarray, "H 2"]:
        """Return a new plan: the best refined proposal, or the rest of the old plan if it is about as good, refined."""
        budget = _STALLED if stalled else _USUAL
        weights = self._weights(budget)
        speed = budget.push_speed * self.options.speed / 9.0
        pushes = np.array([(speed, steps, angle) for steps in budget.push_steps for angle in budget.angles])
        first = self._searches % budget.stride
        self._searches += 1
        plans = propose(state, self._recent[1], budget.horizon, self.options.speed, pushes, first, budget.stride)
        costs = _costs(state, plans, self._recent, weights, budget.candidates)
        best, cost = np.tile(self._recent[1], (budget.horizon, 1)), math.inf
        # Refine the proposals that are cheapest as they are.
        for i in np.argsort(costs)[: budget.candidates]:
            if math.isfinite(costs[i]):
                found = self._refine(state, plans[i], costs[i], weights, budget.refine, budget.sigma)
                best, cost = found if found[1] < cost else (best, cost)
        # In a stall the old plan is what led there: do not try it again.
        if len(old) and not stalled:
            old = np.concatenate((old, np.repeat(old[-1:], budget.horizon, axis=0)))[: budget.horizon]
            old_cost = _cost(state, old, self._recent, weights, math.inf)
            old, old_cost = self._refine(state, old, old_cost, weights, budget.refine, budget.sigma)
            # Stay with the old plan unless the new one is clearly cheaper, so that the agent does not dither.
            best, cost = (old, old_cost) if cost > KEEP * old_cost else (best, cost)
        return self._refine(state, best, cost, weights, budget.finish, budget.sigma)[0]

    def _refine(
        self,
        state: Float64[np.ndarray, " 17"],
        plan: Float64[np.ndarray, "T 2"],
        cost: float,
        weights: tuple[float, float, float, float],
        effort: tuple[int, int],
        sigma: float,
    ) -> tuple[Float64[np.ndarray, "T 2"], float]:
        """Try smooth random changes of `plan`, ever smaller, and return the cheapest plan and its cost."""
        iterations, samples = effort
        for i in range(iterations):
            basis = _spline(len(plan), 6 if i < (iterations + 1) // 2 else 3)
            # Coarse changes first: few knots and large steps; then more knots, and steps that shrink to _LAST_SIGMA.
            size = sigma * (_LAST_SIGMA / sigma) ** (i / max(1, iterations - 1))
            knots = self._random.standard_normal((samples, basis.shape[1], 2))
            tries = np.clip(plan + size * (basis @ knots), 0.0, ARENA)
            costs = _costs(state, tries, self._recent, weights, _ELITE)
            order = np.argsort(costs)[:_ELITE]
            if costs[order[0]] < cost:
                plan, cost = tries[order[0]], float(costs[order[0]])
            # The mean of the best changes, and the plan smoothed, are often cheaper than each of them.
            for attempt in (tries[order].mean(axis=0), _smoothed(plan, self._recent[1])):
                value = _cost(state, attempt, self._recent, weights, cost)
                if value < cost:
                    plan, cost = attempt, value
        return plan, cost
