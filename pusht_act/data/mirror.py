"""Mirror images of samples and the statistics of a data set together with them.

The goal's stem lies on the diagonal x + y = ARENA, and the T is symmetric about its stem. The reflection across that
diagonal, (x, y) -> (ARENA - y, ARENA - x), maps the task to itself, but for the walls, which are a pixel off: of the
2,000 built-in demonstrations, 64 do not solve it when they are reflected.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pusht_act.data.cache import FrameDataset
from pusht_act.data.lerobot import ACTION
from pusht_act.envs.simulator import ARENA
from pusht_act.runtime.errors import UserError

STATE, KEYPOINTS = "observation.state", "observation.environment_state"
OTHER_SIDE = [1, 0, 3, 2, 5, 4, 7, 6]
"""Which keypoint of the block each one becomes: those left of the stem become those right of it."""


def reflect_points(points: Float[Tensor, "*N 2"]) -> Float[Tensor, "*N 2"]:
    """Reflect points x, y (px) across the goal's axis."""
    return ARENA - points.flip(-1)


def reflect_keypoints(points: Float[Tensor, "*N 16"]) -> Float[Tensor, "*N 16"]:
    """Reflect the block's keypoints x0, y0, x1, ... (px)."""
    return reflect_points(points.view(*points.shape[:-1], -1, 2)[..., OTHER_SIDE, :]).flatten(-2)


def reflect_image(image: Float[Tensor, "*N H W"]) -> Float[Tensor, "*N H W"]:
    """Reflect square images: in pixels the axis is the other diagonal."""
    return image.transpose(-1, -2).flip(-1, -2)


REFLECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    ACTION: reflect_points,
    STATE: reflect_points,
    KEYPOINTS: reflect_keypoints,
}
"""How each feature but the images is reflected."""


def check_mirror(frames: FrameDataset) -> None:
    """Refuse a data set with features whose mirror image is not known.

    Raises:
        UserError: naming one.
    """
    for key, array in frames.arrays.items():
        square = key in frames.image_keys and array.shape[-1] == array.shape[-2]
        if not square and key not in REFLECTIONS:
            raise UserError(
                f"train.mirror: the mirror image of {key} {list(array.shape[1:])} of {frames.repo_id} is not known: "
                "give train.mirror=0"
            )


def statistics_with_mirror_images(frames: FrameDataset) -> dict[str, dict[str, Any]]:
    """Return LeRobot's statistics of each feature over all frames and their mirror images.

    Those of images are by channel, so that a reflection does not change them.
    """
    statistics = dict(frames.stats)
    for key, reflect in REFLECTIONS.items():
        if key in frames.arrays:
            array = torch.from_numpy(frames.arrays[key].astype(np.float64))
            both = torch.cat([array, reflect(array)]).numpy()
            statistics[key] = {name: _statistic(name, both) for name in frames.stats[key]}
    return statistics


def _statistic(name: str, values: Float[np.ndarray, "N D"]) -> list[float]:
    """Compute the statistic that LeRobot calls `name`."""
    found: np.ndarray
    match name:
        case "count":
            found = np.array([len(values)])
        case "min" | "max" | "mean" | "std":
            found = getattr(values, name)(axis=0)
        case _:
            # q01, q10, ...
            found = np.quantile(values, float(name[1:]) / 100, axis=0)
    listed: list[float] = found.tolist()
    return listed
