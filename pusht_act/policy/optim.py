"""AdamW as LeRobot configures it, with PyTorch's fused kernel."""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pusht_act.policy.lerobot import ACTConfig, ACTPolicy, AdamWConfig


def make_optimizer(policy: ACTPolicy, config: AdamWConfig) -> Optimizer:
    """Make AdamW over LeRobot's two parameter groups: the backbone at its own learning rate, and everything else.

    The fused kernel updates all weights in one pass; stock LeRobot does not use it.
    """
    optimizer: Optimizer = config.build(policy.get_optim_params())

    # Saved states carry no trace of the fused kernel, so that stock LeRobot can load them; loaded ones regain it.
    optimizer.register_state_dict_post_hook(_strip_fused_flag)
    optimizer.register_load_state_dict_post_hook(_fuse)
    _fuse(optimizer)
    return optimizer


def _fuse(optimizer: Optimizer) -> None:
    """Prepare the optimizer and its state for the fused kernel."""
    # The kernel keeps `step` on the device and needs the moments in the memory format of their parameter.
    for group in optimizer.param_groups:
        group["fused"] = True
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            state[key] = value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)


def _strip_fused_flag(_: Optimizer, state: dict[str, Any]) -> None:
    """Make a state dict that stock LeRobot can load: contiguous tensors and no `fused` flag."""
    for group in state["param_groups"]:
        group["fused"] = None
    state["state"] = {
        number: {key: value.contiguous() for key, value in moments.items()}
        for number, moments in state["state"].items()
    }


def override_restored_hparams(
    optimizer: Optimizer, scheduler: LRScheduler | None, config: AdamWConfig, policy: ACTConfig
) -> None:
    """Apply the configured learning rates and options to an optimizer whose state was loaded from a file.

    PyTorch restores the saved learning rate together with the moments, so a new one given on resume would do nothing.

    Args:
        optimizer: The optimizer, with its loaded state.
        scheduler: The learning rate schedule with its loaded state, if there is one.
        config: Options of AdamW.
        policy: Holds the learning rates of the two parameter groups.
    """
    for i, (group, rate) in enumerate(
        zip(optimizer.param_groups, (policy.optimizer_lr, policy.optimizer_lr_backbone), strict=True)
    ):
        group.update(betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
        if scheduler is None:
            group["lr"] = rate
        elif rate != scheduler.base_lrs[i]:
            # The schedule multiplies its base rate: replace that, and scale the present rate by as much.
            group["lr"] *= rate / scheduler.base_lrs[i]
            group["initial_lr"] = scheduler.base_lrs[i] = rate
