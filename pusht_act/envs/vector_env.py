"""gym-pusht environments that carry out a policy's actions a chunk at a time, in this process or in workers.

    policy looks -> actions [B, n, 2] -> each environment up to n steps -> B turns: what came of it, what is seen now

The environments are the same wherever they are, and so is every number. A worker owns a share of them, talks once a
chunk, and imports neither torch nor lerobot.
"""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

import gym_pusht  # noqa: F401  (registers the environment)
import numpy as np
from jaxtyping import Float32

from pusht_act.config.schema import EvalConfig
from pusht_act.envs.coverage import coverage_of_poses
from pusht_act.envs.episode import EnvSpec, StepResult, VideoRequest
from pusht_act.envs.gym_env import ChunkedEnv
from pusht_act.runtime.signals import block_signals
from pusht_act.runtime.system import cores

MIN_ENVS_PER_WORKER = 5
"""VectorEnv for which a worker is not worth its start: a second, in which one process carries out 20 episodes."""


class VectorEnv(Protocol):
    """VectorEnv side by side."""

    def reset(self, task: EnvSpec, seeds: Sequence[int], recordings: Sequence[VideoRequest | None]) -> list[StepResult]:
        """Start an episode a seed; what is recorded of one is there when it has ended."""

    def step_chunk(self, actions: Float32[np.ndarray, "B N 2"]) -> list[StepResult]:
        """Up to N steps of each, fewer where the episode ends; one that has ended stays as it is.

        Raises:
            OSError: a worker was killed, the environments are closed, or a recording cannot be written.
        """

    def close(self) -> None:
        """Give everything back; a `step_chunk` of another thread fails soon."""


@contextmanager
def make_vector_envs(config: EvalConfig, needed: bool = True) -> Iterator[list[VectorEnv]]:
    """Groups of environments in `config.workers` processes, which start while the caller goes on; 0 chooses the number.

    That is one a core, but each has at least `MIN_ENVS_PER_WORKER` environments of a batch: a small evaluation is
    over in this process before a worker has started. One process is this one, and so it is unless they are `needed`.
    For more than one batch there are two groups: one carries out its actions while the policy looks at the other.
    """
    batch = min(config.batch_size, config.n_episodes)
    workers = min(config.workers or min(cores(), batch // MIN_ENVS_PER_WORKER), batch)
    groups: list[VectorEnv] = [SyncVectorEnv()]
    if needed and workers > 1:
        sizes = [workers] if batch == config.n_episodes else [workers - workers // 2, workers // 2]
        groups = [SubprocVectorEnv(size) for size in sizes]
    try:
        yield groups
    finally:
        for group in groups:
            group.close()


class SyncVectorEnv:
    """VectorEnv in this process, one after the other."""

    def __init__(self) -> None:
        self._task: EnvSpec | None = None
        self._made: list[ChunkedEnv] = []
        self._used: list[ChunkedEnv] = []
        self._closed = False

    def reset(self, task: EnvSpec, seeds: Sequence[int], recordings: Sequence[VideoRequest | None]) -> list[StepResult]:  # noqa: D102
        if task != self._task:
            self._task, self._made = task, []
        self._made += [ChunkedEnv(task) for _ in range(len(seeds) - len(self._made))]
        self._used = self._made[: len(seeds)]
        return [env.reset(seed, recording) for env, seed, recording in zip(self._used, seeds, recordings, strict=True)]

    def step_chunk(self, actions: Float32[np.ndarray, "B N 2"]) -> list[StepResult]:  # noqa: D102
        if self._closed:
            raise OSError("the environments are closed")
        return [env.step_chunk(each) for env, each in zip(self._used, actions, strict=True)]

    def close(self) -> None:  # noqa: D102
        self._closed = True


class SubprocVectorEnv:
    """VectorEnv in `count` processes; environment i is in process i modulo `count`: recordings are shared out.

    Plain processes, since those of multiprocessing would run a caller's script again.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            serve = f"from pusht_act.envs.vector_env import serve; serve({theirs.fileno()})"
            command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {serve}"]
            with block_signals():
                self._processes.append(
                    subprocess.Popen(
                        command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                    )
                )
            self._pipes.append(ours)
            theirs.close()

    def reset(self, task: EnvSpec, seeds: Sequence[int], recordings: Sequence[VideoRequest | None]) -> list[StepResult]:  # noqa: D102
        n = len(self._pipes)
        self._count = len(seeds)
        return self._turns("reset", [(task, seeds[i::n], recordings[i::n]) for i in range(n)])

    def step_chunk(self, actions: Float32[np.ndarray, "B N 2"]) -> list[StepResult]:  # noqa: D102
        n = len(self._pipes)
        return self._turns("step_chunk", [(actions[i::n],) for i in range(n)])

    def _turns(self, method: str, arguments: list[tuple[Any, ...]]) -> list[StepResult]:
        """What `method` returns in each process, in the order of the environments."""
        try:
            for pipe, each in zip(self._pipes, arguments, strict=True):
                pipe.send((method, each))
            shares = [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise OSError(
                "a process of the evaluation was killed, perhaps for want of memory: give the command again with a "
                "smaller eval.workers (1: none), mode=resume if it was training"
            ) from error
        for share in shares:
            if isinstance(share, OSError):
                raise share
        n = len(shares)
        return [shares[i % n][i // n] for i in range(self._count)]

    def close(self) -> None:  # noqa: D102
        for process in self._processes:
            process.kill()  # it has nothing to lose
        for process in self._processes:
            process.wait()


def serve(pipe: int) -> None:
    """What a worker does: answer at the file descriptor `pipe` until its parent closes it, as a killed one does."""
    connection, here = Connection(pipe), SyncVectorEnv()
    coverage_of_poses(np.zeros((1, 3)))  # numba loads what it has compiled: half a second, while the parent is busy
    with suppress(EOFError, ConnectionError):
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(here, method)(*arguments)
            except OSError as error:  # PyAV's own do not come through a pipe
                answer = OSError(error.errno, error.strerror, error.filename)
            connection.send(answer)
