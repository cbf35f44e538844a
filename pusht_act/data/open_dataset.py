"""Open a job's data set, split its episodes, return its features and statistics.

It is built in (builtin_demos.py) or a LeRobotDataset: `find_dataset` in lerobot.py looks in dataset.root, in LeRobot's
cache and on the Hub. Whether that fits the environment is decided from its metadata (choose_features.py), before it is
decoded.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pusht_act.config.lerobot import LeRobotConfig
from pusht_act.config.schema import EMBEDDED_REPO_ID, Config
from pusht_act.data.cache import FrameDataset
from pusht_act.data.lerobot import ACTION, IMAGENET_STATS, to_policy_features
from pusht_act.data.mirror import statistics_with_mirror_images
from pusht_act.runtime.errors import UserError


def open_dataset(config: Config, lerobot: LeRobotConfig) -> FrameDataset:
    """Open the data set that `dataset` names: the built-in demonstrations, or one in LeRobot's format.

    Raises:
        UserError: The data set does not fit `env`, or a file of it cannot be used.
        FileNotFoundError: There is no such data set.
    """
    if lerobot.dataset.repo_id == EMBEDDED_REPO_ID:
        # Imported late: each of the two brings libraries that the other does not need.
        from pusht_act.data.builtin_demos import open_builtin_demos

        return open_builtin_demos(config.demos.n_episodes, lerobot.env)
    from pusht_act.data.choose_features import check_environment, choose_features, needed_statistics
    from pusht_act.data.lerobot_metadata import check_stats
    from pusht_act.data.lerobot_reader import open_lerobot_dataset, read_dataset_metadata

    metadata = read_dataset_metadata(lerobot.dataset)
    names = choose_features(config, lerobot.env, metadata.info.features)
    check_environment(config, lerobot.env, metadata, names)
    check_stats(metadata, needed_statistics(lerobot, metadata, names), lerobot.dataset.repo_id)
    return open_lerobot_dataset(lerobot.dataset, metadata, names)


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
        key: {name: torch.tensor(value, dtype=torch.float32) for name, value in found.get(key, {}).items()}
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
        UserError: An episode that the data set does not have or that lacks a picture, or none is left to train on.
    """
    total = len(frames.episodes)
    chosen = list(range(total)) if episodes is None else episodes
    if outside := [e for e in chosen if e >= total]:
        raise UserError(f"dataset.episodes={outside} are not in {frames.repo_id}: it has 0 to {total - 1}")
    _check_complete(frames, chosen)
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


def _check_complete(frames: FrameDataset, chosen: list[int]) -> None:
    """Refuse episodes with frames for which there is no picture."""
    lacking = [episode for episode in chosen if episode in frames.incomplete]
    if not lacking:
        return
    rest = [episode for episode in chosen if episode not in frames.incomplete]
    others = f" (and {len(lacking) - 1} more episodes lack one)" if len(lacking) > 1 else ""
    # A list of thousands of numbers would bury the message.
    option = f"'+dataset.episodes=[{','.join(map(str, rest))}]'"
    without = option if len(option) < 1000 else "+dataset.episodes= without them"
    remedy = f", or leave out what is not whole: {without}" if rest else ""
    raise UserError(
        f"{frames.repo_id}, episode {lacking[0]}: {frames.incomplete[lacking[0]]}{others}: "
        f"fetch the data set again{remedy}"
    )


def policy_features(frames: FrameDataset) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return LeRobot's input_features and output_features of a policy that is trained on `frames`."""
    features = to_policy_features(frames.features)
    # Tuples, as config.json of a checkpoint is decoded: the two are compared.
    for feature in features.values():
        feature.shape = tuple(feature.shape)
    return {k: f for k, f in features.items() if k != ACTION}, {ACTION: features[ACTION]}
