"""Evaluation: stock LeRobot's rollout, the same numbers in training and on their own, what is written."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lerobot.envs import make_env
from lerobot.envs.configs import PushtEnv
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import rollout as stock_rollout
from PIL import Image

import pusht_act
from pusht_act.config.schema import EvalConfig
from pusht_act.envs.film_strip import film_strip
from pusht_act.envs.vector_env import SyncVectorEnv
from pusht_act.evaluation.evaluate import evaluate
from pusht_act.evaluation.rollout import Actor, env_spec, rollout
from pusht_act.evaluation.stats import wilson_interval
from pusht_act.job import Result
from tests.helpers.policies import policy_for

Tiny = Callable[..., Result]


@pytest.mark.slow
@pytest.mark.parametrize("obs_type", ["pixels_agent_pos", "environment_state_agent_pos"])
@pytest.mark.parametrize("options", [{}, {"n_action_steps": 1, "temporal_ensemble_coeff": 0.01}])
def test_rollouts_are_stock_lerobots(obs_type: str, options: dict[str, Any]) -> None:
    """The same actions bit by bit, the same successes, and rewards to 1e-12, for the same weights and seeds."""
    env = PushtEnv(obs_type=obs_type, episode_length=25)
    policy, processors = policy_for(env, **options)
    seeds = [100_000, 100_001, 100_002]
    vector = make_env(env, n_envs=3, use_async_envs=False)["pusht"][0]
    identity = PolicyProcessorPipeline(steps=[])
    policy.eval()
    stock = stock_rollout(vector, policy, identity, identity, processors.pre, processors.post, seeds=seeds)
    ours = rollout(Actor(policy, processors), SyncVectorEnv(), env_spec(env, policy.config), seeds)
    assert np.array_equal(np.concatenate(ours.actions, axis=1)[:, :25], stock["action"].numpy())
    for i, episode in enumerate(ours.episodes):
        assert episode.steps == 25
        assert episode.max_reward == pytest.approx(stock["reward"][i].max().item(), abs=1e-12)
        assert episode.sum_reward == pytest.approx(stock["reward"][i].sum().item(), rel=1e-12)
        assert episode.success == stock["success"][i].any().item()
    assert len({episode.max_reward for episode in ours.episodes}) > 1


def test_success_ends_an_episode() -> None:
    """A policy that replays a demonstration solves its seed and stops there; its neighbour goes on."""
    from pusht_act.demos import builtin
    from pusht_act.demos.replay import replay

    env = PushtEnv(obs_type="environment_state_agent_pos", episode_length=300)
    policy, processors = policy_for(env, chunk_size=300, n_action_steps=300)
    demonstration = builtin.load(1)[0]
    assert isinstance(demonstration.start, int)
    length = len(demonstration.action)
    solved_at = int(np.argmax(replay(demonstration.start, demonstration.action).success)) + 1  # it goes on to 0.97
    actions = torch.full((2, 300, 2), 256.0)
    actions[0, :length] = torch.from_numpy(demonstration.action)

    class Replay:
        def __init__(self) -> None:
            self.config = policy.config

        def predict_action_chunk(self, batch: Any) -> torch.Tensor:
            return (actions - 250.0) / 100.0

        def eval(self) -> None: ...

        def reset(self) -> None: ...

    actor, spec = Actor(Replay(), processors), env_spec(env, policy.config)
    result = rollout(actor, SyncVectorEnv(), spec, [demonstration.start, 7])
    solved, other = result.episodes
    assert (solved.success, solved.steps, solved.max_reward) == (True, solved_at, 1.0)
    assert solved.coverage > 0.95
    assert (other.success, other.steps) == (False, 300)


def test_an_episodes_numbers_do_not_depend_on_how_many_are_asked_for() -> None:
    env = PushtEnv(obs_type="environment_state_agent_pos", episode_length=20)
    actor = Actor(*policy_for(env))
    config = EvalConfig(n_episodes=5, batch_size=2, start_seed=50, n_videos=0)
    five = evaluate(actor, [SyncVectorEnv()], env, config).episodes
    config.n_episodes = 3
    three = evaluate(actor, [SyncVectorEnv()], env, config).episodes
    assert five[:3] == three
    assert [episode.seed for episode in five] == [50, 51, 52, 53, 54]
    assert [episode.episode_ix for episode in five] == [0, 1, 2, 3, 4]


def test_mode_eval_repeats_the_numbers_of_training(tiny: Tiny) -> None:
    trained = tiny("eval_freq=4", "eval.start_seed=300", "eval.n_videos=1")
    run = trained.output_dir
    (folder,) = (run / "eval").iterdir()
    in_training = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ["mode=eval", f"checkpoint={run}", "eval.start_seed=300", "eval.n_episodes=2", "eval.batch_size=2"]
    command += ["eval.n_videos=1"]
    again = pusht_act.run(command)
    assert again.episodes == trained.episodes
    # Training's is the same evaluation, so that it is not run again, but on demand.
    assert again.output_dir == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == in_training
    again = pusht_act.run([*command, "overwrite=true"])
    assert again.episodes == trained.episodes
    assert (folder / "episodes.csv").read_bytes() == in_training["episodes.csv"]
    assert (folder / "metrics.json").read_bytes() != in_training["metrics.json"]
    assert again.metrics.items() <= trained.metrics.items()


def test_what_an_evaluation_writes(tiny: Tiny) -> None:
    run = tiny("steps=1").output_dir
    result = pusht_act.run(
        ["mode=eval", f"checkpoint={run}/checkpoints/last", "eval.n_episodes=3", "eval.batch_size=2", "eval.n_videos=2"]
    )
    folder = result.output_dir
    assert folder.parent == run / "eval"
    assert re.fullmatch("step-000001_seeds-200000-200002_[0-9a-f]{8}", folder.name)
    rows = list(csv.DictReader((folder / "episodes.csv").open()))
    assert [row["seed"] for row in rows] == ["200000", "200001", "200002"]
    assert set(rows[0]) == {"episode_ix", "seed", "success", "max_reward", "sum_reward", "coverage", "steps"}
    written = json.loads((folder / "metrics.json").read_text())
    assert {"pc_success", "avg_max_reward", "avg_sum_reward", "pc_success_low", "pc_success_high"} <= set(written)
    assert [path.name for path in result.video_paths] == ["episode-0.mp4", "episode-1.mp4"]
    with av.open(str(result.video_paths[1])) as video:
        assert sum(1 for _ in video.decode(video=0)) == 12 + 1, "a frame before each step and the last one"
    strip = Image.open(folder / "film_strip.png")
    assert strip.width > 4 * strip.height


@pytest.mark.slow
def test_overrides_of_an_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("steps=1", "env.episode_length=40").output_dir
    base = ["mode=eval", f"checkpoint={run}", "eval.n_episodes=2", "eval.batch_size=2", "eval.n_videos=1"]

    def strip(*overrides: str) -> bytes:
        return (pusht_act.run([*base, *overrides]).output_dir / "film_strip.png").read_bytes()

    plain = strip()
    assert plain == strip()
    assert plain != strip("policy.n_action_steps=1")
    assert plain != strip("eval.start_seed=5")
    nine = pusht_act.run([*base, "env.episode_length=9", f"output_dir={tmp_path / 'elsewhere'}"])
    assert all(episode.steps == 9 for episode in nine.episodes)
    assert nine.output_dir.parents[1] == tmp_path / "elsewhere"


@given(st.integers(1, 5000), st.data())
def test_wilson_interval_holds_the_rate_and_narrows(episodes: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, episodes))
    low, high = wilson_interval(successes, episodes)
    assert 0 <= low <= successes / episodes + 1e-12
    assert successes / episodes - 1e-12 <= high <= 1
    wider = wilson_interval(successes * 4, episodes * 4)
    assert wider[1] - wider[0] < high - low


def test_wilson_interval_of_a_textbook_case() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_film_strip_spans_the_episode() -> None:
    frames = [np.full((32, 32, 3), t, np.uint8) for t in range(50)]
    strip = np.asarray(film_strip(frames, True, 3, images=4, size=32))
    assert [strip[5, 36 * i + 5, 0] for i in range(4)] == [0, 16, 33, 49]
    assert film_strip(frames[:2], False, 3, images=8, size=32).width == 2 * 36 - 4
    assert film_strip(frames, True, None, images=4, size=32).tobytes() != strip.tobytes()
