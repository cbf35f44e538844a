"""One gym-pusht environment that executes a chunk of actions at a time."""

from dataclasses import replace

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from pusht_act.envs.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.envs.episode import EnvSpec, EpisodeResult, Observation, StepResult, VideoRequest
from pusht_act.envs.film_strip import film_strip
from pusht_act.envs.gym_pusht_internals import block_corners, set_last_action
from pusht_act.envs.physics import advance
from pusht_act.envs.pusht import disable_contact_counting, keypoints
from pusht_act.envs.rendering import render_frame, render_observation
from pusht_act.envs.video import VideoWriter


class ChunkedEnv:
    """A gym-pusht environment with bit-identical states and images, and its coverage to 1e-12.

    gym-pusht's own `step` renders an observation after every action, although a policy that executes chunks looks only
    at the one after each chunk, and measures the coverage by shapely, which is slow.
    """

    def __init__(self, spec: EnvSpec) -> None:
        self._spec = spec
        # obs_type="state", so that a reset renders nothing.
        kwargs = {**spec.kwargs, "obs_type": "state"}
        self._env = gymnasium.make(spec.gym_id, disable_env_checker=True, **kwargs).unwrapped

    def reset(self, seed: int, request: VideoRequest | None) -> StepResult:
        """Start an episode from the reset of `seed`; with a `request`, record a video of it."""
        self._env.reset(seed=seed)
        # gym-pusht's reset keeps the last action of the episode before, and `render` would draw it.
        set_last_action(self._env, None)
        disable_contact_counting(self._env)
        self._request = request
        self._video = None if request is None else VideoWriter(request.video, request.fps)
        self._frames: list[UInt8[np.ndarray, "H W 3"]] = []
        self._corners = block_corners(self._env)
        state = self._state()
        self._result = StepResult(EpisodeResult(0, seed, start=tuple(state[:5].tolist())), True, self._observe(state))
        return self._result

    def step_chunk(self, actions: Float32[np.ndarray, "N 2"]) -> StepResult:
        """Execute up to N `actions` (px), fewer where the episode ends; do nothing once it has ended."""
        if not self._result.running:
            return replace(self._result, covered=())
        episode, running, covered = self._result.episode, True, list[float]()
        actions = actions[: self._spec.max_steps - episode.steps]

        # A recorded episode advances by single actions, since a frame is rendered before each; any other by the chunk.
        for piece in [actions] if self._request is None else actions[:, None]:
            self._record_frame()
            covered += self._execute(piece, episode)
            running = not episode.success and episode.steps < self._spec.max_steps
            if not running:
                self._record_frame()
                self._finish_recording(episode)
                break

        # All environments of a batch reach the time limit at once, so nobody looks at that observation: do not render
        # it. After an early success the policy does look, together with the episodes that are still running.
        looked_at = episode.steps < self._spec.max_steps
        observation = self._observe(self._state()) if looked_at else self._result.observation
        self._result = StepResult(episode, running, observation, tuple(covered))
        return self._result

    def _execute(self, actions: Float32[np.ndarray, "N 2"], episode: EpisodeResult) -> list[float]:
        """Execute `actions`, update `episode` up to the first success, and return the coverage after each step of it.

        Actions after it still move the block, but the episode has ended by then.
        """
        set_last_action(self._env, actions[-1])
        coverage: list[float] = coverage_of_poses(advance(self._env, actions)[:, 2:]).tolist()
        first = episode.steps
        for covered in coverage:
            reward = min(covered / SUCCESS_COVERAGE, 1.0)
            episode.coverage, episode.success = covered, covered > SUCCESS_COVERAGE
            episode.steps += 1
            episode.sum_reward += reward
            episode.max_reward = max(episode.max_reward, reward)
            if episode.success:
                break
        return coverage[: episode.steps - first]

    def _record_frame(self) -> None:
        if self._request is None or self._video is None:
            return
        frame = render_frame(self._env)
        self._video.add(frame)
        if self._request.film_strip is not None:
            self._frames.append(frame)

    def _finish_recording(self, episode: EpisodeResult) -> None:
        if self._request is None or self._video is None:
            return
        self._video.close()
        if self._request.film_strip is not None:
            film_strip(self._frames, episode.success, episode.seed).save(self._request.film_strip)
        self._frames = []

    def _state(self) -> Float64[np.ndarray, " 7"]:
        """Return agent x, y, block x, y (px), block angle (rad), agent velocity x, y (px/s)."""
        env = self._env
        return np.array((*env.agent.position, *env.block.position, env.block.angle, *env.agent.velocity))

    def _observe(self, state: Float64[np.ndarray, " 7"]) -> Observation:
        """Return what PushTEnv.get_obs would."""
        if self._spec.obs_type == "pixels_agent_pos":
            return {"pixels": render_observation(self._env), "agent_pos": state[:2]}
        return {"environment_state": keypoints(self._corners, state[None, 2:5])[0], "agent_pos": state[:2]}
