"""Replay against the environment's own step, reset and rendering."""

import gymnasium
import numpy as np
import pytest

from pusht_act.demos import builtin
from pusht_act.demos.replay import replay
from pusht_act.envs.pusht import Start, make_env, reset_to
from pusht_act.envs.rendering import render_frame


def rolled_out(start: Start, actions: np.ndarray, obs_type: str) -> tuple[list, list]:
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type=obs_type, disable_env_checker=True).unwrapped
    reset_to(env, start)
    observations, results = [env.get_obs()], []
    for action in actions:
        results.append(env.step(action))
        observations.append(results[-1][0])
    return observations[:-1], results


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_replay_gives_what_the_environment_gives(index: int) -> None:
    made = builtin.load(4)[index]
    observations, results = rolled_out(made.start, made.action, "environment_state_agent_pos")
    episode = replay(made.start, made.action)
    agent = np.array([o["agent_pos"] for o in observations])
    keypoints = np.array([o["environment_state"] for o in observations])
    np.testing.assert_array_equal(episode.observation_state, agent.astype(np.float32))
    np.testing.assert_array_equal(episode.environment_state, keypoints.astype(np.float32))
    np.testing.assert_allclose(episode.coverage, [r[4]["coverage"] for r in results], atol=1e-12)
    np.testing.assert_allclose(episode.reward, [r[1] for r in results], atol=1e-6)
    assert episode.success.tolist() == [r[4]["is_success"] for r in results]
    assert episode.done.tolist() == [False] * (len(results) - 1) + [True]
    assert episode.success[-1]
    assert episode.image is None
    np.testing.assert_array_equal(episode.action, made.action)
    assert {
        getattr(episode, name).dtype for name in ("observation_state", "environment_state", "action", "reward")
    } == {np.dtype(np.float32)}


def test_pictures_are_those_of_the_environment() -> None:
    made = builtin.load(1)[0]
    observations, _ = rolled_out(made.start, made.action[:60:3], "pixels_agent_pos")
    image = replay(made.start, made.action[:60:3], image=True).image
    assert image is not None
    assert image.shape == (20, 96, 96, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, [o["pixels"] for o in observations])


def test_a_video_shows_what_the_environment_draws() -> None:
    env = make_env()
    env.visualization_width, env.visualization_height = 203, 384
    env.reset(seed=1)
    np.testing.assert_array_equal(render_frame(env), env.render())
    for action in builtin.load(1)[0].action[:60:6]:
        env.step(action)
        np.testing.assert_array_equal(render_frame(env), env.render())


def test_a_state_that_was_seen_can_be_returned_to() -> None:
    """From a free moment of an episode the rest replays, though the reset hides velocities."""
    start = (400.0, 60.0, 180.0, 300.0, 0.7)
    actions = np.linspace((400, 60), (150, 330), 40).astype(np.float32)
    whole = replay(start, actions)
    assert np.abs(whole.environment_state[-1] - whole.environment_state[0]).max() > 5
    np.testing.assert_allclose(whole.observation_state[0], start[:2], atol=1e-4)
    again = replay(start, actions)
    np.testing.assert_array_equal(whole.environment_state, again.environment_state)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((0, 2)), "one or more rows"),
        (np.zeros((3, 3)), "two finite numbers"),
        (np.full((3, 2), np.nan), "finite"),
    ],
)
def test_what_cannot_be_replayed_is_refused(action: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(0, action)


def test_impossible_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="outside the arena"):
        replay((-90.0, 0.0, 256.0, 256.0, 0.0), np.full((3, 2), 100.0))
