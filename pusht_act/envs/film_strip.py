"""An episode at a glance: some of its frames side by side."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

GAP, CAPTION = 4, 18
"""Width between two images and height of the line below them, px."""


def film_strip(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]], success: bool, seed: int | None, images: int = 8, size: int = 160
) -> Image.Image:
    """Draw frames of an episode side by side, captioned with their steps.

    Args:
        frames: All frames of the episode.
        success: Whether the episode succeeded; written under the last image.
        seed: Seed of the reset; None where the episode started from a given state.
        images: Number of frames to show, evenly spaced from the first to the last.
        size: Width and height of each image, px.
    """
    # A short episode has fewer frames than images are asked for; show each of them once.
    steps = np.unique(np.linspace(0, len(frames) - 1, images).round().astype(int))
    strip = Image.new("RGB", (len(steps) * (size + GAP) - GAP, size + CAPTION), "white")
    draw = ImageDraw.Draw(strip)
    for column, step in enumerate(steps):
        # Captions name the seed in the first column and the outcome in the last.
        x = column * (size + GAP)
        strip.paste(Image.fromarray(frames[step]).resize((size, size), Image.Resampling.LANCZOS), (x, 0))
        caption = f"step {step}"
        if step == steps[0]:
            caption += ", given start" if seed is None else f", seed {seed}"
        if step == steps[-1]:
            caption += ", success" if success else ", not solved"
        draw.text((x + 2, size + 3), caption, fill="black")
    return strip
