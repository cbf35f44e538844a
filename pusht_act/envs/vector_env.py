"""Step many gym-pusht environments by chunks of actions, in this process or in worker processes.

    actions [B, N, 2] -> each environment executes up to N of them -> B step results, each with the next observation

Results are bit-identical wherever the environments are. A worker owns some of them, answers once a chunk, and imports
neither torch nor lerobot.
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
from pusht_act.envs.physics import advance
from pusht_act.envs.pusht import make_env
from pusht_act.runtime.signals import signals
from pusht_act.runtime.system import cores

# A worker takes a second to start, in which one process finishes 20 episodes.
MIN_ENVS_PER_WORKER = 5
"""With fewer environments a worker is not worth its start."""


class VectorEnv(Protocol):
    """Environments that are reset and stepped together."""

    def reset(self, spec: EnvSpec, seeds: Sequence[int], videos: Sequence[VideoRequest | None]) -> list[StepResult]:
        """Start one episode for each seed.

        Args:
            spec: How to make the environments.
            seeds: Seeds of the resets; as many environments are made as there are seeds.
            videos: The video to record of each episode, or None; it is complete when the episode has ended.
        """

    def step_chunk(self, actions: Float32[np.ndarray, "B N 2"]) -> list[StepResult]:
        """Execute up to N actions (px) in each environment, fewer where the episode ends.

        An environment whose episode has ended stays as it is.

        Raises:
            OSError: A worker was killed, the environments are closed, or a video cannot be written.
        """

    def close(self) -> None:
        """Release all resources; a `step_chunk` in another thread soon fails."""


@contextmanager
def make_vector_envs(config: EvalConfig, needed: bool = True) -> Iterator[list[VectorEnv]]:
    """Make the environments of an evaluation and close them in the end.

    Workers start in the background. An evaluation of one batch gets one vector environment. For more batches the
    workers are split into two: one steps while the policy infers the actions of the other.

    Args:
        config: `workers` is the number of processes. 0 takes one for each core, but at least `MIN_ENVS_PER_WORKER`
            environments of a batch for each, so that a small evaluation is not delayed by their start.
        needed: False makes one environment in this process and starts no worker.
    """
    batch = min(config.batch_size, config.n_episodes)
    workers = min(config.workers or min(cores(), batch // MIN_ENVS_PER_WORKER), batch)
    groups: list[VectorEnv] = [SyncVectorEnv()]
    # A single worker would do no more than this process does.
    if needed and workers > 1:
        sizes = [workers] if batch == config.n_episodes else [workers - workers // 2, workers // 2]
        groups = [SubprocVectorEnv(size) for size in sizes]
    elif needed:
        # A signal in the middle of it would leave half an object of llvmlite's, which prints a traceback when it goes.
        with signals.defer("loading compiled code first"):
            load_compiled_code()
    try:
        yield groups
    finally:
        for group in groups:
            group.close()


class SyncVectorEnv:
    """Environments in this process, stepped one after the other."""

    def __init__(self) -> None:
        self._spec: EnvSpec | None = None
        self._pool: list[ChunkedEnv] = []
        self._envs: list[ChunkedEnv] = []
        self._closed = False

    def reset(self, spec: EnvSpec, seeds: Sequence[int], videos: Sequence[VideoRequest | None]) -> list[StepResult]:  # noqa: D102
        # Environments are kept from batch to batch as long as the specification is the same.
        if spec != self._spec:
            self._spec, self._pool = spec, []
        self._pool += [ChunkedEnv(spec) for _ in range(len(seeds) - len(self._pool))]
        self._envs = self._pool[: len(seeds)]
        return [env.reset(seed, video) for env, seed, video in zip(self._envs, seeds, videos, strict=True)]

    def step_chunk(self, actions: Float32[np.ndarray, "B N 2"]) -> list[StepResult]:  # noqa: D102
        if self._closed:
            raise OSError("the environments are closed")
        return [env.step_chunk(chunk) for env, chunk in zip(self._envs, actions, strict=True)]

    def close(self) -> None:  # noqa: D102
        self._closed = True


class SubprocVectorEnv:
    """Environments in `count` worker processes.

    Environment i is in worker i modulo `count`, so that the first episodes, which are recorded, are spread over all.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            # Not multiprocessing.Process, which would import the caller's main script again.
            code = f"from pusht_act.envs.vector_env import run_worker; run_worker({theirs.fileno()})"
            command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]
            # The worker inherits the blocked signals: Ctrl-C and SIGTERM are for this process alone.
            with signals.block():
                self._processes.append(
                    subprocess.Popen(
                        command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                    )
                )
            self._pipes.append(ours)
            theirs.close()

    def reset(self, spec: EnvSpec, seeds: Sequence[int], videos: Sequence[VideoRequest | None]) -> list[StepResult]:  # noqa: D102
        n = len(self._pipes)
        self._count = len(seeds)
        return self._call_workers("reset", [(spec, seeds[i::n], videos[i::n]) for i in range(n)])

    def step_chunk(self, actions: Float32[np.ndarray, "B N 2"]) -> list[StepResult]:  # noqa: D102
        n = len(self._pipes)
        return self._call_workers("step_chunk", [(actions[i::n],) for i in range(n)])

    def _call_workers(self, method: str, arguments: list[tuple[Any, ...]]) -> list[StepResult]:
        """Call `method` of each worker with its `arguments` and return the results in the environments' order."""
        try:
            for pipe, values in zip(self._pipes, arguments, strict=True):
                pipe.send((method, values))
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise OSError(
                "a worker process of the evaluation was killed, perhaps for lack of memory: give the command again "
                "with a smaller eval.workers (1 starts none), and with mode=resume if it was training"
            ) from error

        # Raised only now that every worker has answered: an answer left in its pipe would be taken for the next one.
        for answer in answers:
            if isinstance(answer, OSError):
                raise answer
        n = len(answers)
        return [answers[i % n][i // n] for i in range(self._count)]

    def close(self) -> None:  # noqa: D102
        # Workers hold nothing that would be lost, so there is no need to ask them.
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def load_compiled_code() -> None:
    """Load what numba has compiled for an environment, which takes half a second."""
    env = make_env()
    env.reset(seed=0)
    coverage_of_poses(advance(env, np.zeros((1, 2), np.float32))[:, 2:])


def run_worker(pipe: int) -> None:
    """Serve a `SyncVectorEnv` until the parent closes the pipe or is killed.

    Args:
        pipe: File descriptor of this worker's end of the pipe.
    """
    connection, envs = Connection(pipe), SyncVectorEnv()
    # Now, while the parent imports torch.
    load_compiled_code()
    with suppress(EOFError, ConnectionError):
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(envs, method)(*arguments)
            except OSError as error:
                # PyAV's subclasses of OSError cannot be pickled.
                answer = OSError(error.errno, error.strerror, error.filename)
            connection.send(answer)
