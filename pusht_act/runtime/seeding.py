"""The random streams of a run, each a named function of its seed.

Data order is a pure function of (seed, epoch) in data.py; evaluation resets its environments with seeds of its own
(eval.start_seed + episode). What is left draws from PyTorch's global generator: initialisation first, then dropout and
the VAE's noise, step after step, each from the start that this module gives it. Several processes initialise alike.
"""

import random

import numpy as np
import torch


def seed_initialisation(seed: int) -> None:
    """Before the policy is made: what stock lerobot-train's `set_seed` does, so that fresh weights equal stock's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_training_noise(seed: int, process: int = 0) -> None:
    """After the policy is made: dropout and VAE noise do not depend on how many numbers initialisation drew.

    Of several processes each has its own, as their samples are different ones.
    """
    torch.manual_seed(_derived(seed, f"training noise of process {process}" if process else "training noise"))


def _derived(seed: int, stream: str) -> int:
    """A seed for `stream` that no other stream or small seed shares."""
    return int(np.random.SeedSequence([seed, *stream.encode()]).generate_state(1, dtype=np.uint64)[0])
