"""Roll a policy out: one batch of observations, one chunk of actions for each environment, until all episodes end.

Of a chunk the first `policy.n_action_steps` are executed before the policy looks again, or each step's actions are
averaged over the chunks that hold one (`policy.temporal_ensemble_coeff`).
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float32
from lerobot.envs.utils import preprocess_observation

from pusht_act.config.lerobot import PushtEnv
from pusht_act.envs.episode import EnvSpec, EpisodeResult, StepResult, VideoRequest
from pusht_act.envs.vector_env import VectorEnv
from pusht_act.policy.act import Processors, autocast
from pusht_act.policy.lerobot import ACTConfig, ACTPolicy

# LeRobot's processors keep the batch that they are working on in themselves, so only one thread may be in them.
_INFERENCE_LOCK = threading.Lock()


@dataclass(frozen=True)
class Actor:
    """A policy with its processors: takes observations of environments, returns actions in pixels."""

    policy: ACTPolicy
    processors: Processors

    def predict_actions(self, results: list[StepResult]) -> Float32[np.ndarray, "B N 2"]:
        """Predict the next n_action_steps actions (px) from the observation of each environment."""
        observation = {key: np.stack([r.observation[key] for r in results]) for key in results[0].observation}
        with _INFERENCE_LOCK:
            batch = self.processors.pre(preprocess_observation(observation))
            with autocast(self.policy):
                # LeRobot's temporal ensembling is in select_action alone, and takes n_action_steps 1.
                if self.policy.config.temporal_ensemble_coeff is not None:
                    chunk = self.policy.select_action(batch).unsqueeze(1)
                else:
                    chunk = self.policy.predict_action_chunk(batch)[:, : self.policy.config.n_action_steps]
            actions: np.ndarray = self.processors.post(chunk.float()).cpu().numpy()
        return actions


@dataclass
class Rollout:
    """What a batch of episodes came to."""

    episodes: list[EpisodeResult] = field(default_factory=list)
    actions: list[Float32[np.ndarray, "B N 2"]] = field(default_factory=list)
    """The chunk predicted at each query, px; finished episodes ignore theirs."""


def env_spec(env: PushtEnv, policy: ACTConfig) -> EnvSpec:
    """Return the specification of `env`, with images of the size that `policy` takes."""
    kwargs = env.gym_kwargs
    # A policy takes images of the size that it was trained on, whatever the environment's default.
    for feature in policy.image_features.values():
        kwargs |= {"observation_height": feature.shape[1], "observation_width": feature.shape[2]}
    return EnvSpec(env.gym_id, kwargs, env.obs_type, env.episode_length)


@torch.inference_mode()
def rollout(
    actor: Actor,
    envs: VectorEnv,
    spec: EnvSpec,
    seeds: Sequence[int],
    videos: Sequence[VideoRequest] = (),
    on_step: Callable[[int], None] = lambda _running: None,
) -> Rollout:
    """Run one episode for each seed, all in step, until the last has ended.

    As in stock LeRobot the policy sees the whole batch at each query, finished episodes included, so that an episode's
    numbers do not depend on when its neighbours end.

    Args:
        actor: The policy, which is put into eval mode, and its processors.
        envs: Where the episodes run.
        spec: How to make the environments.
        seeds: Seeds of the resets.
        videos: Videos to record of the first episodes.
        on_step: Called after each chunk with the number of episodes still running; what it raises ends the rollout.
    """
    actor.policy.eval()
    actor.policy.reset()
    rolled_out = Rollout()
    coverage: list[list[float]] = [[] for _ in seeds]
    results = envs.reset(spec, seeds, [*videos, *[None] * (len(seeds) - len(videos))])
    # Finished environments return their last result again, and keep their row of the batch.
    while any(result.running for result in results):
        actions = actor.predict_actions(results)
        rolled_out.actions.append(actions)
        results = envs.step_chunk(actions)
        for each, result in zip(coverage, results, strict=True):
            each.extend(result.covered)
        on_step(sum(result.running for result in results))
    rolled_out.episodes = [
        replace(result.episode, episode_ix=i, coverage_by_step=tuple(coverage[i])) for i, result in enumerate(results)
    ]
    return rolled_out
