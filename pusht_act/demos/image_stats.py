"""Statistics of images from their histogram: exact, in a few kilobytes, however many images there are."""

import numpy as np
from jaxtyping import Float64, Int64, UInt8

QUANTILES = (1, 10, 50, 90, 99)
"""LeRobot's, in percent."""


def count_values(image: UInt8[np.ndarray, "T H W 3"]) -> Int64[np.ndarray, "3 256"]:
    """Count how often each value occurs in each channel. The counts of several images add up."""
    return np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])


def image_stats(counts: Int64[np.ndarray, "3 256"]) -> dict[str, Float64[np.ndarray, " 3"]]:
    """Compute min, max, mean, std and q01 to q99 of each channel, in [0, 1], from its histogram."""
    value, share = np.arange(256) / 255.0, counts / counts.sum(axis=1, keepdims=True)
    mean = share @ value
    # Images have 256 values, so quantiles of the histogram are exact.
    below = np.cumsum(share, axis=1)
    return {
        "min": value[(counts > 0).argmax(axis=1)],
        "max": value[255 - (counts[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1)),
        **{f"q{q:02d}": value[(below >= q / 100).argmax(axis=1)] for q in QUANTILES},
    }
