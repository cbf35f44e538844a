"""A small, untrained policy for an environment."""

from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import PushtEnv
from lerobot.policies.act.configuration_act import ACTConfig

from pusht_act.policy.act import make_policy, make_processors


def policy_for(env: PushtEnv, **options: Any) -> tuple[Any, Any]:
    """Return an ACT with random weights, which moves about in the arena, and its processors."""
    image = env.obs_type == "pixels_agent_pos"
    seen = (
        {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}
        if image
        else {"observation.environment_state": PolicyFeature(FeatureType.ENV, (16,))}
    )
    config = ACTConfig(
        device="cpu",
        input_features={**seen, "observation.state": PolicyFeature(FeatureType.STATE, (2,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        pretrained_backbone_weights=None,
        dim_model=32,
        n_heads=4,
        dim_feedforward=64,
        n_encoder_layers=1,
        **({"chunk_size": 12, "n_action_steps": 7} | options),
    )
    size = {"observation.image": (3, 1, 1), "observation.environment_state": (16,)}
    stats = {
        key: {"mean": torch.full(size.get(key, (2,)), 250.0 if key != "observation.image" else 0.5),
              "std": torch.full(size.get(key, (2,)), 100.0 if key != "observation.image" else 0.2)}
        for key in [*config.input_features, *config.output_features]
    }  # fmt: skip
    torch.manual_seed(0)
    return make_policy(config), make_processors(config, stats)
