"""LeRobot's ACT: make and load the policy and its processors, compute its loss, choose its precision.

How its chunks are executed, temporal ensembling among it, is in evaluation/rollout.py, `Actor.predict_actions`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor

from pusht_act.policy.batch_norm import use_batch_statistics
from pusht_act.policy.frozen_backbone import FEATURES
from pusht_act.policy.lerobot import (
    ACTION,
    OBS_IMAGES,
    ACTConfig,
    ACTPolicy,
    PolicyProcessorPipeline,
    ProcessorMigrationError,
    make_act_pre_post_processors,
    make_pre_post_processors,
)
from pusht_act.policy.torch_internals import cpu_has_bf16
from pusht_act.runtime.errors import UserError

# LeRobot does not wrap them: a damaged file can surface as nearly anything.
PROCESSOR_ERRORS = (
    *(OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    ProcessorMigrationError,
)
"""What LeRobot raises for processor files that are missing, damaged or not its own."""


@dataclass(frozen=True)
class Processors:
    """LeRobot's pipelines: `pre` normalizes a batch on the policy's device, `post` returns actions in pixels."""

    pre: PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]
    post: PolicyProcessorPipeline[Any, Any]


def make_policy(config: ACTConfig, backbone_norm: str = "frozen") -> ACTPolicy:
    """Make an untrained ACT on `config.device`; its weights draw from PyTorch's global generator.

    Args:
        config: what to make.
        backbone_norm: "batch" for norms that follow the training batches (batch_norm.py), or LeRobot's "frozen" ones.

    Raises:
        UserError: The pretrained weights of the backbone cannot be downloaded.
    """
    try:
        policy = ACTPolicy(config)
    except OSError as error:
        # torchvision downloads by urllib, whose errors are OSErrors.
        raise UserError(
            f"policy.pretrained_backbone_weights={config.pretrained_backbone_weights} cannot be downloaded ({error}): "
            "give policy.pretrained_backbone_weights=null to start from random weights"
        ) from error
    if backbone_norm == "batch":
        use_batch_statistics(policy, fresh=config.pretrained_backbone_weights is None)
    return _to_device(policy)


def load_policy(config: ACTConfig, directory: Path, backbone_norm: str = "frozen") -> ACTPolicy:
    """Load the ACT whose weights are in `directory`/model.safetensors; `backbone_norm` is as for `make_policy`.

    Raises:
        UserError: The file is missing, damaged, or of another architecture than `config`.
    """
    # The loaded weights replace those of ImageNet, which LeRobot would download here all the same.
    policy = ACTPolicy(dataclasses.replace(config, pretrained_backbone_weights=None))
    policy.config = config
    path = directory / "model.safetensors"
    try:
        load_model(policy, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): give another checkpoint") from error
    except RuntimeError as error:
        # Keys or shapes differ.
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds another policy than policy.* describes: {reason}") from error
    if backbone_norm == "batch":
        use_batch_statistics(policy, fresh=False)
    return _to_device(policy)


def _to_device(policy: ACTPolicy) -> ACTPolicy:
    """Move `policy` to its device, on a GPU in the memory format that is fastest there."""
    if torch.device(policy.config.device).type != "cuda":
        return policy.to(policy.config.device)

    # As stock training and evaluation do: fp32 matrices are multiplied in TF32. cuDNN's convolutions are faster with
    # channels last. Evaluation uses both, too, or mode=eval would round differently from training.
    torch.backends.cuda.matmul.allow_tf32 = True
    return policy.to(policy.config.device, memory_format=torch.channels_last)


def make_processors(config: ACTConfig, stats: dict[str, dict[str, Tensor]]) -> Processors:
    """Make the processors of an untrained policy; `stats` come from `data.open_dataset.normalization_stats`."""
    return Processors(*make_act_pre_post_processors(config, stats))


def load_processors(config: ACTConfig, directory: Path) -> Processors:
    """Load the processors in `directory`, with their own statistics, for the policy's device.

    Raises:
        UserError: A file is missing or damaged.
    """
    device = {"device_processor": {"device": config.device}}
    try:
        return Processors(*make_pre_post_processors(config, str(directory), preprocessor_overrides=device))
    except PROCESSOR_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: the processors are missing or damaged ({reason})") from error


def l1_loss(predicted: Float[Tensor, "B T A"], target: Float[Tensor, "B T A"]) -> Float[Tensor, "B T A"]:
    """Return the absolute error of each element, ACT's loss of the actions."""
    return F.l1_loss(target, predicted, reduction="none")


def act_loss(
    policy: ACTPolicy,
    batch: Mapping[str, Tensor],
    counts: Float[Tensor, "2"] | None = None,
    action_loss: Callable[[Tensor, Tensor], Tensor] = l1_loss,
    discount: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return ACT's loss on a normalized batch: L1 over actions that are not padding, plus kl_weight times the KL term.

    The same arithmetic as LeRobot's `ACTPolicy.forward`, whose `.item()` waits for the device at every step; here the
    parts stay tensors. In eval mode there is no KL term: the latent is zero.

    Args:
        policy: on the device of `batch`.
        batch: images [B, 3, H, W], or features of them [B, C, h, w] (frozen_backbone.py), state [B, D], action
            [B, T, A], action_is_pad [B, T].
        counts: `valid_counts` of the whole batch of which `batch` is a shard. The loss is then the shard's part of the
            whole's: those of all shards add up to it.
        action_loss: (predicted, target), both [B, T, A] -> the error of each element.
        discount: weight of a chunk's action relative to the one before it.

    Returns:
        The loss and its parts: kld_loss and l1_loss (action_loss where another one is given).
    """
    inputs = dict(batch)
    if policy.config.image_features:
        keys = policy.config.image_features
        images = [batch[name] if (name := f"{key}{FEATURES}") in batch else batch[key] for key in keys]
        inputs[OBS_IMAGES] = images  # type: ignore[assignment]
    actions_hat, (mu, log_sigma_x2) = policy.model(inputs)

    # A chunk that reaches past its episode's end is padded, which does not count.
    error = action_loss(actions_hat, batch[ACTION])
    if discount != 1.0:
        weights = discount ** torch.arange(error.shape[1], device=error.device)
        error = error * (weights / weights.mean())[:, None]
    valid = ~batch["action_is_pad"].unsqueeze(-1)
    n_valid = valid.sum() if counts is None else counts[0]
    mean_error = (error * valid).sum() / (n_valid * error.shape[-1]).clamp_min(1)
    parts = {"l1_loss" if action_loss is l1_loss else "action_loss": mean_error.detach()}
    if not policy.config.use_vae or log_sigma_x2 is None:
        return mean_error, parts

    # KL(q(z|x) || N(0, 1)), summed over the latent's dimensions (Kingma and Welling 2013, appendix B)
    divergence = (-0.5 * (1 + log_sigma_x2 - mu.pow(2) - log_sigma_x2.exp())).sum(-1)
    kld_loss = divergence.mean() if counts is None else (divergence * valid.any((1, 2))).sum() / counts[1].clamp_min(1)
    return mean_error + kld_loss * policy.config.kl_weight, parts | {"kld_loss": kld_loss.detach()}


def valid_counts(batch: Mapping[str, Tensor]) -> Float[Tensor, "2"]:
    """What the means of `act_loss` are over: actions that are not padding, and rows that have one."""
    valid = ~batch["action_is_pad"]
    return torch.stack([valid.sum(), valid.any(1).sum()]).float()


def autocast(policy: ACTPolicy, precision: str | None = None) -> torch.autocast:
    """Return a context that computes in bfloat16 where `is_bf16` says so."""
    device = torch.device(policy.config.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=is_bf16(policy.config, precision))


def bf16_is_emulated(config: ACTConfig, precision: str | None) -> bool:
    """Return whether training would compute in a bfloat16 that the CPU only emulates."""
    on_cpu = torch.device(str(config.device)).type == "cpu"
    return on_cpu and is_bf16(config, precision) and not cpu_has_bf16()


def is_bf16(config: ACTConfig, precision: str | None) -> bool:
    """Return whether to compute in bfloat16.

    Args:
        config: Configuration of the policy.
        precision: "bf16", another precision, or None to follow LeRobot's `policy.use_amp`, as evaluations do.
    """
    return bool(config.use_amp) if precision is None else precision == "bf16"
