"""Confidence intervals of success rates."""

import math
from statistics import NormalDist


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a success rate, both ends in [0, 1] (Wilson 1927).

    Unlike the normal approximation it keeps its coverage at rates near 0 and 1, which trained policies reach.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / episodes
    centre = rate + z * z / (2 * episodes)
    spread = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    scale = 1 + z * z / episodes
    # Rounding may put an end a hair outside [0, 1].
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
