"""Seeded rollouts of a policy in gym-pusht: one record an episode, the rates with their interval, videos, a film strip.

Training and mode=eval call the same `evaluate`, so the same checkpoint and seeds give the same numbers in both.
"""

import csv
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from lerobot.envs.configs import PushtEnv
from lerobot.policies.act.modeling_act import ACTPolicy
from tqdm import tqdm

from pusht_act.config.schema import EvalConfig
from pusht_act.envs.episode import EpisodeResult, VideoRequest
from pusht_act.envs.vector_env import VectorEnv
from pusht_act.evaluation.rollout import Rollout, env_spec, rollout
from pusht_act.evaluation.stats import wilson_interval
from pusht_act.policy.act import Processors
from pusht_act.runtime.atomic import new_dir
from pusht_act.runtime.signals import submit_uninterrupted, wait_interruptible


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's result."""

    episodes: list[EpisodeResult]
    seconds: float
    video_paths: list[Path] = field(default_factory=list)
    film_strip: Path | None = None

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


def evaluate(
    policy: ACTPolicy,
    processors: Processors,
    envs: Sequence[VectorEnv],
    env: PushtEnv,
    config: EvalConfig,
    *,
    directory: Path | None = None,
    description: str | None = "evaluating",
) -> Evaluation:
    """`config.n_episodes` episodes from seed `config.start_seed` on; with `directory`, everything is written there.

    Writes episodes.csv, metrics.json, episode-N.mp4 of the first n_videos and film_strip.png of the first; all of it,
    in the place of what was there, or nothing. A bar shows the progress unless `description` is None.

    Raises:
        OSError: a process of `envs` was killed, or the disk is full.
    """
    if directory is None:
        return _evaluated(policy, processors, envs, env, config, [], description)
    with new_dir(directory) as part:
        recordings = _recordings(part, min(config.n_videos, config.n_episodes), env.fps)
        evaluation = _evaluated(policy, processors, envs, env, config, recordings, description)
        _write(evaluation, part)
    written = _recordings(directory, len(recordings), env.fps)
    return replace(
        evaluation, video_paths=[each.video for each in written], film_strip=written[0].film_strip if written else None
    )


def _recordings(directory: Path, count: int, fps: int) -> list[VideoRequest]:
    return [
        VideoRequest(directory / f"episode-{i}.mp4", fps, directory / "film_strip.png" if i == 0 else None)
        for i in range(count)
    ]


def _evaluated(
    policy: ACTPolicy,
    processors: Processors,
    envs: Sequence[VectorEnv],
    env: PushtEnv,
    config: EvalConfig,
    recordings: list[VideoRequest],
    description: str | None,
) -> Evaluation:
    """Batch after batch, as many at once as there are groups of environments."""
    start = time.perf_counter()
    task = env_spec(env, policy.config)
    count = min(config.batch_size, config.n_episodes)
    # LeRobot's ensembler is the policy's own, for one batch at a time.
    groups = envs[:1] if policy.config.temporal_ensemble_coeff is not None else envs
    free: SimpleQueue[VectorEnv] = SimpleQueue()
    for group in groups:
        free.put(group)
    was_training, broken_off = policy.training, threading.Event()

    def batch(done: int) -> Rollout:
        def on_step(running: int) -> None:
            if broken_off.is_set():
                raise CancelledError
            progress.show(done, count - running)

        group, first = free.get(), config.start_seed + done
        try:
            return rollout(
                policy, processors, group, task,
                seeds=range(first, first + count), recordings=recordings[done : done + count], on_step=on_step,
            )  # fmt: skip
        finally:
            free.put(group)

    with _Progress(config.n_episodes, description) as progress, ThreadPoolExecutor(len(groups)) as threads:
        try:
            starts = range(0, config.n_episodes, count)
            if len(groups) == 1:  # here, where a signal breaks it off at once
                parts = [batch(first) for first in starts]
            else:
                futures = [submit_uninterrupted(threads, batch, first) for first in starts]
                wait_interruptible(*futures)
                parts = [future.result() for future in futures if future.done()]
        except BaseException:
            broken_off.set()
            threads.shutdown(wait=False, cancel_futures=True)  # those that have not begun
            raise
        finally:
            policy.train(was_training)
    # The last batch is filled up to its size: a smaller one would round differently.
    n = config.n_episodes
    episodes = [replace(each, episode_ix=i) for i, each in enumerate([e for p in parts for e in p.episodes][:n])]
    return Evaluation(episodes, time.perf_counter() - start)


class _Progress:
    """A bar of the episodes that have ended, in batches side by side; none if `description` is None."""

    def __init__(self, total: int, description: str | None) -> None:
        hidden = True if description is None else None
        self._bar = tqdm(total=total, desc=description, unit="episode", leave=False, disable=hidden)
        self._ended: dict[int, int] = {}
        self._lock = threading.Lock()

    def show(self, batch: int, ended: int) -> None:
        """So many of `batch` have ended."""
        with self._lock:
            self._ended[batch] = ended
            self._bar.update(min(sum(self._ended.values()), self._bar.total) - self._bar.n)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _write(evaluation: Evaluation, directory: Path) -> None:
    episodes = evaluation.episodes
    with (directory / "episodes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(episodes[0])))
        writer.writeheader()
        writer.writerows(asdict(episode) for episode in episodes)
    record = {**evaluation.metrics, "start_seed": episodes[0].seed, "eval_s": evaluation.seconds}
    (directory / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
