"""AdamW as LeRobot builds it, fused; its options after a resume."""

from typing import Any

import torch
from lerobot.optim import AdamWConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def make_optimizer(policy: ACTPolicy, config: AdamWConfig) -> Optimizer:
    """AdamW over LeRobot's two groups: everything but the backbone, and the backbone at its own rate.

    Fused into one pass over the weights, which stock's is not; a file of its state says nothing of that, since stock
    LeRobot reads only files of optimizers like its own.
    """
    optimizer: Optimizer = config.build(policy.get_optim_params())
    optimizer.register_state_dict_post_hook(_strip_fused_flag)
    optimizer.register_load_state_dict_post_hook(_fuse)
    _fuse(optimizer)
    return optimizer


def _fuse(optimizer: Optimizer) -> None:
    """As the fused kernel needs it: it counts on the device, and all of a weight's tensors lie as the weight does."""
    for group in optimizer.param_groups:
        group["fused"] = True
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            state[key] = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)


def _strip_fused_flag(_: Optimizer, state: dict[str, Any]) -> None:
    """What a file takes: plain memory, and not a word of the kernel."""
    for group in state["param_groups"]:
        group["fused"] = None
    state["state"] = {
        number: {key: value.contiguous() for key, value in moments.items()}
        for number, moments in state["state"].items()
    }


def override_restored_hparams(
    optimizer: Optimizer, scheduler: LRScheduler | None, config: AdamWConfig, policy: ACTConfig
) -> None:
    """After the optimizer's state was loaded: the rates and options of the configuration hold, not the file's.

    PyTorch restores the old learning rate with the moments, so a new one given on resume would do nothing. Under a
    schedule the base rate is replaced and the present rate scaled with it.
    """
    for i, (group, rate) in enumerate(
        zip(optimizer.param_groups, (policy.optimizer_lr, policy.optimizer_lr_backbone), strict=True)
    ):
        group.update(betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
        if scheduler is None:
            group["lr"] = rate
        elif rate != scheduler.base_lrs[i]:
            group["lr"] *= rate / scheduler.base_lrs[i]
            group["initial_lr"] = scheduler.base_lrs[i] = rate
