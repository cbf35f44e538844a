"""Open the built-in demonstrations as a data set: replay them in gym-pusht and render them, once.

The package ships seeds and actions only; observations are computed when the data set is first opened, and cached.
"""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from tqdm.auto import tqdm

from pusht_act.config.lerobot import PushtEnv
from pusht_act.config.schema import EMBEDDED_REPO_ID
from pusht_act.data.cache import Allocate, BuiltDataset, FrameDataset, load_or_build
from pusht_act.demos import builtin
from pusht_act.demos.expert import Demonstration
from pusht_act.demos.features import FEATURES, TASK
from pusht_act.demos.image_stats import count_values, image_stats
from pusht_act.demos.replay import replay_all
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.system import cores


def open_builtin_demos(count: int, env: PushtEnv) -> FrameDataset:
    """Open the first `count` built-in demonstrations with the observations that `env` gives.

    Args:
        count: Number of demonstrations.
        env: Its obs_type decides between images and keypoints.

    Raises:
        UserError: The file of demonstrations is damaged, or one of them no longer solves the task when replayed.
    """
    image = env.obs_type == "pixels_agent_pos"
    # Everything that the frames depend on.
    source = [builtin.SHA256, count, image, version("gym-pusht"), version("pymunk")]
    key = hashlib.sha256(repr(source).encode()).hexdigest()[:24]
    return load_or_build(EMBEDDED_REPO_ID, f"demos-{key}", partial(_build, builtin.load(count), image))


def _build(demos: list[Demonstration], image: bool, allocate: Allocate) -> BuiltDataset:
    task = f"{'rendering' if image else 'replaying'} {len(demos):,} built-in demonstrations"
    # Episode i has frames bounds[i] to bounds[i + 1].
    bounds = np.concatenate([[0], np.cumsum([len(demo.action) for demo in demos])])
    total = int(bounds[-1])
    keys = ["observation.image" if image else "observation.environment_state", "observation.state", "action"]
    arrays = allocate(f"{task}, {total:,} frames", {key: _array_spec(key, total) for key in keys})
    counts = _fill(arrays, bounds, demos, image)
    return BuiltDataset(
        episodes=np.stack([bounds[:-1], bounds[1:]], axis=1),
        tasks=[TASK] * len(demos),
        # As LeRobot has them, so that a checkpoint says the same whatever data set it was trained on.
        features={key: FEATURES[key] for key in keys},
        stats={
            key: _image_stats(counts, total) if key == "observation.image" else _stats(array)
            for key, array in arrays.items()
        },
        fps=10,
    )


def _array_spec(key: str, total: int) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a feature's array."""
    # Images channels first, as PyTorch takes them.
    return (
        ((total, 3, 96, 96), "uint8") if key == "observation.image" else ((total, *FEATURES[key]["shape"]), "float32")
    )


def _fill(
    arrays: dict[str, np.ndarray], bounds: Int64[np.ndarray, " E+1"], demos: list[Demonstration], image: bool
) -> Int64[np.ndarray, "3 256"]:
    """Replay the demonstrations into the arrays and return the histogram of the images' channels."""
    counts = np.zeros((3, 256), np.int64)
    trajectories = [(demo.start, demo.action) for demo in demos]
    description = "rendering" if image else "replaying"
    with (
        closing(replay_all(trajectories, image, cores())) as episodes,
        tqdm(total=int(bounds[-1]), desc=description, unit="frame", disable=None) as bar,
    ):
        for i, episode in enumerate(episodes):
            # Other versions of the physics may have changed the outcome; such labels must not be trained on.
            if not episode.success[-1]:
                raise UserError(
                    f"built-in demonstration {i} does not solve PushT when replayed with gym-pusht "
                    f"{version('gym-pusht')} and pymunk {version('pymunk')}: install the versions that pyproject.toml "
                    "names"
                )
            rows = slice(bounds[i], bounds[i + 1])
            arrays["observation.state"][rows] = episode.observation_state
            arrays["action"][rows] = episode.action
            if episode.image is None:
                arrays["observation.environment_state"][rows] = episode.environment_state
            else:
                arrays["observation.image"][rows] = episode.image.transpose(0, 3, 1, 2)
                # Now, while the images are at hand: on the disk they may be more than fit in memory.
                counts += count_values(episode.image)
            bar.update(len(episode.action))
    return counts


def _image_stats(counts: Int64[np.ndarray, "3 256"], frames: int) -> dict[str, Any]:
    """Return the statistics of the images, by channel, in [0, 1], shape (3, 1, 1)."""
    found = image_stats(counts)
    named = {name: found[name].reshape(3, 1, 1).tolist() for name in ("min", "max", "mean", "std")}
    return named | {"count": [frames]}


def _stats(array: Float32[np.ndarray, "N D"]) -> dict[str, Any]:
    """Compute LeRobot's statistics of a feature that is not an image."""

    def parts() -> Iterator[tuple[float, np.ndarray]]:
        """Yield 1,000 frames at a time in float64, with their weight."""
        for i in range(0, len(array), 1000):
            part = array[i : i + 1000].astype(np.float64)
            yield len(part) / len(array), part

    mean = sum(weight * part.mean(0) for weight, part in parts())
    variance = sum(weight * ((part - mean) ** 2).mean(0) for weight, part in parts())
    named = {
        "min": array.min(0).astype(np.float64),
        "max": array.max(0).astype(np.float64),
        "mean": mean,
        "std": np.sqrt(variance),
    }
    return {name: np.asarray(value).tolist() for name, value in named.items()} | {"count": [len(array)]}
