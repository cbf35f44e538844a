"""Gather batches on the device, without worker processes: all frames are resident, a batch is one indexing operation.

An evaluation's images become tensors in evaluation/rollout.py, `Actor.predict_actions`. Both are normalized by
`Processors.pre` of policy/act.py.

mp4 or PNG, decoded once by lerobot_reader.py, or rendered by builtin_demos.py, and kept by cache.py
          |

FrameDataset, all N frames, memory-mapped            EpisodeSampler(seed): LeRobot's order of epoch 0, 1, ...
  observation.image   uint8   [N, 3, H, W]                          |
  observation.state   float32 [N, 2]                                | indices [B]
  action              float32 [N, 2]                                v
          |                                   BatchLoader.batch(indices)
          +---- to the device, once ------>     observation.image  float32 [B, 3, H, W] in [0, 1]
                                                observation.state  float32 [B, 2]
                                                action             float32 [B, chunk, 2], from the frame on; past
                                                                   the episode's end its last action, repeated
                                                action_is_pad      bool    [B, chunk], True for the repeated ones
"""

import copy
import logging
import math
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pusht_act.data.cache import FrameDataset
from pusht_act.data.lerobot import ACTION
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.runtime.distributed import shard

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
BatchIndices = dict[str, Tensor]
"""What a batch is gathered from: its frame numbers, and its images where those are not resident on the device."""
INDEX = "index"
"""Key of the frame numbers in BatchIndices."""
PREFETCH_BATCHES = 4
"""Batches whose images are read ahead of the training step."""
IMAGE_MEMORY_FRACTION = 0.5
"""Share of the device's free memory for images; the rest is left to training and evaluation."""


class BatchLoader:
    """Gather samples of `frames` into batches on the device.

    All frames are copied there once. Images that do not fit stay in the memory map: the rows of a batch are read on the
    host and sent to the device, a few batches ahead of the step.

    Args:
        frames: The data set.
        chunk_size: Number of actions in a sample.
        device: Where the batches are.
        room: Bytes that images may take on the device; None takes `image_memory_budget`.
    """

    def __init__(self, frames: FrameDataset, chunk_size: int, device: str, room: float | None = None) -> None:
        image_bytes = sum(frames.arrays[key].nbytes for key in frames.image_keys)
        room = image_memory_budget(device) if room is None else room
        # States and actions take some megabytes and always fit.
        on_host = frames.image_keys if image_bytes > room else []
        if on_host:
            log.info(
                "the images take %.3g GB, %s has room for %.3g GB: they are read from the cache, %d batches ahead",
                image_bytes / 1e9, device, room / 1e9, PREFETCH_BATCHES,
            )  # fmt: skip
        self._on_host = {key: frames.arrays[key] for key in on_host}
        self._arrays = {k: _as_tensor(a).to(device) for k, a in frames.arrays.items() if k not in on_host}
        self._images = frames.image_keys
        # For each frame the last one of its episode, where its chunk of actions has to end.
        lengths = np.diff(frames.episodes, axis=1).ravel()
        self._last_frame = torch.from_numpy(np.repeat(frames.episodes[:, 1] - 1, lengths)).to(device)
        self._offsets = torch.arange(chunk_size, device=device)
        self._device = device
        # A copy to a GPU is asynchronous only from pinned memory.
        self._pinned = device.startswith("cuda")

    @property
    def n_frames(self) -> int:
        """How many frames there are, held-out ones included."""
        return len(self._last_frame)

    def with_features(self, features: dict[str, Tensor]) -> "BatchLoader":
        """Return a loader of the same samples with `features`, [N, ...] by key, in place of the images."""
        loader = copy.copy(self)
        loader._images, loader._on_host = [], {}
        loader._arrays = {key: array for key, array in self._arrays.items() if key not in self._images} | features
        return loader

    def iter_batches(self, order: EpisodeSampler, batch_size: int) -> Generator[BatchIndices]:
        """Yield what `gather` makes batch after batch of, in the sampler's `order`: this rank's shard of each.

        `order` counts the batches that were taken, not those that were read ahead, so its position can be saved.
        """
        if not self._on_host:
            while True:
                yield self._to_device(self._read(shard(order.next_batch(batch_size))))
        ahead = copy.copy(order)
        with ThreadPoolExecutor(1, "images") as thread:
            pending = deque(
                thread.submit(self._read, shard(ahead.next_batch(batch_size))) for _ in range(PREFETCH_BATCHES)
            )
            while True:
                inputs = pending.popleft().result()
                pending.append(thread.submit(self._read, shard(ahead.next_batch(batch_size))))
                order.next_batch(batch_size)
                yield self._to_device(inputs)

    def gather(self, inputs: BatchIndices) -> Batch:
        """Return the batch of `inputs`, shapes as in the module's docstring.

        Nothing in here waits for the host, so a CUDA graph can hold it.
        """
        # A chunk that reaches past its episode's end repeats the last action, and is marked as padding from there on.
        indices = inputs[INDEX]
        wanted = indices[:, None] + self._offsets
        last = self._last_frame[indices][:, None]
        rows = {key: array[indices] for key, array in self._arrays.items() if key != ACTION}
        rows |= {key: inputs[key] for key in self._on_host}
        # Features of a frozen backbone (train.freeze_backbone_at) may be bf16.
        rows = {key: row.to(torch.float32) for key, row in rows.items()}
        batch = {key: row / 255.0 if key in self._images else row for key, row in rows.items()}
        batch[ACTION] = self._arrays[ACTION][torch.minimum(wanted, last)]
        batch["action_is_pad"] = wanted > last
        return batch

    def batch(self, indices: Int64[Tensor, " B"]) -> Batch:
        """Return the samples that start at frames `indices`."""
        return self.gather(self._to_device(self._read(indices)))

    def _read(self, indices: Int64[Tensor, " B"]) -> BatchIndices:
        """Read what is not resident on the device, into pinned memory if it is a GPU."""
        inputs = {INDEX: indices.pin_memory() if self._pinned else indices}
        for key, array in self._on_host.items():
            rows = torch.empty((len(indices), *array.shape[1:]), dtype=torch.uint8, pin_memory=self._pinned)
            # mode="raise" would go through a buffer and copy once more.
            np.take(array, indices.numpy(), axis=0, out=rows.numpy(), mode="clip")
            inputs[key] = rows
        return inputs

    def _to_device(self, inputs: BatchIndices) -> BatchIndices:
        return {key: tensor.to(self._device, non_blocking=self._pinned) for key, tensor in inputs.items()}


def _as_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor without a copy."""
    # PyTorch warns about a map that is read only. Nothing writes to the frames.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def image_memory_budget(device: str) -> float:
    """Return how many bytes images may take on `device`."""
    # On a CPU the memory map is used in place.
    if not device.startswith("cuda"):
        return math.inf
    # What is free now: other processes may be using the same GPU.
    free, _ = torch.cuda.mem_get_info(device)
    return free * IMAGE_MEMORY_FRACTION
