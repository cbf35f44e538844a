"""A backbone that learns no more, so that its feature maps can take the place of the images.

An image's way through a ResNet-18 and back takes most of a training step on a CPU. Once the backbone is good enough,
the transformer learns on from feature maps that were computed once, which is many times faster. The names and shapes of
the weights stay, so a checkpoint is that of any other ACT.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.models._utils import IntermediateLayerGetter

from pusht_act.policy.lerobot import ACTPolicy

FEATURES = ".features"
"""What follows an image's key in a batch that holds its feature map instead."""
MIRRORED = ".mirrored"
"""What follows the key of a feature map in a batch that holds that of the mirror image, too."""
RGB = 3


class FrozenBackbone(IntermediateLayerGetter):  # type: ignore[misc]
    """LeRobot's backbone that lets feature maps pass."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> dict[str, Float[Tensor, "B D h w"]]:
        """Return the feature map of images `x`, or `x` itself if it is one already."""
        return super().forward(x) if x.shape[1] == RGB else {"feature_map": x}


def freeze_backbone(policy: ACTPolicy) -> None:
    """Let the backbone of `policy` learn no more, and take feature maps in place of images."""
    backbone = policy.model.backbone.requires_grad_(requires_grad=False)
    # Another class, not another module: names of weights, copies and hooks stay as they are.
    backbone.__class__ = FrozenBackbone


@torch.no_grad()
def feature_size(policy: ACTPolicy, height: int, width: int) -> tuple[int, int, int]:
    """Return the shape of the feature map of an image of `height` by `width` pixels: channels, height, width."""
    was_training = policy.training
    image = next(policy.parameters()).new_zeros(1, RGB, height, width)
    channels, rows, columns = policy.eval().model.backbone(image)["feature_map"].shape[1:]
    policy.train(was_training)
    return channels, rows, columns
