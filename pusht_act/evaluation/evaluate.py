"""Evaluate a policy: seeded episodes in batches, as many batches at once as there are groups of environments.

Training and mode=eval call the same `evaluate`, so the same checkpoint and seeds give the same numbers in both.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from pusht_act.config.lerobot import PushtEnv
from pusht_act.config.schema import EvalConfig
from pusht_act.envs.episode import EnvSpec, EpisodeResult, VideoRequest
from pusht_act.envs.vector_env import VectorEnv
from pusht_act.evaluation.records import Evaluation, video_requests, write_records
from pusht_act.evaluation.rollout import Actor, Rollout, env_spec, rollout
from pusht_act.runtime.atomic import new_dir
from pusht_act.runtime.signals import signals


def evaluate(
    actor: Actor,
    envs: Sequence[VectorEnv],
    env: PushtEnv,
    config: EvalConfig,
    *,
    directory: Path | None = None,
    description: str | None = "evaluating",
) -> Evaluation:
    """Run `config.n_episodes` episodes with seeds from `config.start_seed` on.

    Args:
        actor: The policy and its processors; the policy's training mode is restored in the end.
        envs: Groups of environments; each runs one batch of `config.batch_size` episodes at a time.
        env: What the environments are.
        config: The `eval` section of the configuration.
        directory: Where to write metrics, episodes, videos and film strip (see `records`), in place of what was there.
            Either all of it is written or nothing; None writes nothing.
        description: Label of the progress bar; None shows no bar.

    Raises:
        OSError: A worker process was killed, or the disk is full.
    """
    spec = env_spec(env, actor.policy.config)
    with _ProgressBar(config.n_episodes, description) as progress:
        if directory is None:
            return _run_batches(actor, envs, spec, config, [], progress)
        # Readers never see half an evaluation.
        with new_dir(directory) as part:
            requests = video_requests(part, min(config.n_videos, config.n_episodes), env.fps)
            evaluation = _run_batches(actor, envs, spec, config, requests, progress)
            write_records(evaluation, part)
    videos = video_requests(directory, len(requests), env.fps)
    return replace(
        evaluation,
        video_paths=[request.video for request in videos],
        film_strip=videos[0].film_strip if videos else None,
    )


def _run_batches(
    actor: Actor,
    envs: Sequence[VectorEnv],
    spec: EnvSpec,
    config: EvalConfig,
    videos: list[VideoRequest],
    progress: "_ProgressBar",
) -> Evaluation:
    start = time.perf_counter()
    batch_size = min(config.batch_size, config.n_episodes)

    # LeRobot's temporal ensembler keeps its state in the policy, so it serves one batch at a time.
    groups = envs[:1] if actor.policy.config.temporal_ensemble_coeff is not None else envs
    free: SimpleQueue[VectorEnv] = SimpleQueue()
    for group in groups:
        free.put(group)
    was_training, cancelled = actor.policy.training, threading.Event()

    def run_batch(first: int) -> Rollout:
        """Run the episodes from number `first` on, in a group of environments that is free."""

        def on_step(running: int) -> None:
            if cancelled.is_set():
                raise CancelledError
            progress.update(first, batch_size - running)

        group, seed = free.get(), config.start_seed + first
        try:
            seeds, requests = range(seed, seed + batch_size), videos[first : first + batch_size]
            return rollout(actor, group, spec, seeds, requests, on_step)
        finally:
            free.put(group)

    # The last batch is filled up to full size, since a smaller batch would round differently; the episodes beyond
    # n_episodes are dropped below.
    firsts = range(0, config.n_episodes, batch_size)
    with ThreadPoolExecutor(len(groups)) as threads:
        try:
            if len(groups) == 1:
                # In this thread, where a signal interrupts it at once.
                rollouts = [run_batch(first) for first in firsts]
            else:
                futures = [signals.submit(threads, run_batch, first) for first in firsts]
                signals.wait(*futures)
                rollouts = [future.result() for future in futures if future.done()]
        except BaseException:
            # Batches that run stop at their next step; those that have not started are dropped.
            cancelled.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            actor.policy.train(was_training)
    episodes: list[EpisodeResult] = [episode for part in rollouts for episode in part.episodes]
    numbered = [replace(episode, episode_ix=i) for i, episode in enumerate(episodes[: config.n_episodes])]
    return Evaluation(numbered, time.perf_counter() - start)


class _ProgressBar:
    """Show how many episodes have ended, in all batches together.

    Args:
        total: Number of episodes.
        description: Label of the bar; None shows no bar, otherwise it is shown where there is a terminal.
    """

    def __init__(self, total: int, description: str | None) -> None:
        hidden = True if description is None else None
        self._bar = tqdm(total=total, desc=description, unit="episode", leave=False, disable=hidden)
        self._ended: dict[int, int] = {}
        self._lock = threading.Lock()

    def update(self, batch: int, ended: int) -> None:
        """Record that `ended` episodes of `batch` have ended."""
        with self._lock:
            self._ended[batch] = ended
            # The last batch may have more episodes than were asked for.
            self._bar.update(min(sum(self._ended.values()), self._bar.total) - self._bar.n)

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
