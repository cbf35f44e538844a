"""Evaluate a policy: seeded episodes in batches, as many batches at once as there are groups of environments.

Training and mode=eval call the same `evaluate`, so the same checkpoint and seeds give the same numbers in both.
Episode i resets gym-pusht with seed eval.start_seed + i, as it resets itself (envs/gym_env.py).
"""

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from uuid import uuid4

from tqdm.auto import tqdm

from pusht_act.config.lerobot import PushtEnv
from pusht_act.config.schema import EvalConfig
from pusht_act.envs.episode import EnvSpec, EpisodeResult, VideoRequest
from pusht_act.envs.vector_env import VectorEnv
from pusht_act.evaluation.records import Evaluation, Record, read_episodes, video_requests, write_episodes
from pusht_act.evaluation.rollout import Actor, env_spec, rollout
from pusht_act.runtime.atomic import delete, new_dir, part_path, replace_dir
from pusht_act.runtime.errors import DiskError
from pusht_act.runtime.lock import NAME, Lock
from pusht_act.runtime.signals import signals

BATCH = "batch-"
"""Beginning of the name of a finished batch's folder, while the evaluation runs."""


def evaluate(
    actor: Actor,
    envs: Sequence[VectorEnv],
    env: PushtEnv,
    config: EvalConfig,
    *,
    record: Record | None = None,
    description: str | None = "evaluating",
) -> Evaluation:
    """Run `config.n_episodes` episodes with seeds from `config.start_seed` on.

    Args:
        actor: The policy and its processors; the policy's training mode is restored in the end.
        envs: Groups of environments; each runs one batch of `config.batch_size` episodes at a time.
        env: What the environments are.
        config: The `eval` section of the configuration.
        record: Where to store metrics, episodes, videos and film strip; None stores nothing. A stored evaluation is
            returned without running it. Of one that was interrupted the finished batches are not run again.
        description: Label of the progress bar; None shows no bar.

    Raises:
        OSError: A worker process was killed.
        DiskError: The disk is full, or `record` cannot be written for another reason.
    """
    try:
        return _evaluate(actor, envs, env, config, record, description)
    except OSError as error:
        if record is None or (reason := _disk_reason(error)) is None:
            raise
        raise DiskError(
            f"{record.directory} cannot be written ({reason}): make room or see that the folder can be written "
            "to; the batches that are finished are kept"
        ) from error


def _disk_reason(error: OSError) -> str | None:
    """Return the system's words for why a file cannot be written; None for another error.

    No variable of a frame in its traceback may hold the error: environments in a cycle crash as they are collected.
    """
    # The lock has a message of its own. Of a worker that was killed there is no number.
    cause = error.__cause__ if isinstance(error, DiskError) else error
    return cause.strerror if isinstance(cause, OSError) and cause.errno is not None else None


def _evaluate(
    actor: Actor,
    envs: Sequence[VectorEnv],
    env: PushtEnv,
    config: EvalConfig,
    record: Record | None,
    description: str | None,
) -> Evaluation:
    spec, start = env_spec(env, actor.policy.config), time.perf_counter()
    with _ProgressBar(config.n_episodes, description) as progress:
        if record is None:
            return Evaluation(_run_batches(actor, envs, spec, config, progress, None), time.perf_counter() - start)
        # Run what is not stored: all of it, or the first episodes again where only their videos are missing.
        stored = record.load()
        if stored is None or record.load(config.n_videos) is None:
            with _part(record) as part:
                requests = video_requests(part, min(config.n_videos, config.n_episodes), env.fps)
                finished = FinishedBatches(part, record, stored, requests)
                episodes = _run_batches(actor, envs, spec, config, progress, finished)
                _store(record, Evaluation(episodes, time.perf_counter() - start), part, stored)
    # Read the result back, so that it is the same object as a later call's, which finds it stored.
    record.append()
    result = replace(record, overwrite=False).load(config.n_videos)
    assert result is not None, "it was just written"
    return result


@dataclass(frozen=True)
class FinishedBatches:
    """The batches that need not be run: those of an interrupted evaluation, and of a stored one that lacks videos."""

    part: Path
    record: Record
    stored: Evaluation | None
    requests: list[VideoRequest]
    """The videos to record of the first episodes, in `part`."""

    def load(self, first: int, count: int, videos: Sequence[VideoRequest]) -> list[EpisodeResult] | None:
        """Return the `count` episodes from number `first` on, None if they are to be run, perhaps for `videos`."""
        if self.stored is not None and all((self.record.directory / each.video.name).exists() for each in videos):
            return self.stored.episodes[first : first + count]
        # A batch has its folder when it is finished, and so are its videos.
        if not self._folder(first).is_dir() or not all(request.video.exists() for request in videos):
            return None
        return read_episodes(self._folder(first))

    def save(self, first: int, episodes: list[EpisodeResult]) -> None:
        """Keep the batch that begins with number `first` until the evaluation is stored."""
        with new_dir(self._folder(first)) as folder:
            write_episodes(episodes, folder)

    def _folder(self, first: int) -> Path:
        return self.part / f"{BATCH}{first:06d}"


@contextmanager
def _part(record: Record) -> Iterator[Path]:
    """Yield the folder to write an evaluation into, with the batches that an interrupted one has left there.

    If another process runs the same evaluation, this one has a folder of its own.
    """
    # Two processes never write into the same folder, but both may finish: their results are the same.
    part = part_path(record.directory)
    try:
        lock = Lock(part, "eval")
    except FileExistsError:
        part = part_path(record.directory.with_name(f"{record.directory.name}.{uuid4().hex}"))
        lock = Lock(part, "eval")
    keeps = False
    try:
        # overwrite=true repeats the batches, too.
        if record.overwrite:
            for folder in part.glob(f"{BATCH}*"):
                delete(folder)
        yield part
    except BaseException:
        keeps = part == part_path(record.directory) and any(part.glob(f"{BATCH}*"))
        raise
    finally:
        if not keeps:
            shutil.rmtree(part, ignore_errors=True)
        lock.release()


def _store(record: Record, evaluation: Evaluation, part: Path, stored: Evaluation | None) -> None:
    """Rename `part` to the record's folder, or move the videos that a `stored` evaluation lacks there."""
    if stored is not None:
        for path in (*part.glob("*.mp4"), *part.glob("*.png")):
            path.replace(record.directory / path.name)
        return
    record.write(evaluation, part)
    for folder in part.glob(f"{BATCH}*"):
        delete(folder)
    # Another process may have stored the same evaluation meanwhile.
    if record.overwrite or not record.directory.exists():
        replace_dir(part, record.directory)
        (record.directory / NAME).unlink(missing_ok=True)


def _run_batches(
    actor: Actor,
    envs: Sequence[VectorEnv],
    spec: EnvSpec,
    config: EvalConfig,
    progress: "_ProgressBar",
    finished: FinishedBatches | None,
) -> list[EpisodeResult]:
    batch_size = min(config.batch_size, config.n_episodes)

    # LeRobot's temporal ensembler keeps its state in the policy, so it serves one batch at a time.
    groups = envs[:1] if actor.policy.config.temporal_ensemble_coeff is not None else envs
    free: SimpleQueue[VectorEnv] = SimpleQueue()
    for group in groups:
        free.put(group)
    was_training, cancelled = actor.policy.training, threading.Event()

    def run_batch(first: int) -> list[EpisodeResult]:
        """Run the episodes from number `first` on, in a group of environments that is free."""
        requests = finished.requests[first : first + batch_size] if finished is not None else []
        if finished is not None and (episodes := finished.load(first, batch_size, requests)) is not None:
            progress.update(first, batch_size)
            return episodes

        def on_step(running: int) -> None:
            if cancelled.is_set():
                raise CancelledError
            progress.update(first, batch_size - running)

        group, seed = free.get(), config.start_seed + first
        try:
            episodes = rollout(actor, group, spec, range(seed, seed + batch_size), requests, on_step).episodes
        finally:
            free.put(group)
        if finished is not None:
            finished.save(first, episodes)
        return episodes

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
    episodes = [episode for batch in rollouts for episode in batch]
    return [replace(episode, episode_ix=i) for i, episode in enumerate(episodes[: config.n_episodes])]


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
