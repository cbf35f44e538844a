"""From a data set to batches, without worker processes: frames are resident on the device, a batch is one gather.

FrameDataset, all N frames, memory-mapped            EpisodeSampler(seed): LeRobot's order of epoch 0, 1, ...
  observation.image   uint8   [N, 3, H, W]                          |
  observation.state   float32 [N, 2]                                | indices [B]
  action              float32 [N, 2]                                v
          |                                   BatchLoader.batch(indices)
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

import numpy as np
import torch
from jaxtyping import Int64
from lerobot.utils.constants import ACTION
from torch import Tensor

from pusht_act.data.cache import FrameDataset
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.runtime.distributed import shard

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
BatchIndices = dict[str, Tensor]
"""What a batch is gathered from: its frame numbers, and the pictures that are not on the device."""
INDEX = "index"
"""The frame numbers in Inputs."""
PREFETCH_BATCHES = 4
"""Batches of pictures read before the step that wants them."""
IMAGE_MEMORY_FRACTION = 0.5
"""Of the device's free memory: the rest is training's and evaluation's."""


class BatchLoader:
    """The samples of `frames`, gathered into batches on the device.

    All frames are moved there once. Pictures that take more than `room` bytes of it stay in the memory map; their rows
    are read on the host and sent, some batches ahead of the step that wants them.
    """

    def __init__(self, frames: FrameDataset, chunk_size: int, device: str, room: float | None = None) -> None:
        pictures = sum(frames.arrays[key].nbytes for key in frames.image_keys)
        room = image_memory_budget(device) if room is None else room
        on_host = frames.image_keys if pictures > room else []
        if on_host:
            log.info(
                "the pictures take %.3g GB, %s has room for %.3g: they are read from the cache, %d batches ahead",
                pictures / 1e9, device, room / 1e9, PREFETCH_BATCHES,
            )  # fmt: skip
        self._on_host = {key: frames.arrays[key] for key in on_host}
        self._arrays = {k: torch.from_numpy(a).to(device) for k, a in frames.arrays.items() if k not in on_host}
        self._images = frames.image_keys
        lengths = np.diff(frames.episodes, axis=1).ravel()
        self._last_frame = torch.from_numpy(np.repeat(frames.episodes[:, 1] - 1, lengths)).to(device)
        self._offsets = torch.arange(chunk_size, device=device)
        self._device = device
        self._pinned = device.startswith("cuda")  # only from pinned memory is a copy not waited for

    def iter_batches(self, order: EpisodeSampler, batch_size: int) -> Generator[BatchIndices]:
        """Batch after batch of `order`, for `gather`; `order` counts those that were taken, not those read ahead.

        Of several processes, this one's share of each.
        """
        if not self._on_host:
            while True:
                yield self._to_device(self._read(shard(order.next_batch(batch_size))))
        ahead = copy.copy(order)
        with ThreadPoolExecutor(1, "pictures") as thread:
            coming = deque(
                thread.submit(self._read, shard(ahead.next_batch(batch_size))) for _ in range(PREFETCH_BATCHES)
            )
            while True:
                inputs = coming.popleft().result()
                coming.append(thread.submit(self._read, shard(ahead.next_batch(batch_size))))
                order.next_batch(batch_size)
                yield self._to_device(inputs)

    def gather(self, inputs: BatchIndices) -> Batch:
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
        return self.gather(self._to_device(self._read(indices)))

    def _read(self, indices: Int64[Tensor, " B"]) -> BatchIndices:
        """What is not on the device yet, in memory that it can be copied from without waiting."""
        inputs = {INDEX: indices.pin_memory() if self._pinned else indices}
        for key, array in self._on_host.items():
            rows = torch.empty((len(indices), *array.shape[1:]), dtype=torch.uint8, pin_memory=self._pinned)
            np.take(array, indices.numpy(), axis=0, out=rows.numpy(), mode="clip")  # "raise" would copy once more
            inputs[key] = rows
        return inputs

    def _to_device(self, inputs: BatchIndices) -> BatchIndices:
        return {key: tensor.to(self._device, non_blocking=self._pinned) for key, tensor in inputs.items()}


def image_memory_budget(device: str) -> float:
    """Bytes of `device` that pictures may take; what is in the CPU's memory map is there already."""
    if not device.startswith("cuda"):
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free * IMAGE_MEMORY_FRACTION
