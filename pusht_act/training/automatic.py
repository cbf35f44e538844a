"""Decide what a configuration leaves open, once, so that the run, its checkpoints and its logs say what was chosen.

policy.device=auto is the exception: each start takes what its machine has (config/lerobot.py, resolve_device).
"""

from dataclasses import replace
from pathlib import Path

import torch

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.config.lerobot import resolve_device
from pusht_act.config.schema import AUTO, Config
from pusht_act.policy.backbone_weights import available_weights
from pusht_act.policy.torch_internals import cpu_has_bf16


def resolve_automatic(config: Config, start: Checkpoint | None) -> Config:
    """Return `config` with its automatic values replaced by what they come to on this machine.

    Args:
        config: the job's.
        start: the checkpoint that it resumes.
    """
    policy, train = dict(config.policy), config.train
    if start is None and (pretrained := policy.get("pretrained_path")):
        start = Checkpoint(Path(pretrained))
    has_backbone = config.env.get("obs_type", "pixels_agent_pos") == "pixels_agent_pos"
    if policy.get("pretrained_backbone_weights") == AUTO:
        # A checkpoint brings weights of its own, and keypoints have no backbone.
        needed = start is None and has_backbone
        backbone = policy.get("vision_backbone", "resnet18")
        policy["pretrained_backbone_weights"] = available_weights(backbone) if needed else None
    # bf16 is several times slower than fp32 where the processor emulates it.
    if train.precision == AUTO:
        train = replace(train, precision="bf16" if _has_bf16(policy.get("device", AUTO)) else "fp32")
    # Frozen norms normalize nothing unless their statistics came with the weights.
    if train.backbone_norm is None:
        from_scratch = has_backbone and policy.get("pretrained_backbone_weights", AUTO) is None
        norm = _norm_of(start) if start is not None else "batch" if from_scratch else "frozen"
        train = replace(train, backbone_norm=norm)
    return replace(config, policy=policy, train=train)


def _has_bf16(device: str) -> bool:
    """Return whether `device` computes in bfloat16 by itself."""
    on_cpu = torch.device(resolve_device(device)).type == "cpu"
    return cpu_has_bf16() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)


def _norm_of(checkpoint: Checkpoint) -> str:
    """Return the norm that a checkpoint was trained with; stock LeRobot and older versions of ours have frozen ones."""
    train = record.config.get("train") if (record := checkpoint.record) is not None else None
    return str((train or {}).get("backbone_norm", "frozen"))
