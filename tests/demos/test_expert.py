"""The planner and the demonstrator, judged by gym-pusht."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from pusht_act.demos.expert import Demonstration, demonstrate, demonstrate_many
from pusht_act.demos.planner import PlannerOptions
from pusht_act.envs.pusht import Start, make_env, reset_to

SEED = 400_003


def same(one: Demonstration, other: Demonstration) -> bool:
    return (one.start, one.coverage) == (other.start, other.coverage) and all(
        np.array_equal(a, b) for a, b in ((one.action, other.action), (one.executed, other.executed))
    )


def bend(actions: np.ndarray) -> float:
    """Mean length of the second difference, px."""
    return float(np.linalg.norm(np.diff(actions, 2, axis=0), axis=1).mean())


def stride(actions: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(actions, axis=0), axis=1).mean())


@pytest.fixture(scope="module")
def plain() -> Demonstration:
    return demonstrate(SEED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [400_000, 400_001, 400_002])
def test_fresh_resets_are_solved_in_the_real_environment(seed: int) -> None:
    made = demonstrate(seed)
    env = make_env()
    reset_to(env, seed)
    results = [env.step(action) for action in made.executed]
    assert made.success
    assert results[-1][4]["is_success"]
    assert results[-1][4]["coverage"] == pytest.approx(made.coverage, abs=1e-12)
    assert made.coverage > 0.97
    assert not any(result[4]["coverage"] > 0.97 for result in results[:-1])
    assert len(made.action) <= 300
    assert made.action.dtype == made.executed.dtype == np.float32
    assert made.action.min() >= 0
    assert made.action.max() <= 512
    assert bend(made.action) < 5.4  # people's mean on lerobot/pusht
    np.testing.assert_array_equal(made.action, made.executed)


def test_a_given_state_is_where_the_episode_starts() -> None:
    start = (60.0, 400.0, 200.0, 220.0, 2.0)
    made = demonstrate(start)
    env = make_env()
    reset_to(env, start)
    np.testing.assert_allclose(env.get_obs(), start, atol=1e-9)
    assert made.start == start
    assert made.success


def test_equal_arguments_give_equal_demonstrations(plain: Demonstration) -> None:
    assert same(demonstrate(SEED), plain)


def test_option_seed(plain: Demonstration) -> None:
    assert not same(demonstrate(SEED, PlannerOptions(seed=1)), plain)


def test_option_coverage(plain: Demonstration) -> None:
    assert plain.coverage < 0.985
    assert demonstrate(SEED, PlannerOptions(coverage=0.985)).coverage > 0.985


def test_option_speed(plain: Demonstration) -> None:
    slow, fast = (demonstrate(SEED, PlannerOptions(speed=speed)) for speed in (5.0, 14.0))
    assert stride(slow.action) < stride(plain.action) < stride(fast.action)


def test_option_smoothness() -> None:
    rough, smooth = (demonstrate(SEED, PlannerOptions(smoothness=value)) for value in (0.0, 5.0))
    assert bend(smooth.action) < 0.7 * bend(rough.action)


def test_option_replan(plain: Demonstration) -> None:
    often = demonstrate(SEED, PlannerOptions(replan=2))
    np.testing.assert_array_equal(often.action[:2], plain.action[:2])
    assert not np.array_equal(often.action[2:5], plain.action[2:5])


def test_option_noise_moves_what_is_executed_and_leaves_labels_clean(plain: Demonstration) -> None:
    noisy = demonstrate(SEED, PlannerOptions(noise=6.0))
    difference = noisy.executed - noisy.action
    inside = (noisy.executed > 0) & (noisy.executed < 512)
    assert 4.5 < difference[inside].std() < 7.5
    assert abs(difference[inside].mean()) < 2.0
    assert bend(noisy.action) < 0.5 * bend(noisy.executed)
    np.testing.assert_array_equal(noisy.action[0], plain.action[0])  # the same search from the same state
    env = make_env()
    reset_to(env, SEED)
    assert [env.step(action)[4]["is_success"] for action in noisy.executed][-1]


def test_labels_answer_to_where_the_noise_led() -> None:
    """Between two searches too: the second label is no longer that of the quiet plan."""
    quiet, noisy = (
        demonstrate(SEED, PlannerOptions(replan=40)),
        demonstrate(SEED, PlannerOptions(noise=20.0, replan=40)),
    )
    np.testing.assert_array_equal(quiet.action[0], noisy.action[0])
    assert not np.array_equal(quiet.action[1:30], noisy.action[1:30])


@pytest.mark.slow
def test_workers_change_neither_order_nor_results() -> None:
    starts: list[Start] = [SEED, (60.0, 400.0, 200.0, 220.0, 2.0), 400_001]
    calls: list[tuple[int, int]] = []
    alone = demonstrate_many(starts, workers=1, progress=lambda done, total: calls.append((done, total)))
    both = demonstrate_many(starts, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert [made.start for made in both] == starts
    assert all(same(a, b) for a, b in zip(alone, both, strict=True))
    assert calls == [(1, 3), (2, 3), (3, 3)] * 2
    assert demonstrate_many([]) == []


def test_a_worker_needs_no_torch() -> None:
    code = "import sys, pusht_act.demos.expert; print([m for m in ('torch', 'lerobot') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 1.0}, r"coverage=1.0: choose"),
        ({"coverage": 0.9}, r"coverage=0.9: choose"),
        ({"coverage": float("nan")}, r"coverage=nan: choose"),
        ({"speed": 0.0}, r"speed=0.0: choose"),
        ({"smoothness": -1.0}, r"smoothness=-1.0: choose"),
        ({"noise": -1.0}, r"noise=-1.0: choose"),
        ({"replan": 0}, r"replan=0: choose"),
        ({"seed": -1}, r"seed=-1: choose"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PlannerOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (-1, "seed is 0 or more"),
        ((100.0, 100.0, 256.0, 256.0), "4 numbers: give"),
        ((100.0, float("nan"), 256.0, 256.0, 0.0), "all finite"),
        ((100.0, 700.0, 256.0, 256.0, 0.0), "outside the arena"),
        ((100.0, 100.0, 600.0, 256.0, 0.0), "through the walls"),
        ((256.0, 270.0, 256.0, 256.0, 0.0), "inside the block; move it"),
    ],
)
def test_impossible_starts_are_refused(start: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        demonstrate(start)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        demonstrate_many([SEED, start])  # type: ignore[list-item]


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        demonstrate_many([SEED], workers=0)
