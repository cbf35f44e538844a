"""Seeded rollouts of a policy in gym-pusht: one record an episode, the rates with their interval, videos, a film strip.

Training and mode=eval call the same `evaluate`, so the same checkpoint and seeds give the same numbers in both.
"""

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from lerobot.envs.configs import PushtEnv
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.utils.io_utils import write_video
from tqdm import tqdm

from pusht_act.config import EvalConfig
from pusht_act.demos.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.demos.replay import advance, count_no_contacts, picture
from pusht_act.film_strip import film_strip
from pusht_act.policy import Processors, autocast
from pusht_act.statistics import wilson_interval

State = Float64[np.ndarray, " 7"]
"""Agent x, y, block x, y (px), block angle (rad), agent velocity x, y (px/s)."""


@dataclass
class Episode:
    """What came of one episode; `reward` is clip(coverage / 0.95, 0, 1) of every step."""

    episode_ix: int
    seed: int
    success: bool = False
    max_reward: float = 0.0
    sum_reward: float = 0.0
    coverage: float = 0.0
    """Share of the goal covered at the end."""
    steps: int = 0


@dataclass
class Rollout:
    """Episodes side by side, with the pictures of those that were asked for."""

    episodes: list[Episode]
    frames: list[list[UInt8[np.ndarray, "H W 3"]]] = field(default_factory=list)
    actions: list[Float32[np.ndarray, "B 2"]] = field(default_factory=list)
    """What the policy did at every step; rows of episodes that have ended go on but are not carried out."""
    decisions: list[list[State]] = field(default_factory=list)
    """By episode, the states in which the policy looked and chose its next actions."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's result."""

    episodes: list[Episode]
    seconds: float
    video_paths: list[Path] = field(default_factory=list)
    film_strip: Path | None = None
    decisions: list[list[State]] = field(default_factory=list)
    """As in `Rollout`."""

    @property
    def metrics(self) -> dict[str, float]:
        """LeRobot's names, and the 95 % interval of pc_success, in percent like it."""
        successes = sum(episode.success for episode in self.episodes)
        low, high = wilson_interval(successes, len(self.episodes))
        return {
            "pc_success": 100.0 * successes / len(self.episodes),
            "pc_success_low": 100.0 * low,
            "pc_success_high": 100.0 * high,
            "avg_max_reward": float(np.mean([episode.max_reward for episode in self.episodes])),
            "avg_sum_reward": float(np.mean([episode.sum_reward for episode in self.episodes])),
            "n_episodes": len(self.episodes),
        }

    @property
    def score(self) -> tuple[float, float]:
        """What checkpoints are compared by: success first, then how far the others came."""
        return self.metrics["pc_success"], self.metrics["avg_max_reward"]

    def __str__(self) -> str:
        m = self.metrics
        seeds = f"seeds {self.episodes[0].seed} to {self.episodes[-1].seed}"
        return (
            f"success {m['pc_success']:.1f} % (95 %: {m['pc_success_low']:.1f} to {m['pc_success_high']:.1f}), "
            f"mean max reward {m['avg_max_reward']:.3f} over {m['n_episodes']} episodes, {seeds}, {self.seconds:.1f} s"
        )


class Environments:
    """gym-pusht environments side by side, stepped in turn; a picture is only drawn when `observe` or `render` asks.

    Its own step draws an observation every time, which ACT looks at every n_action_steps, and measures the coverage by
    shapely. Here the physics are the same bit by bit, the coverage to 1e-12.
    """

    def __init__(self, env: PushtEnv, image_shape: tuple[int, ...] | None, count: int) -> None:
        kwargs = {**env.gym_kwargs, "obs_type": "state"}
        if image_shape is not None:
            kwargs |= {"observation_height": image_shape[1], "observation_width": image_shape[2]}
        self._obs_type = env.obs_type
        self._envs = [gymnasium.make(env.gym_id, disable_env_checker=True, **kwargs).unwrapped for _ in range(count)]

    def reset(self, seeds: list[int]) -> None:
        """Start an episode in each."""
        for env, seed in zip(self._envs, seeds, strict=True):
            env.reset(seed=seed)
            count_no_contacts(env)

    def step(self, i: int, action: Float32[np.ndarray, " 2"]) -> tuple[float, bool, float]:
        """(reward, success, coverage) of environment `i` after `action`."""
        env = self._envs[i]
        env._last_action = action  # drawn by render
        advance(env, *action.tolist())
        covered = float(coverage_of_poses(np.array([(*env.block.position, env.block.angle)]))[0])
        return min(covered / SUCCESS_COVERAGE, 1.0), covered > SUCCESS_COVERAGE, covered

    def observe(self) -> dict[str, np.ndarray]:
        """What `env.obs_type` gives, stacked over the environments."""
        observations = [self._observation(env) for env in self._envs]
        return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}

    def state(self, i: int) -> State:
        """The state of environment `i`, whatever it observes."""
        env = self._envs[i]
        return np.array((*env.agent.position, *env.block.position, env.block.angle, *env.agent.velocity))

    def render(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        """A picture for people of environment `i`."""
        frame: np.ndarray = self._envs[i].render()
        return frame

    def close(self) -> None:
        """Close them all."""
        for env in self._envs:
            env.close()

    def _observation(self, env: Any) -> dict[str, np.ndarray]:
        if self._obs_type == "pixels_agent_pos":
            return {"pixels": picture(env), "agent_pos": np.array(env.agent.position)}
        env.obs_type = self._obs_type
        try:
            observation: dict[str, np.ndarray] = env.get_obs()
            return observation
        finally:
            env.obs_type = "state"


@torch.inference_mode()
def rollout(
    policy: ACTPolicy,
    processors: Processors,
    envs: Environments,
    *,
    seeds: list[int],
    max_steps: int,
    n_recorded: int = 0,
    on_step: Callable[[int], None] = lambda _running: None,
) -> Rollout:
    """Run one episode a seed, all of them in step, until the last has ended.

    As in stock LeRobot the policy sees the whole batch each time, ended episodes included, so that an episode's
    numbers do not depend on when its neighbours end. `n_recorded` episodes keep a frame a step.
    """
    policy.eval()
    policy.reset()
    envs.reset(seeds)
    result = Rollout([Episode(i, seed) for i, seed in enumerate(seeds)], frames=[[] for _ in range(n_recorded)])
    result.decisions = [[] for _ in seeds]
    running = set(range(len(seeds)))
    for actions in _actions(policy, processors, envs, max_steps):
        if len(result.actions) % policy.config.n_action_steps == 0:
            for i in running:
                result.decisions[i].append(envs.state(i))
        result.actions.append(actions)
        for i in range(n_recorded):
            if i in running:
                result.frames[i].append(envs.render(i))
        for i in sorted(running):
            episode = result.episodes[i]
            reward, episode.success, episode.coverage = envs.step(i, actions[i])
            episode.steps += 1
            episode.sum_reward += reward
            episode.max_reward = max(episode.max_reward, reward)
            if episode.success or episode.steps == max_steps:
                running.remove(i)
                if i < n_recorded:
                    result.frames[i].append(envs.render(i))
        on_step(len(running))
        if not running:
            break
    return result


def _actions(
    policy: ACTPolicy, processors: Processors, envs: Environments, max_steps: int
) -> Iterator[Float32[np.ndarray, "B 2"]]:
    """The batch's actions, step by step; the policy looks once every n_action_steps."""
    period = policy.config.n_action_steps
    ensembling = policy.config.temporal_ensemble_coeff is not None  # LeRobot then has n_action_steps 1
    for step in range(max_steps):
        if step % period == 0:
            batch = processors.pre(preprocess_observation(envs.observe()))
            with autocast(policy):
                if ensembling:
                    chunk = policy.select_action(batch).unsqueeze(1)
                else:
                    chunk = policy.predict_action_chunk(batch)[:, :period]
            actions = processors.post(chunk.float()).cpu().numpy()
        yield actions[:, step % period]


def evaluate(
    policy: ACTPolicy,
    processors: Processors,
    env: PushtEnv,
    config: EvalConfig,
    *,
    directory: Path | None = None,
    description: str = "evaluating",
) -> Evaluation:
    """`config.n_episodes` episodes from seed `config.start_seed` on; with `directory`, everything is written there.

    Writes episodes.csv, metrics.json, episode-N.mp4 of the first n_videos and film_strip.png of the first.
    """
    start = time.perf_counter()
    count = min(config.batch_size, config.n_episodes)
    n_recorded = min(config.n_videos, config.n_episodes) if directory else 0
    image = next((f.shape for f in policy.config.image_features.values()), None)
    envs = Environments(env, image, count)
    episodes: list[Episode] = []
    frames: list[list[np.ndarray]] = []
    decisions: list[list[State]] = []
    was_training = policy.training
    try:
        with tqdm(total=config.n_episodes, desc=description, unit="episode", leave=False, disable=None) as progress:
            while len(episodes) < config.n_episodes:
                first = config.start_seed + len(episodes)
                done = len(episodes)
                part = rollout(
                    policy,
                    processors,
                    envs,
                    seeds=list(range(first, first + count)),
                    max_steps=env.episode_length,
                    n_recorded=max(0, min(n_recorded - len(frames), count)),
                    on_step=lambda running, done=done: _show(progress, done + count - running),  # type: ignore[misc]
                )
                frames += part.frames
                for episode in part.episodes:
                    episode.episode_ix += done
                # The last batch is filled up to its size: a smaller one would round differently.
                episodes += part.episodes[: config.n_episodes - done]
                decisions += part.decisions[: config.n_episodes - done]
    finally:
        envs.close()
        policy.train(was_training)
    seconds = time.perf_counter() - start
    evaluation = Evaluation(episodes, seconds, decisions=decisions)
    return evaluation if directory is None else _written(evaluation, directory, frames, env.fps)


def _show(progress: Any, done: int) -> None:
    progress.update(min(done, progress.total) - progress.n)


def _written(evaluation: Evaluation, directory: Path, frames: list[list[np.ndarray]], fps: int) -> Evaluation:
    """`evaluation` with the paths of what was written of it."""
    episodes = evaluation.episodes
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "episodes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(episodes[0])))
        writer.writeheader()
        writer.writerows(asdict(episode) for episode in episodes)
    videos = [directory / f"episode-{i}.mp4" for i in range(len(frames))]
    for path, pictures in zip(videos, frames, strict=True):
        write_video(path, pictures, fps)
    strip = directory / "film_strip.png" if frames else None
    if strip is not None:
        film_strip(frames[0], episodes[0].success, episodes[0].seed).save(strip)
    record = {**evaluation.metrics, "start_seed": episodes[0].seed, "eval_s": evaluation.seconds}
    (directory / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    return replace(evaluation, video_paths=videos, film_strip=strip)
