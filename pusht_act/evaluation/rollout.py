"""Roll a policy out: episodes side by side, one batch of observations a query."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float32
from lerobot.envs.configs import PushtEnv
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy

from pusht_act.envs.episode import EnvSpec, EpisodeResult, StepResult, VideoRequest
from pusht_act.envs.vector_env import VectorEnv
from pusht_act.policy.act import Processors, autocast


@dataclass
class Rollout:
    """Episodes side by side."""

    episodes: list[EpisodeResult] = field(default_factory=list)
    actions: list[Float32[np.ndarray, "B N 2"]] = field(default_factory=list)
    """What the policy chose each time; an episode that has ended carries none of it out."""


def env_spec(env: PushtEnv, policy: ACTConfig) -> EnvSpec:
    """`env` as its environments are made, with pictures of the size that `policy` takes."""
    kwargs = env.gym_kwargs
    for feature in policy.image_features.values():
        kwargs |= {"observation_height": feature.shape[1], "observation_width": feature.shape[2]}
    return EnvSpec(env.gym_id, kwargs, env.obs_type, env.episode_length)


_INFERENCE_LOCK = threading.Lock()
"""Held while a policy looks: LeRobot's processors keep the batch at hand in themselves."""


@torch.inference_mode()
def rollout(
    policy: ACTPolicy,
    processors: Processors,
    envs: VectorEnv,
    task: EnvSpec,
    *,
    seeds: Sequence[int],
    recordings: Sequence[VideoRequest] = (),
    on_step: Callable[[int], None] = lambda _running: None,
) -> Rollout:
    """Run one episode a seed, all of them in step, until the last has ended; the first have `recordings`.

    As in stock LeRobot the policy sees the whole batch each time, ended episodes included, so that an episode's
    numbers do not depend on when its neighbours end.
    """
    policy.eval()
    policy.reset()
    result = Rollout()
    turns = envs.reset(task, seeds, [*recordings, *[None] * (len(seeds) - len(recordings))])
    while any(turn.running for turn in turns):
        actions = _predict_actions(policy, processors, turns)
        result.actions.append(actions)
        turns = envs.step_chunk(actions)
        on_step(sum(turn.running for turn in turns))
    result.episodes = [replace(turn.episode, episode_ix=i) for i, turn in enumerate(turns)]
    return result


def _predict_actions(
    policy: ACTPolicy, processors: Processors, turns: list[StepResult]
) -> Float32[np.ndarray, "B N 2"]:
    """The next n_action_steps actions of each, in px."""
    seen = {key: np.stack([turn.observation[key] for turn in turns]) for key in turns[0].observation}
    with _INFERENCE_LOCK:
        batch = processors.pre(preprocess_observation(seen))
        with autocast(policy):
            if policy.config.temporal_ensemble_coeff is not None:  # LeRobot then has n_action_steps 1
                chunk = policy.select_action(batch).unsqueeze(1)
            else:
                chunk = policy.predict_action_chunk(batch)[:, : policy.config.n_action_steps]
        actions: np.ndarray = processors.post(chunk.float()).cpu().numpy()
    return actions
