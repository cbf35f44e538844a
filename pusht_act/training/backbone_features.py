"""Training from some step on with a frozen backbone, whose features are computed once (train.freeze_backbone_at).

    images uint8 [N, 3, H, W]  ->  normalize  ->  backbone  ->  features [N, C, h, w] in a file
    mirror images (train.mirror)                                and those of the mirror images in another

A file has no name: it is gone when the run ends, however it ends. A resume computes the features again.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm

from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.config.schema import TrainConfig
from pusht_act.data.cache import FrameDataset, cache_root
from pusht_act.data.loader import BatchLoader, image_memory_budget
from pusht_act.data.mirror import reflect_image
from pusht_act.policy.act import autocast, is_bf16
from pusht_act.policy.frozen_backbone import FEATURES, MIRRORED, feature_size, freeze_backbone
from pusht_act.policy.lerobot import ACTPolicy
from pusht_act.runtime.distributed import broadcast_parameters, is_main
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import signals
from pusht_act.training.extensions import Transform

log = logging.getLogger(__name__)

View = Callable[[Tensor], Tensor]
REPORT_S = 60.0
"""Seconds between two lines that say how far the features are, where there is no terminal for a bar."""
PART = 64
"""Frames whose features are computed at a time; a constant, since a convolution may round by it."""


def check_freezing(options: TrainConfig, frames: FrameDataset, transforms: Sequence[Transform]) -> None:
    """Refuse what would do nothing, or something else, once features have taken the place of the images.

    Raises:
        UserError: naming it.
    """
    if options.freeze_backbone_at is None:
        return
    at = f"train.freeze_backbone_at={options.freeze_backbone_at}"
    if not frames.image_keys:
        raise UserError(f"{at}: {frames.repo_id} has no images, leave it out")
    if options.random_shift:
        raise UserError(
            f"{at}: from there on images are not read, so train.random_shift={options.random_shift} would do nothing: "
            "leave one of them out"
        )
    if transforms:
        raise UserError(f"{at}: from there on images are not read, which transforms= may need: leave one of them out")


def freeze(
    components: TrainComponents, loader: BatchLoader, indices: Int64[Tensor, " N"], options: TrainConfig
) -> BatchLoader:
    """Freeze the backbone on every rank, with rank 0's weights and norms; return the loader of its features.

    The average of the weights has a backbone of its own. It is the better one, so both have it from here on.

    Args:
        components: what is trained.
        loader: of the images.
        indices: numbers of the training frames.
        options: the `train` section.

    Raises:
        UserError: the features do not fit on the GPU.
        OSError: they do not fit on the disk.
        StopSignal: there was a signal.
    """
    backbone = components.policy.model.backbone
    if components.ema is not None:
        backbone.load_state_dict(components.ema.policy.model.backbone.state_dict())
    broadcast_parameters(backbone.state_dict().values())
    policy, pre = components.policy, components.processors.pre
    features = {}
    for key in policy.config.image_features:
        views: dict[str, View] = {f"{key}{FEATURES}": lambda images: images}
        if options.mirror:
            views[f"{key}{FEATURES}{MIRRORED}"] = reflect_image
        for name, view in views.items():
            features[name] = _allocate(policy, key, loader.n_frames, options.precision)
            if is_main():
                log.info(
                    "the backbone is frozen: %s of %d frames, %.2f GB, are kept %s until the run ends",
                    name, len(indices), features[name].nbytes / 1e9,
                    f"in {cache_root()}" if features[name].device.type == "cpu" else "on the GPU",
                )  # fmt: skip
            # The mean and standard deviation are by channel, so it is the same to reflect before or after.
            images = ((part, view(pre(loader.batch(part))[key])) for part in _with_bar(indices))
            _fill(features[name], policy, images, options.precision)
    freeze_backbone(policy)
    return loader.with_features(features)


@torch.inference_mode()
def _fill(features: Tensor, policy: ACTPolicy, images: Iterator[tuple[Tensor, Tensor]], precision: str | None) -> None:
    """Put the features of `images`, which come with their frame numbers and are normalized, into `features`."""
    policy.eval()
    for indices, part in images:
        with autocast(policy, precision):
            maps = policy.model.backbone(part.contiguous(memory_format=torch.channels_last))
        features[indices] = maps["feature_map"].to(features)
    policy.train()


def _with_bar(indices: Int64[Tensor, " N"]) -> Iterator[Int64[Tensor, " B"]]:
    """Yield `indices` in parts, with a bar on a terminal and lines elsewhere; a signal is acted upon between two."""
    done, said = 0, time.monotonic()
    with tqdm(total=len(indices), desc="features", unit="frame", disable=None if is_main() else True) as bar:
        for part in torch.split(indices, PART):
            with signals.defer():
                yield part
            bar.update(len(part))
            done += len(part)
            if bar.disable and is_main() and time.monotonic() - said > REPORT_S:
                said = time.monotonic()
                log.info("features: %d of %d frames", done, len(indices))


def _allocate(policy: ACTPolicy, key: str, n_frames: int, precision: str | None) -> Tensor:
    """Return room for the features of all frames: mapped from a file without a name, or on the GPU."""
    height, width = policy.config.image_features[key].shape[-2:]
    dtype = torch.bfloat16 if is_bf16(policy.config, precision) else torch.float32
    shape = torch.Size((n_frames, *feature_size(policy, height, width)))
    n_bytes, device = shape.numel() * dtype.itemsize, str(policy.config.device)
    if n_bytes > (room := image_memory_budget(device)):
        raise UserError(
            f"train.freeze_backbone_at: the features of {n_frames} frames take {n_bytes / 1e9:.3g} GB, {device} has "
            f"room for {room / 1e9:.3g} GB: give train.freeze_backbone_at=null to go on from images"
        )
    if device != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    return _map_unnamed_file(folder, n_bytes).view(dtype).view(shape)


def _map_unnamed_file(folder: Path, n_bytes: int) -> Tensor:
    """Return `n_bytes` bytes in a file that is gone with its last user.

    Raises:
        OSError: the disk has no room for them.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix="features-") as file:
        # A sparse file would end the process by SIGBUS where the disk is full.
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return torch.from_file(file.name, shared=True, size=n_bytes, dtype=torch.uint8)
