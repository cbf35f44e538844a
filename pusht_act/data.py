"""From a data set to batches, without worker processes: frames are resident on the device, a batch is one gather.

Frames, all N frames of all episodes, memory-mapped         SampleOrder(seed): LeRobot's order of epoch 0, 1, ...
  observation.image   uint8   [N, 3, H, W]                          |
  observation.state   float32 [N, 2]                                | indices [B]
  action              float32 [N, 2]                                v
          |                                   Samples.batch(indices)
          +---- to the device, once ------>     observation.image  float32 [B, 3, H, W] in [0, 1]
                                                observation.state  float32 [B, 2]
                                                action             float32 [B, chunk, 2], from the frame on; past
                                                                   the episode's end its last action, repeated
                                                action_is_pad      bool    [B, chunk], True for those
"""

import copy
import logging
import math
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from lerobot.envs.configs import PushtEnv
from lerobot.utils.constants import ACTION, IMAGENET_STATS
from torch import Tensor

from pusht_act.cache import Frames
from pusht_act.config import EMBEDDED_REPO_ID, Config
from pusht_act.distributed import share
from pusht_act.lerobot_config import LeRobotConfig, observation_keys

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Inputs = dict[str, Tensor]
"""What a batch is gathered from: its frame numbers, and the pictures that are not on the device."""
INDEX = "index"
"""The frame numbers in Inputs."""
AHEAD = 4
"""Batches of pictures read before the step that wants them."""
PICTURES_SHARE = 0.5
"""Of the device's free memory: the rest is training's and evaluation's."""


def open_dataset(config: Config, lerobot: LeRobotConfig) -> Frames:
    """The frames that `dataset` names: LeRobot's format, or the embedded demonstrations as `env` observes them.

    Raises:
        ValueError: the data set lacks what `env` observes, or has what it does not.
    """
    if lerobot.dataset.repo_id == EMBEDDED_REPO_ID:
        from pusht_act.demos.frames import open_demos

        return open_demos(config.demos.n_episodes, lerobot.env, config.demos.mirror)
    from pusht_act.lerobot_dataset import open_frames

    frames = open_frames(lerobot.dataset)
    _check_observations(frames, lerobot.env)
    return frames


def _check_observations(frames: Frames, env: PushtEnv) -> None:
    has, needs = frames.arrays.keys() - {ACTION}, observation_keys(env)
    if ACTION not in frames.arrays:
        raise ValueError(f"dataset {frames.repo_id} has no action to learn")
    if has == needs:
        return
    group = "pusht_keypoints" if "observation.environment_state" in has else "pusht"
    raise ValueError(
        f"dataset {frames.repo_id} has {', '.join(sorted(has))}, but env.obs_type={env.obs_type} gives "
        f"{', '.join(sorted(needs))}: give env={group}, or a data set that fits the environment"
    )


def normalization_stats(frames: Frames, use_imagenet_stats: bool) -> dict[str, dict[str, Tensor]]:
    """LeRobot's statistics by feature; as in stock training, pictures take ImageNet's unless told otherwise."""
    stats = {
        key: {name: torch.tensor(value, dtype=torch.float32) for name, value in frames.stats[key].items()}
        for key in frames.arrays
    }
    if use_imagenet_stats:
        for key in frames.image_keys:
            stats[key] |= {name: torch.tensor(value, dtype=torch.float32) for name, value in IMAGENET_STATS.items()}
    return stats


def split_episodes(frames: Frames, episodes: list[int] | None, eval_split: float) -> tuple[list[int], list[int]]:
    """(training, held-out) episodes: as in stock, the last ceil(n * eval_split) of each task are held out."""
    total = len(frames.episodes)
    chosen = list(range(total)) if episodes is None else episodes
    if outside := [e for e in chosen if e >= total]:
        raise ValueError(f"dataset.episodes={outside} are not in {frames.repo_id}: it has 0 to {total - 1}")
    if not eval_split:
        return chosen, []
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
        raise ValueError(f"dataset.eval_split={eval_split} leaves none of {len(chosen)} episodes to train on: lower it")
    return train, held_out


class SampleOrder:
    """The order of LeRobot's `EpisodeAwareSampler`: a pure function of (seed, epoch), so a resume needs no replay.

    After roll-backs, of their number too; 0 gives LeRobot's order.

    The same permutation, but whole epochs as arrays: the sampler itself yields one Python int at a time. An epoch's
    last batch is short, as in stock training (drop_last=False).
    """

    def __init__(self, frames: Frames, episodes: list[int], seed: int) -> None:
        bounds = frames.episodes[np.asarray(sorted(episodes))]
        self._seed = seed
        self._indices = np.concatenate([np.arange(start, stop) for start, stop in bounds])
        self._epoch, self._start_index, self._rollbacks = 0, 0, 0
        self._permutation = self._epoch_permutation()

    def __len__(self) -> int:
        return len(self._indices)

    def next_batch(self, batch_size: int) -> Int64[Tensor, " B"]:
        """Frame numbers of the next `batch_size` samples; fewer at the end of an epoch."""
        if self._start_index >= len(self):
            self.load_state_dict({"epoch": self._epoch + 1, "start_index": 0}, self._rollbacks)
        positions = self._permutation[self._start_index : self._start_index + batch_size]
        self._start_index += len(positions)
        return torch.from_numpy(self._indices[positions])

    def state_dict(self) -> dict[str, int]:
        """The position, in the form of LeRobot's sampler."""
        return {"epoch": self._epoch, "start_index": self._start_index}

    def load_state_dict(self, state: dict[str, int], rollbacks: int = 0) -> None:
        """Go on from a position, in the order after so many `rollbacks`."""
        self._epoch, self._start_index, self._rollbacks = state["epoch"], state["start_index"], rollbacks
        self._permutation = self._epoch_permutation()

    def state_at(self, step: int, batch_size: int, num_processes: int = 1) -> dict[str, int]:
        """Where stock training stands after `step` steps; for its checkpoints, which do not record the position."""
        from lerobot.datasets.sampler import compute_sampler_state  # not at the top, see lerobot_imports.py

        state: dict[str, int] = compute_sampler_state(step, len(self), batch_size, num_processes)
        return state

    def _epoch_permutation(self) -> np.ndarray:
        seeds = [self._seed, self._epoch, *([self._rollbacks] if self._rollbacks else [])]
        entropy = np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        return torch.randperm(len(self), generator=generator).numpy()


class Samples:
    """The samples of `frames`, gathered into batches on the device.

    All frames are moved there once. Pictures that take more than `room` bytes of it stay in the memory map; their rows
    are read on the host and sent, some batches ahead of the step that wants them.
    """

    def __init__(self, frames: Frames, chunk_size: int, device: str, room: float | None = None) -> None:
        pictures = sum(frames.arrays[key].nbytes for key in frames.image_keys)
        room = room_for_pictures(device) if room is None else room
        on_host = frames.image_keys if pictures > room else []
        if on_host:
            log.info(
                "the pictures take %.3g GB, %s has room for %.3g: they are read from the cache, %d batches ahead",
                pictures / 1e9, device, room / 1e9, AHEAD,
            )  # fmt: skip
        self._on_host = {key: frames.arrays[key] for key in on_host}
        self._arrays = {k: torch.from_numpy(a).to(device) for k, a in frames.arrays.items() if k not in on_host}
        self._images = frames.image_keys
        lengths = np.diff(frames.episodes, axis=1).ravel()
        self._last_frame = torch.from_numpy(np.repeat(frames.episodes[:, 1] - 1, lengths)).to(device)
        self._offsets = torch.arange(chunk_size, device=device)
        self._device = device
        self._pinned = device.startswith("cuda")  # only from pinned memory is a copy not waited for

    def in_order(self, order: SampleOrder, batch_size: int) -> Generator[Inputs]:
        """Batch after batch of `order`, for `gather`; `order` counts those that were taken, not those read ahead.

        Of several processes, this one's share of each.
        """
        if not self._on_host:
            while True:
                yield self._sent(self._read(share(order.next_batch(batch_size))))
        ahead = copy.copy(order)
        with ThreadPoolExecutor(1, "pictures") as thread:
            coming = deque(thread.submit(self._read, share(ahead.next_batch(batch_size))) for _ in range(AHEAD))
            while True:
                inputs = coming.popleft().result()
                coming.append(thread.submit(self._read, share(ahead.next_batch(batch_size))))
                order.next_batch(batch_size)
                yield self._sent(inputs)

    def gather(self, inputs: Inputs) -> Batch:
        """The batch of `inputs`; shapes in the module's diagram. Work of the device alone: a CUDA graph can hold it."""
        indices = inputs[INDEX]
        wanted = indices[:, None] + self._offsets
        last = self._last_frame[indices][:, None]
        rows = {key: array[indices] for key, array in self._arrays.items() if key != ACTION}
        rows |= {key: inputs[key] for key in self._on_host}
        batch = {key: row.to(torch.float32) / 255.0 if key in self._images else row for key, row in rows.items()}
        batch[ACTION] = self._arrays[ACTION][torch.minimum(wanted, last)]
        batch["action_is_pad"] = wanted > last
        return batch

    def batch(self, indices: Int64[Tensor, " B"]) -> Batch:
        """The samples that start at frames `indices`."""
        return self.gather(self._sent(self._read(indices)))

    def _read(self, indices: Int64[Tensor, " B"]) -> Inputs:
        """What is not on the device yet, in memory that it can be copied from without waiting."""
        inputs = {INDEX: indices.pin_memory() if self._pinned else indices}
        for key, array in self._on_host.items():
            rows = torch.empty((len(indices), *array.shape[1:]), dtype=torch.uint8, pin_memory=self._pinned)
            np.take(array, indices.numpy(), axis=0, out=rows.numpy(), mode="clip")  # "raise" would copy once more
            inputs[key] = rows
        return inputs

    def _sent(self, inputs: Inputs) -> Inputs:
        return {key: tensor.to(self._device, non_blocking=self._pinned) for key, tensor in inputs.items()}


def room_for_pictures(device: str) -> float:
    """Bytes of `device` that pictures may take; what is in the CPU's memory map is there already."""
    if not device.startswith("cuda"):
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free * PICTURES_SHARE


def policy_features(frames: Frames) -> tuple[dict[str, Any], dict[str, Any]]:
    """LeRobot's (input_features, output_features) of a policy trained on `frames`."""
    from lerobot.utils.feature_utils import dataset_to_policy_features

    features = dataset_to_policy_features(frames.features)
    for feature in features.values():
        feature.shape = tuple(feature.shape)  # as a checkpoint's config.json is decoded
    return {k: f for k, f in features.items() if k != ACTION}, {ACTION: features[ACTION]}
