"""One gym-pusht environment that carries out a chunk of actions at a time."""

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
from jaxtyping import Float32, UInt8

from pusht_act.envs.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.envs.episode import EnvSpec, EpisodeResult, Observation, State, StepResult, VideoRequest
from pusht_act.envs.film_strip import film_strip
from pusht_act.envs.physics import advance
from pusht_act.envs.pusht import block_corners, disable_contact_counting, keypoints
from pusht_act.envs.rendering import render_frame, render_observation
from pusht_act.envs.video import Video


class ChunkedEnv:
    """One gym-pusht environment, its states and pictures the same bit by bit, its coverage to 1e-12.

    gym-pusht's own step draws an observation every time, which the policy looks at once a chunk, and measures the
    coverage by shapely.
    """

    def __init__(self, task: EnvSpec) -> None:
        self._task = task
        kwargs = {**task.kwargs, "obs_type": "state"}  # so that a reset draws nothing
        self._env = gymnasium.make(task.gym_id, disable_env_checker=True, **kwargs).unwrapped

    def reset(self, seed: int, recording: VideoRequest | None) -> StepResult:
        """Start an episode from reset `seed`."""
        self._env.reset(seed=seed)
        self._env._last_action = None  # drawn by render, forgotten by no reset
        disable_contact_counting(self._env)
        self._recording = recording
        self._video = None if recording is None else Video(recording.video, recording.fps)
        self._frames: list[UInt8[np.ndarray, "H W 3"]] = []
        self._corners = block_corners(self._env)
        state = self._state()
        self._turn = StepResult(EpisodeResult(0, seed), True, state, self._observation(state))
        return self._turn

    def step_chunk(self, actions: Float32[np.ndarray, "N 2"]) -> StepResult:
        """Carry out up to N `actions` (px), fewer where the episode ends."""
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
        self._turn = StepResult(episode, running, state, observation)
        return self._turn

    def _step(self, actions: Float32[np.ndarray, "N 2"], episode: EpisodeResult) -> None:
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
        render_observation = render_frame(self._env)
        self._video.add(render_observation)
        if self._recording.film_strip is not None:
            self._frames.append(render_observation)

    def _finish(self, episode: EpisodeResult) -> None:
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
            return {"pixels": render_observation(self._env), "agent_pos": state[:2]}
        return {"environment_state": keypoints(self._corners, state[None, 2:5])[0], "agent_pos": state[:2]}
