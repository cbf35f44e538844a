"""The reflection that takes PushT to itself, and demonstrations of it."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lerobot.envs.configs import PushtEnv

from pusht_act.data.builtin_demos import open_builtin_demos
from pusht_act.demos import builtin
from pusht_act.demos.mirror import reflect, reflect_angle, with_mirror_images
from pusht_act.demos.replay import replay
from pusht_act.envs.coverage import coverage_of_poses
from pusht_act.envs.gym_pusht_internals import block_corners
from pusht_act.envs.pusht import keypoints, make_env
from pusht_act.job import Result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corners() -> np.ndarray:
    env = make_env()
    env.reset(seed=0)
    return block_corners(env)


@given(st.floats(100, 400), st.floats(100, 400), st.floats(-10, 10))
def test_the_task_is_its_own_mirror_image(corners: np.ndarray, x: float, y: float, angle: float) -> None:
    pose = np.array([[x, y, angle]])
    image = np.array([[*reflect(pose[0, :2]), reflect_angle(angle)]])
    assert coverage_of_poses(image) == pytest.approx(coverage_of_poses(pose), abs=1e-9)
    there, back = (keypoints(corners, each).reshape(8, 2) for each in (image, pose))
    assert np.abs(there[:, None] - reflect(back)).max(2).min(1).max() < 1e-9
    assert reflect(reflect(pose[0, :2])) == pytest.approx(pose[0, :2])
    assert reflect_angle(reflect_angle(angle)) == pytest.approx(angle)


def test_the_goal_is_its_own_mirror_image() -> None:
    assert reflect(np.array([256.0, 256.0])).tolist() == [256.0, 256.0]
    assert reflect_angle(math.pi / 4) == math.pi / 4


def test_an_image_is_judged_by_gym_pusht() -> None:
    made = builtin.load(4)
    cut = replace(made[0], action=made[0].action[:-20], executed=made[0].executed[:-20])
    found = list(with_mirror_images([*made, cut]))
    originals = [each.start for each in found if isinstance(each.start, int)]
    assert originals == [each.start for each in [*made, cut]]
    images = [each for each in found if not isinstance(each.start, int)]
    assert len(images) == 3
    for image in images:
        original = found[found.index(image) - 1]
        assert np.array_equal(image.action, reflect(original.action))
        assert image.action.dtype == np.float32
        assert image.coverage == pytest.approx(original.coverage, abs=0.02)
        assert replay(image.start, image.action).success[-1]


def test_noise_is_mirrored_too() -> None:
    (made,) = builtin.load(1)
    noisy = replace(made, action=made.action + 1)
    _, image = with_mirror_images([noisy])
    assert np.array_equal(image.executed, reflect(made.action))
    assert np.array_equal(image.action, reflect(noisy.action))


@pytest.mark.parametrize("obs_type", ["environment_state_agent_pos", "pixels_agent_pos"])
def test_a_data_set_with_mirror_images(obs_type: str) -> None:
    plain, both = (open_builtin_demos(4, PushtEnv(obs_type=obs_type), mirror) for mirror in (False, True))
    assert (len(plain.episodes), len(both.episodes)) == (4, 7)
    (start, stop), (first, last) = both.episodes[1], both.episodes[0]
    assert np.array_equal(both.arrays["action"][start:stop], reflect(both.arrays["action"][first:last]))
    assert np.array_equal(both.arrays["action"][first:last], plain.arrays["action"][first:last])
    assert both.stats["action"] != plain.stats["action"]


def test_demos_mirror_is_what_training_reads(tiny: Callable[..., Result], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tiny("demos.mirror=true", "steps=1")
    assert "pusht_act/demos: 7 episodes" in caplog.text
