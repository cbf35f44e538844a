"""The random streams of a run, each derived from its seed.

The order of the data is a pure function of (seed, epoch), see `data`. Evaluation resets environments with seeds of its
own (eval.start_seed + episode). Everything else draws from PyTorch's global generator: first the initial weights, then
dropout and the VAE's noise, step by step. The functions below seed it before each of the two.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_initialisation(seed: int) -> None:
    """Seed the global generators before the policy is built, the same on every rank."""
    # As LeRobot's `set_seed` does, so that initial weights equal those of stock lerobot-train.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_training_noise(seed: int, process: int = 0) -> None:
    """Seed dropout and the VAE's noise after the policy is built, so that they do not depend on how it was built.

    Args:
        seed: The run's seed.
        process: The rank. Each has noise of its own, since its samples are different ones.
    """
    # Rank 0's stream has no number in its name, so that it is that of a run with a single process.
    torch.manual_seed(_derived(seed, f"training noise of process {process}" if process else "training noise"))


def statistics_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator that draws the frames of batch norm's statistics at `step`, apart from training's."""
    return torch.Generator().manual_seed(_derived(seed, f"statistics at step {step}"))


@contextmanager
def preserved_random_streams(device: torch.device) -> Iterator[None]:
    """Leave the global generators, those of `device` included, as they were before the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _derived(seed: int, stream: str) -> int:
    """Return a seed for `stream`, different from that of any other stream and from small numbers."""
    return int(np.random.SeedSequence([seed, *stream.encode()]).generate_state(1, dtype=np.uint64)[0])
