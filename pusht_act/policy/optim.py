"""AdamW as LeRobot configures it, with PyTorch's fused kernel.

The schedule of the rates is LeRobot's, built beside it in training/restore.py, `build_components`.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from pusht_act.policy.lerobot import ACTPolicy, AdamWConfig


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
