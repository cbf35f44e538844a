"""The order of the samples: LeRobot's, as whole arrays."""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pusht_act.data.cache import FrameDataset


class EpisodeSampler:
    """The order of LeRobot's `EpisodeAwareSampler`: a pure function of (seed, epoch), so a resume needs no replay.

    After roll-backs, of their number too; 0 gives LeRobot's order.

    The same permutation, but whole epochs as arrays: the sampler itself yields one Python int at a time. An epoch's
    last batch is short, as in stock training (drop_last=False).
    """

    def __init__(self, frames: FrameDataset, episodes: list[int], seed: int) -> None:
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
        from lerobot.datasets.sampler import compute_sampler_state  # not at the top, see config/lerobot.py

        state: dict[str, int] = compute_sampler_state(step, len(self), batch_size, num_processes)
        return state

    def _epoch_permutation(self) -> np.ndarray:
        seeds = [self._seed, self._epoch, *([self._rollbacks] if self._rollbacks else [])]
        entropy = np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        return torch.randperm(len(self), generator=generator).numpy()
