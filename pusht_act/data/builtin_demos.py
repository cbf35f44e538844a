"""Open the built-in demonstrations as a data set: replay them in gym-pusht and render them, once.

The package ships seeds and actions only; observations are computed when the data set is first opened, and cached.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from tqdm import tqdm

from pusht_act.config.lerobot import PushtEnv
from pusht_act.config.schema import EMBEDDED_REPO_ID
from pusht_act.data.cache import Allocate, BuiltDataset, FrameDataset, load_or_build
from pusht_act.demos import builtin
from pusht_act.demos.expert import Demonstration
from pusht_act.demos.features import FEATURES, TASK
from pusht_act.demos.mirror import with_mirror_images
from pusht_act.demos.replay import ReplayedEpisode, replay_all
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.system import cores

log = logging.getLogger(__name__)


def open_builtin_demos(count: int, env: PushtEnv, mirror: bool = False) -> FrameDataset:
    """Open the first `count` built-in demonstrations with the observations that `env` gives.

    Args:
        count: Number of demonstrations.
        env: Its obs_type decides between images and keypoints.
        mirror: Follow each demonstration by its mirror image, where that solves the task, too.

    Raises:
        UserError: The file of demonstrations is damaged, or one of them no longer solves the task when replayed.
    """
    image = env.obs_type == "pixels_agent_pos"
    # Everything that the frames depend on; with mirror=False the key is that of versions without mirror images.
    source = [builtin.SHA256, count, image, version("gym-pusht"), version("pymunk"), *(["mirror"] if mirror else [])]
    key = hashlib.sha256(repr(source).encode()).hexdigest()[:24]
    return load_or_build(EMBEDDED_REPO_ID, f"demos-{key}", partial(_build, builtin.load(count), image, mirror))


def _build(demos: list[Demonstration], image: bool, mirror: bool, allocate: Allocate) -> BuiltDataset:
    count, more = len(demos), ", with images" if image else ""
    if mirror:
        demos = list(with_mirror_images(tqdm(demos, "mirroring", unit="demo", disable=None)))
        more = f" and {len(demos) - count:,} of their mirror images{more}"
    log.info("replaying %s built-in demonstrations%s once", f"{count:,}", more)

    # Episode i has frames bounds[i] to bounds[i + 1].
    bounds = np.concatenate([[0], np.cumsum([len(demo.action) for demo in demos])])
    total = int(bounds[-1])
    keys = ["observation.image" if image else "observation.environment_state", "observation.state", "action"]
    arrays = {
        key: allocate(key, (total, 3, 96, 96) if key.endswith("image") else (total, *FEATURES[key]["shape"]), dtype)
        for key in keys
        for dtype in ["uint8" if key.endswith("image") else "float32"]
    }
    for i, episode in _replay(demos, image):
        # Other versions of the physics may have changed the outcome; such labels must not be trained on.
        if not episode.success[-1]:
            raise UserError(
                f"built-in demonstration {i} does not solve PushT when replayed with gym-pusht {version('gym-pusht')} "
                f"and pymunk {version('pymunk')}: install the versions that pyproject.toml names"
            )
        _store(arrays, slice(bounds[i], bounds[i + 1]), episode)
    return BuiltDataset(
        episodes=np.stack([bounds[:-1], bounds[1:]], axis=1),
        tasks=[TASK] * len(demos),
        # As LeRobot has them, so that a checkpoint says the same whatever data set it was trained on.
        features={key: FEATURES[key] for key in keys},
        stats={key: _stats(array) for key, array in arrays.items()},
        fps=10,
    )


def _store(arrays: dict[str, np.ndarray], rows: slice, episode: ReplayedEpisode) -> None:
    arrays["observation.state"][rows] = episode.observation_state
    arrays["action"][rows] = episode.action
    if episode.image is None:
        arrays["observation.environment_state"][rows] = episode.environment_state
    else:
        # Channels first, as PyTorch takes images.
        arrays["observation.image"][rows] = episode.image.transpose(0, 3, 1, 2)


def _replay(demos: Sequence[Demonstration], image: bool) -> Iterator[tuple[int, ReplayedEpisode]]:
    """Yield the number of each demonstration and its replay, in order."""
    trajectories = [(demo.start, demo.action) for demo in demos]
    with closing(replay_all(trajectories, image, cores())) as episodes:
        yield from enumerate(tqdm(episodes, "replaying", len(trajectories), unit="demo", disable=None))


def _stats(array: np.ndarray) -> dict[str, Any]:
    """Compute LeRobot's statistics of one feature; those of images are by channel, in [0, 1], shape (3, 1, 1)."""
    image = array.dtype == np.uint8
    axes = (0, 2, 3) if image else (0,)
    scale = 255.0 if image else 1.0

    def parts() -> Iterator[tuple[float, np.ndarray]]:
        """Yield 1,000 frames at a time with their weight: a float64 copy of all images would not fit in memory."""
        for i in range(0, len(array), 1000):
            part = array[i : i + 1000].astype(np.float64) / scale
            yield len(part) / len(array), part

    mean = sum(weight * part.mean(axes, keepdims=image) for weight, part in parts())
    variance = sum(weight * ((part - mean) ** 2).mean(axes, keepdims=image) for weight, part in parts())
    named = {
        "min": array.min(axes).astype(np.float64) / scale,
        "max": array.max(axes).astype(np.float64) / scale,
        "mean": mean,
        "std": np.sqrt(variance),
    }
    shape = (3, 1, 1) if image else (array.shape[1],)
    return {name: np.asarray(value).reshape(shape).tolist() for name, value in named.items()} | {"count": [len(array)]}
