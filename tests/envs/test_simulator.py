"""The compiled simulator and its coverage against the real physics and the real geometry."""

import os
import time
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pusht_act.demos import builtin
from pusht_act.envs import simulator
from pusht_act.envs.coverage import coverage, coverage_of_poses
from pusht_act.envs.pusht import make_env, reset_to
from pusht_act.envs.simulator import (
    ANGLE,
    CENTRE_X,
    CENTRE_Y,
    RECTANGLES,
    WALL_HIGH,
    WALL_LOW,
    agent_in_block_frame,
    new_contacts,
    new_state,
    observe,
    sim_step,
    simulate,
)

ENV = make_env()


def corners(state: np.ndarray) -> np.ndarray:
    c, s = np.cos(state[ANGLE]), np.sin(state[ANGLE])
    local = np.array([(x, y) for x0, y0, x1, y1 in RECTANGLES for x in (x0, x1) for y in (y0, y1)])
    world: np.ndarray = local @ np.array(((c, s), (-s, c))) + state[[CENTRE_X, CENTRE_Y]]
    return world


def touches_wall(state: np.ndarray) -> bool:
    return bool(corners(state).min() < WALL_LOW + 2 or corners(state).max() > WALL_HIGH - 2)


def error(state: np.ndarray) -> float:
    """Largest difference from the environment, px; a radian counts as 100 px."""
    real = np.array((*ENV.agent.position, *ENV.block.position, ENV.block.angle))
    return float(np.max(np.abs(observe(state) - real) * (1, 1, 1, 1, 100)))


def without_shapely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENV, "_get_coverage", lambda: 0.0)


def test_constants_are_those_of_the_environment() -> None:
    ENV.reset(seed=0)
    assert (ENV.block.mass, ENV.block.moment) == (simulator.MASS, simulator.MOMENT)
    assert tuple(ENV.block.center_of_gravity) == (0.0, simulator.CENTRE)
    assert (ENV.k_p, ENV.k_v, ENV.dt) == (simulator.K_P, simulator.K_V, simulator.DT)
    assert ENV.space.damping == 0.0
    assert all(shape.friction == 0.0 and shape.elasticity == 0.0 for shape in ENV.space.shapes)
    assert (ENV.space.iterations, ENV.space.collision_persistence) == (simulator.ITERATIONS, simulator.PERSISTENCE)
    assert ENV.space.collision_slop == simulator.SLOP
    assert pytest.approx(1.0 - ENV.space.collision_bias**ENV.dt, abs=1e-15) == simulator.BIAS
    local = [vertex for shape in ENV._block_shapes for vertex in shape.get_vertices()]
    ours = {(x, y + simulator.CENTRE) for x0, y0, x1, y1 in RECTANGLES for x in (x0, x1) for y in (y0, y1)}
    assert {(round(x, 9), round(y, 9)) for x, y in local} == ours


@given(
    agent=st.tuples(st.floats(100, 412), st.floats(100, 412)),
    block=st.tuples(st.floats(206, 306), st.floats(206, 306), st.floats(-np.pi, np.pi)),
    aim=st.tuples(st.floats(180, 332), st.floats(180, 332)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_twenty_steps_of_random_pushes_equal_pymunk(
    agent: tuple[float, float], block: tuple[float, float, float], aim: tuple[float, float], seed: int
) -> None:
    state = new_state(np.array((*agent, *block)))
    x, y = agent_in_block_frame(state)
    # A reset may put the agent's centre into the block, where two contacts fight and the solver's order decides.
    assume(not any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in RECTANGLES))
    # Level with a side to the last bit, which round numbers can be, it touches a face and a corner alike; Chipmunk then
    # takes one or the other, and what follows is 1 to 80 px off. 0.01 px away from that they agree to 1e-12.
    assume(all(min(abs(x - x0), abs(x - x1), abs(y - y0), abs(y - y1)) > 1e-9 for x0, y0, x1, y1 in RECTANGLES))
    with pytest.MonkeyPatch.context() as patch:
        without_shapely(patch)
        reset_to(ENV, (*agent, *block))
        random, target, contacts = np.random.default_rng(seed), np.array(agent), new_contacts()
        for _ in range(20):
            target = np.clip(target + 0.2 * (np.array(aim) - target) + 10 * random.standard_normal(2), 0, 512)
            ENV.step(target)
            sim_step(state, contacts, *target)
            if touches_wall(state):
                break
            assert error(state) < 1e-6


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_blocks_pushed_at_walls_stay_close(seed: int) -> None:
    """Squeezed against a wall the solver has not converged, and Chipmunk's order of contacts comes from its tree."""
    random = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        without_shapely(patch)
        reset_to(ENV, (300.0, 250.0, 380.0, float(random.uniform(200, 300)), float(random.uniform(-0.5, 0.5))))
        state = new_state(np.array((*ENV.agent.position, *ENV.block.position, ENV.block.angle)))
        contacts = new_contacts()
        for t in range(20):
            target = (300.0 + 4.0 * t, 250.0)
            ENV.step(np.array(target))
            sim_step(state, contacts, *target)
        assert error(state) < 10.0
        assert corners(state).max() < WALL_HIGH + 3.0


def test_built_in_demonstrations_roll_out_as_in_pymunk(monkeypatch: pytest.MonkeyPatch) -> None:
    without_shapely(monkeypatch)
    errors = []
    for made in builtin.load(40):
        ENV.reset(seed=made.start)
        state, contacts = (
            new_state(np.array((*ENV.agent.position, *ENV.block.position, ENV.block.angle))),
            new_contacts(),
        )
        for action in made.action[:40].astype(np.float64):
            ENV.step(action)
            sim_step(state, contacts, *action)
        errors.append(error(state))
    assert np.median(errors) < 1e-9
    assert np.mean(np.array(errors) < 1e-6) > 0.9  # the others touch a wall or start in an overlap


def test_rollout_is_repeated_steps_and_leaves_its_start() -> None:
    start = new_state(np.array((200.0, 200.0, 256.0, 240.0, 0.5)))
    before, actions = start.copy(), np.random.default_rng(0).uniform(200, 300, (15, 2))
    states = simulate(start, actions)
    now, contacts = start.copy(), new_contacts()
    for state, action in zip(states, actions, strict=True):
        sim_step(now, contacts, *action)
        np.testing.assert_array_equal(state, now)
    np.testing.assert_array_equal(start, before)
    assert not np.array_equal(states[-1, 2:5], start[2:5])


# Where edges are parallel but for a rounding, GEOS snaps corners 5e-10 px apart: 1.07e-12 of the goal at 2e-11 rad.
ANGLES = st.floats(-7, 7).filter(lambda angle: angle == 0 or abs(angle) > 1e-6)


@given(x=st.floats(120, 400), y=st.floats(120, 400), angle=ANGLES, near=st.booleans())
@settings(max_examples=300, deadline=None)
def test_coverage_equals_shapely(x: float, y: float, angle: float, near: bool) -> None:
    if near:  # where it matters: a few px and degrees about the goal
        x, y, angle = 256 + (x - 260) / 30, 256 + (y - 260) / 30, np.pi / 4 + angle / 50
    reset_to(ENV, (20.0, 20.0, x, y, angle))
    pose = np.array((*ENV.block.position, ENV.block.angle))
    expected = ENV._get_coverage()
    assert coverage(new_state(np.array((20.0, 20.0, *pose)))) == pytest.approx(expected, abs=1e-12)
    assert coverage_of_poses(pose[None])[0] == pytest.approx(expected, abs=1e-12)


def test_coverage_of_the_goal_itself_is_one() -> None:
    assert coverage_of_poses(np.array([(256.0, 256.0, np.pi / 4)]))[0] == pytest.approx(1.0, abs=1e-12)


def test_compiled_code_older_than_the_physics_is_forgotten(tmp_path: Path) -> None:
    old, new, data = tmp_path / "planner.f.nbi", tmp_path / "planner.g.nbi", tmp_path / "planner.f.nbc"
    for path in (old, new, data):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(new, (time.time() + 10, time.time() + 10))
    simulator._drop_outdated(tmp_path)
    assert [path.exists() for path in (old, new, data)] == [False, True, True]


def test_without_a_cache_folder_functions_still_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **options: bool) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(numba, "njit", njit)
    assert simulator.compiled(abs)(-1) == 1
