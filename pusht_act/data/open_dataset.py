"""Open a job's data set, split its episodes, return its features and statistics.

It is built in (builtin_demos.py) or a LeRobotDataset: `find_dataset` in lerobot.py looks in dataset.root, in LeRobot's
cache and on the Hub.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pusht_act.config.lerobot import LeRobotConfig, PushtEnv, observation_keys
from pusht_act.config.schema import EMBEDDED_REPO_ID, Config
from pusht_act.data.cache import FrameDataset
from pusht_act.data.lerobot import ACTION, IMAGENET_STATS, to_policy_features
from pusht_act.data.mirror import statistics_with_mirror_images
from pusht_act.runtime.errors import UserError


def open_dataset(config: Config, lerobot: LeRobotConfig) -> FrameDataset:
    """Open the data set that `dataset` names: the built-in demonstrations, or one in LeRobot's format.

    Raises:
        UserError: The data set has other observations than `env` gives.
        FileNotFoundError: There is no such data set.
    """
    if lerobot.dataset.repo_id == EMBEDDED_REPO_ID:
        # Imported late: each of the two brings libraries that the other does not need.
        from pusht_act.data.builtin_demos import open_builtin_demos

        return open_builtin_demos(config.demos.n_episodes, lerobot.env)
    from pusht_act.data.lerobot_reader import open_lerobot_dataset

    frames = open_lerobot_dataset(lerobot.dataset)
    _check_observations(frames, lerobot.env)
    return frames


def _check_observations(frames: FrameDataset, env: PushtEnv) -> None:
    has, needs = frames.arrays.keys() - {ACTION}, observation_keys(env)
    if ACTION not in frames.arrays:
        raise UserError(f"dataset {frames.repo_id} has no action to learn")
    if has == needs:
        return
    # Name the environment that would fit the data set.
    group = "pusht_keypoints" if "observation.environment_state" in has else "pusht"
    raise UserError(
        f"dataset {frames.repo_id} has {', '.join(sorted(has))}, but env.obs_type={env.obs_type} gives "
        f"{', '.join(sorted(needs))}: give env={group}, or a data set that fits the environment"
    )


def normalization_stats(
    frames: FrameDataset, use_imagenet_stats: bool, mirror: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics that normalize each feature, under LeRobot's names.

    Args:
        frames: The data set.
        use_imagenet_stats: Take ImageNet's mean and standard deviation for images, as stock training does by default.
        mirror: Count each frame's mirror image, too.
    """
    found = statistics_with_mirror_images(frames) if mirror else frames.stats
    stats = {
        key: {name: torch.tensor(value, dtype=torch.float32) for name, value in found[key].items()}
        for key in frames.arrays
    }
    if use_imagenet_stats:
        # Only some statistics are ImageNet's; the others, such as min and max, stay the data set's.
        for key in frames.image_keys:
            stats[key] |= {name: torch.tensor(value, dtype=torch.float32) for name, value in IMAGENET_STATS.items()}
    return stats


def split_episodes(frames: FrameDataset, episodes: list[int] | None, eval_split: float) -> tuple[list[int], list[int]]:
    """Split episodes into training and held-out ones.

    As in stock LeRobot the last ceil(n * eval_split) episodes of each task are held out.

    Args:
        frames: The data set.
        episodes: Numbers of the episodes to use; None uses all.
        eval_split: Share of the episodes to hold out, in [0, 1).

    Raises:
        UserError: An episode that the data set does not have, or none is left to train on.
    """
    total = len(frames.episodes)
    chosen = list(range(total)) if episodes is None else episodes
    if outside := [e for e in chosen if e >= total]:
        raise UserError(f"dataset.episodes={outside} are not in {frames.repo_id}: it has 0 to {total - 1}")
    if not eval_split:
        return chosen, []
    # By task, as stock LeRobot does, although PushT has a single one.
    by_task: dict[str, list[int]] = {}
    for episode in chosen:
        by_task.setdefault(frames.tasks[episode], []).append(episode)
    train: list[int] = []
    held_out: list[int] = []
    for group in by_task.values():
        cut = len(group) - math.ceil(len(group) * eval_split)
        train += group[:cut]
        held_out += group[cut:]
    if not train:
        raise UserError(f"dataset.eval_split={eval_split} leaves none of {len(chosen)} episodes to train on: lower it")
    return train, held_out


def policy_features(frames: FrameDataset) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return LeRobot's input_features and output_features of a policy that is trained on `frames`."""
    features = to_policy_features(frames.features)
    # Tuples, as config.json of a checkpoint is decoded: the two are compared.
    for feature in features.values():
        feature.shape = tuple(feature.shape)
    return {k: f for k, f in features.items() if k != ACTION}, {ACTION: features[ACTION]}
