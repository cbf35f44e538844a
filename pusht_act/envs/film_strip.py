"""A rollout at one glance: pictures of it side by side."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

GAP, CAPTION = 4, 18


def film_strip(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]], success: bool, seed: int | None, pictures: int = 8, size: int = 160
) -> Image.Image:
    """`pictures` of `frames`, evenly spaced from the first to the last, each `size` pixels wide, the step below it.

    `seed` is that of the reset; None: it began from a given state.
    """
    steps = np.unique(np.linspace(0, len(frames) - 1, pictures).round().astype(int))
    strip = Image.new("RGB", (len(steps) * (size + GAP) - GAP, size + CAPTION), "white")
    draw = ImageDraw.Draw(strip)
    for column, step in enumerate(steps):
        x = column * (size + GAP)
        strip.paste(Image.fromarray(frames[step]).resize((size, size), Image.Resampling.LANCZOS), (x, 0))
        caption = f"step {step}"
        if step == steps[0]:
            caption += ", given start" if seed is None else f", seed {seed}"
        if step == steps[-1]:
            caption += ", success" if success else ", not solved"
        draw.text((x + 2, size + 3), caption, fill="black")
    return strip
