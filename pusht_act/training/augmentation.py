"""Random changes of training batches, each an option: mirror images, shifted images, noisy states.

    gather -> transforms -> normalize
              mirror, shift_image, add_state_noise, then those given to pusht_act.run

They see images [B, 3, H, W] from 0 to 1, and points in pixels of the arena. Each sample draws its own numbers from
PyTorch's generator of the device. A checkpoint holds its state, and a CUDA graph can hold the draws.
"""

from functools import partial

import torch

from pusht_act.config.schema import TrainConfig
from pusht_act.data.cache import FrameDataset
from pusht_act.data.lerobot import ACTION
from pusht_act.data.loader import Batch
from pusht_act.data.mirror import REFLECTIONS, STATE, check_mirror, reflect_image
from pusht_act.policy.frozen_backbone import FEATURES, MIRRORED
from pusht_act.runtime.errors import UserError
from pusht_act.training.extensions import Transform


def build_augmentation(options: TrainConfig, frames: FrameDataset) -> list[Transform]:
    """Return the transforms that `options` asks for, in their order.

    Raises:
        UserError: one of them means nothing for `frames`.
    """
    images = frames.image_keys
    if options.random_shift and not images:
        raise UserError(f"train.random_shift={options.random_shift}: {frames.repo_id} has no images, leave it out")
    transforms: list[Transform] = []
    if options.mirror:
        check_mirror(frames)
        transforms.append(partial(mirror, probability=options.mirror, images=images))
    if options.random_shift:
        transforms += [partial(shift_image, key=key, most=options.random_shift) for key in images]
    if options.state_noise:
        transforms.append(partial(add_state_noise, std=options.state_noise))
    return transforms


def mirror(batch: Batch, probability: float, images: list[str]) -> Batch:
    """Replace each sample by its mirror image with `probability` (data/mirror.py)."""
    reflections = {key: reflect for key, reflect in REFLECTIONS.items() if key in batch}
    reflections |= {key: reflect_image for key in images if key in batch}
    action = batch[ACTION]
    chosen = torch.rand(len(action), device=action.device) < probability
    pairs = {key: (batch[key], reflect(batch[key])) for key, reflect in reflections.items()}
    # A frozen backbone's features are there of both (training/backbone_features.py).
    features = [key for image in images if (key := f"{image}{FEATURES}") in batch]
    pairs |= {key: (batch[key], batch[f"{key}{MIRRORED}"]) for key in features}
    return batch | {
        key: torch.where(chosen.view(-1, *[1] * (plain.dim() - 1)), mirrored, plain)
        for key, (plain, mirrored) in pairs.items()
    }


def shift_image(batch: Batch, key: str, most: int) -> Batch:
    """Shift each image by up to `most` pixels in each direction, its border repeated (Kostrikov et al. 2020, DrQ)."""
    image = batch[key]
    count, _, height, width = image.shape
    offsets = torch.randint(-most, most + 1, (2, count, 1), device=image.device)
    rows = (torch.arange(height, device=image.device) + offsets[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=image.device) + offsets[1]).clamp(0, width - 1)
    shifted = image.gather(2, rows[:, None, :, None].expand_as(image))
    return batch | {key: shifted.gather(3, columns[:, None, None, :].expand_as(image))}


def add_state_noise(batch: Batch, std: float) -> Batch:
    """Add normal noise of `std` (px) to the agent's position, so that it says less of the action to come."""
    state = batch[STATE]
    return batch | {STATE: state + std * torch.randn_like(state)}
