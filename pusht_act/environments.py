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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from pusht_act.config import EvalConfig
from pusht_act.cores import cores
from pusht_act.demos.chipmunk import advance
from pusht_act.demos.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.demos.replay import corners_of, count_no_contacts, frame, keypoints, picture
from pusht_act.film_strip import film_strip
from pusht_act.signals import withheld
from pusht_act.video import Video

Observation = dict[str, np.ndarray]
"""As gym-pusht names it: agent_pos, and pixels or environment_state."""
State = Float64[np.ndarray, " 7"]
"""Agent x, y, block x, y (px), block angle (rad), agent velocity x, y (px/s)."""

FEW = 5
"""Environments for which a worker is not worth its start: a second, in which one process carries out 20 episodes."""


@dataclass(frozen=True)
class Task:
    """What the environments are, and when an episode is over."""

    gym_id: str
    kwargs: dict[str, Any]
    """Of `gymnasium.make`."""
    obs_type: str
    """What the policy sees: pixels_agent_pos or environment_state_agent_pos."""
    max_steps: int


@dataclass(frozen=True)
class Recording:
    """What is drawn of an episode: before each step, and after the last."""

    video: Path
    fps: int
    film_strip: Path | None = None


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


@dataclass(frozen=True)
class Turn:
    """How an environment stands when the policy looks again."""

    episode: Episode
    """So far."""
    running: bool
    state: State
    observation: Observation


class Environments(Protocol):
    """Environments side by side."""

    def reset(self, task: Task, seeds: Sequence[int], recordings: Sequence[Recording | None]) -> list[Turn]:
        """Start an episode a seed; what is recorded of one is there when it has ended."""

    def carry_out(self, actions: Float32[np.ndarray, "B N 2"]) -> list[Turn]:
        """Up to N steps of each, fewer where the episode ends; one that has ended stays as it is.

        Raises:
            OSError: a worker was killed, the environments are closed, or a recording cannot be written.
        """

    def close(self) -> None:
        """Give everything back; a `carry_out` of another thread fails soon."""


@contextmanager
def environments(config: EvalConfig, needed: bool = True) -> Iterator[list[Environments]]:
    """Groups of environments in `config.workers` processes, which start while the caller goes on; 0 chooses the number.

    That is one a core, but each has `FEW` environments of a batch at least: a small evaluation is over in this process
    before a worker has started. One process is this one, and so it is unless they are `needed`. For more than one batch
    there are two groups: one carries out its actions while the policy looks at the other.
    """
    batch = min(config.batch_size, config.n_episodes)
    workers = min(config.workers or min(cores(), batch // FEW), batch)
    groups: list[Environments] = [Here()]
    if needed and workers > 1:
        sizes = [workers] if batch == config.n_episodes else [workers - workers // 2, workers // 2]
        groups = [Workers(size) for size in sizes]
    try:
        yield groups
    finally:
        for group in groups:
            group.close()


class Here:
    """Environments in this process, one after the other."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._made: list[_Environment] = []
        self._used: list[_Environment] = []
        self._closed = False

    def reset(self, task: Task, seeds: Sequence[int], recordings: Sequence[Recording | None]) -> list[Turn]:  # noqa: D102
        if task != self._task:
            self._task, self._made = task, []
        self._made += [_Environment(task) for _ in range(len(seeds) - len(self._made))]
        self._used = self._made[: len(seeds)]
        return [env.reset(seed, recording) for env, seed, recording in zip(self._used, seeds, recordings, strict=True)]

    def carry_out(self, actions: Float32[np.ndarray, "B N 2"]) -> list[Turn]:  # noqa: D102
        if self._closed:
            raise OSError("the environments are closed")
        return [env.carry_out(each) for env, each in zip(self._used, actions, strict=True)]

    def close(self) -> None:  # noqa: D102
        self._closed = True


class _Environment:
    """One gym-pusht environment, its states and pictures the same bit by bit, its coverage to 1e-12.

    gym-pusht's own step draws an observation every time, which the policy looks at once a chunk, and measures the
    coverage by shapely.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        kwargs = {**task.kwargs, "obs_type": "state"}  # so that a reset draws nothing
        self._env = gymnasium.make(task.gym_id, disable_env_checker=True, **kwargs).unwrapped

    def reset(self, seed: int, recording: Recording | None) -> Turn:
        self._env.reset(seed=seed)
        self._env._last_action = None  # drawn by render, forgotten by no reset
        count_no_contacts(self._env)
        self._recording = recording
        self._video = None if recording is None else Video(recording.video, recording.fps)
        self._frames: list[UInt8[np.ndarray, "H W 3"]] = []
        self._corners = corners_of(self._env)
        state = self._state()
        self._turn = Turn(Episode(0, seed), True, state, self._observation(state))
        return self._turn

    def carry_out(self, actions: Float32[np.ndarray, "N 2"]) -> Turn:
        if not self._turn.running:
            return self._turn
        episode, running = self._turn.episode, True
        actions = actions[: self._task.max_steps - episode.steps]
        for stretch in [actions] if self._recording is None else actions[:, None]:  # which is drawn step by step
            self._draw()
            self._step(stretch, episode)
            running = not episode.success and episode.steps < self._task.max_steps
            if not running:
                self._draw()
                self._finish(episode)
                break
        # When the time is up it is so for all of them, and nobody looks any more.
        looked_at = episode.steps < self._task.max_steps
        state = self._state()
        observation = self._observation(state) if looked_at else self._turn.observation
        self._turn = Turn(episode, running, state, observation)
        return self._turn

    def _step(self, actions: Float32[np.ndarray, "N 2"], episode: Episode) -> None:
        """Carry out `actions`; those after a success move the block of an episode that has ended."""
        self._env._last_action = actions[-1]
        for covered in coverage_of_poses(advance(self._env, actions)[:, 2:]).tolist():
            reward = min(covered / SUCCESS_COVERAGE, 1.0)
            episode.coverage, episode.success = covered, covered > SUCCESS_COVERAGE
            episode.steps += 1
            episode.sum_reward += reward
            episode.max_reward = max(episode.max_reward, reward)
            if episode.success:
                break

    def _draw(self) -> None:
        if self._recording is None or self._video is None:
            return
        picture = frame(self._env)
        self._video.add(picture)
        if self._recording.film_strip is not None:
            self._frames.append(picture)

    def _finish(self, episode: Episode) -> None:
        if self._recording is None or self._video is None:
            return
        self._video.close()
        if self._recording.film_strip is not None:
            film_strip(self._frames, episode.success, episode.seed).save(self._recording.film_strip)
        self._frames = []

    def _state(self) -> State:
        env = self._env
        return np.array((*env.agent.position, *env.block.position, env.block.angle, *env.agent.velocity))

    def _observation(self, state: State) -> Observation:
        """As PushTEnv.get_obs."""
        if self._task.obs_type == "pixels_agent_pos":
            return {"pixels": picture(self._env), "agent_pos": state[:2]}
        return {"environment_state": keypoints(self._corners, state[None, 2:5])[0], "agent_pos": state[:2]}


class Workers:
    """Environments in `count` processes; environment i is in process i modulo `count`: recordings are shared out.

    Plain processes, since those of multiprocessing would run a caller's script again.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            serve = f"from pusht_act.environments import serve; serve({theirs.fileno()})"
            command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {serve}"]
            with withheld():
                self._processes.append(
                    subprocess.Popen(
                        command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                    )
                )
            self._pipes.append(ours)
            theirs.close()

    def reset(self, task: Task, seeds: Sequence[int], recordings: Sequence[Recording | None]) -> list[Turn]:  # noqa: D102
        n = len(self._pipes)
        self._count = len(seeds)
        return self._turns("reset", [(task, seeds[i::n], recordings[i::n]) for i in range(n)])

    def carry_out(self, actions: Float32[np.ndarray, "B N 2"]) -> list[Turn]:  # noqa: D102
        n = len(self._pipes)
        return self._turns("carry_out", [(actions[i::n],) for i in range(n)])

    def _turns(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Turn]:
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
    connection, here = Connection(pipe), Here()
    coverage_of_poses(np.zeros((1, 3)))  # numba loads what it has compiled: half a second, while the parent is busy
    with suppress(EOFError, ConnectionError):
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(here, method)(*arguments)
            except OSError as error:  # PyAV's own do not come through a pipe
                answer = OSError(error.errno, error.strerror, error.filename)
            connection.send(answer)
