"""The order in which training sees the samples."""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pusht_act.data.cache import FrameDataset
from pusht_act.data.lerobot import sampler_state


class EpisodeSampler:
    """Sample frames in the order of LeRobot's `EpisodeAwareSampler`, which yields one Python int at a time.

    Here an epoch is one permutation, a pure function of the seed, the epoch and the number of rollbacks: a resumed run
    needs no replay of the epochs before. A rollback returns to an earlier checkpoint after training has diverged, and
    continues in another order, so that it does not meet the same batches. Without one the order is LeRobot's.

    The last batch of an epoch is short, as in stock training (drop_last=False).

    Args:
        frames: The data set.
        episodes: Numbers of the episodes whose frames are sampled.
        seed: Seed of the permutations.
    """

    def __init__(self, frames: FrameDataset, episodes: list[int], seed: int) -> None:
        # Sorted: LeRobot's sampler goes through the episodes in order, and a permutation is of positions in this array.
        self.dataset = frames.key
        """Hash of the data set that is sampled."""
        bounds = frames.episodes[np.asarray(sorted(episodes))]
        self._seed = seed
        self._indices = np.concatenate([np.arange(start, stop) for start, stop in bounds])
        self._epoch, self._start_index, self._rollbacks = 0, 0, 0
        self._permutation = self._epoch_permutation()

    def __len__(self) -> int:
        return len(self._indices)

    def next_batch(self, batch_size: int) -> Int64[Tensor, " B"]:
        """Return the frame numbers of the next `batch_size` samples, fewer at the end of an epoch."""
        # Not right after the batch before: a run that ends with an epoch would draw the next permutation in vain.
        if self._start_index >= len(self):
            self.load_state_dict({"epoch": self._epoch + 1, "start_index": 0}, self._rollbacks)
        positions = self._permutation[self._start_index : self._start_index + batch_size]
        self._start_index += len(positions)
        return torch.from_numpy(self._indices[positions])

    @property
    def frames(self) -> Int64[Tensor, " N"]:
        """The numbers of all frames that are sampled."""
        return torch.from_numpy(self._indices)

    def draw(self, count: int, generator: torch.Generator) -> Int64[Tensor, " N"]:
        """Return up to `count` different frame numbers by `generator`, which leaves the order of training as it is."""
        return torch.from_numpy(self._indices[torch.randperm(len(self), generator=generator)[:count].numpy()])

    def state_dict(self) -> dict[str, int]:
        """Return the position in the form of LeRobot's sampler."""
        return {"epoch": self._epoch, "start_index": self._start_index}

    def load_state_dict(self, state: dict[str, int], rollbacks: int = 0) -> None:
        """Continue from a position.

        Args:
            state: From `state_dict` or `state_at`.
            rollbacks: How often the run has been rolled back; it changes the order.
        """
        self._epoch, self._start_index, self._rollbacks = state["epoch"], state["start_index"], rollbacks
        self._permutation = self._epoch_permutation()

    def state_at(self, step: int, batch_size: int, num_processes: int = 1) -> dict[str, int]:
        """Return the position of stock training after `step` steps; its checkpoints do not record it."""
        return sampler_state(step, len(self), batch_size, num_processes)

    def _epoch_permutation(self) -> np.ndarray:
        # Without rollbacks these are the numbers that LeRobot seeds its generator with.
        seeds = [self._seed, self._epoch, *([self._rollbacks] if self._rollbacks else [])]
        entropy = np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        return torch.randperm(len(self), generator=generator).numpy()
