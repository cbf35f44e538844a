"""The embedded demonstrations as a data set: replayed and rendered at first use."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from lerobot.envs.configs import PushtEnv
from tqdm import tqdm

from pusht_act.config.schema import EMBEDDED_REPO_ID
from pusht_act.data.cache import Allocate, BuiltDataset, FrameDataset, load_or_build
from pusht_act.demos import builtin as embedded
from pusht_act.demos.expert import Demonstration
from pusht_act.demos.features import FEATURES, TASK
from pusht_act.demos.mirror import with_mirror_images
from pusht_act.demos.replay import ReplayedEpisode, replay_all
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.system import cores

log = logging.getLogger(__name__)


def open_builtin_demos(count: int, env: PushtEnv, mirror: bool = False) -> FrameDataset:
    """The first `count` embedded demonstrations, with the observations that `env` gives.

    Args:
        mirror: whether each is followed by its mirror image, where that solves the task, too.

    Raises:
        UserError: the embedded file is damaged, or a demonstration no longer solves the task when replayed.
    """
    image = env.obs_type == "pixels_agent_pos"
    made_of = [embedded.SHA256, count, image, version("gym-pusht"), version("pymunk"), *(["mirror"] if mirror else [])]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
    return load_or_build(EMBEDDED_REPO_ID, f"demos-{key}", partial(_build, embedded.load(count), image, mirror))


def _build(demonstrations: list[Demonstration], image: bool, mirror: bool, allocate: Allocate) -> BuiltDataset:
    count, more = len(demonstrations), ", with pictures" if image else ""
    if mirror:
        demonstrations = list(with_mirror_images(tqdm(demonstrations, "mirroring", unit="demo", disable=None)))
        more = f" and {len(demonstrations) - count:,} of their mirror images{more}"
    log.info("replaying %s embedded demonstrations%s once", f"{count:,}", more)
    bounds = _bounds(demonstrations)
    keys = ["observation.image" if image else "observation.environment_state", "observation.state", "action"]
    total = int(bounds[-1])
    arrays = {
        key: allocate(key, (total, 3, 96, 96) if key.endswith("image") else (total, *FEATURES[key]["shape"]), dtype)
        for key in keys
        for dtype in ["uint8" if key.endswith("image") else "float32"]
    }
    for i, episode in _replayed(demonstrations, image):
        if not episode.success[-1]:
            raise UserError(
                f"embedded demonstration {i} does not solve PushT when replayed with gym-pusht {version('gym-pusht')} "
                f"and pymunk {version('pymunk')}: install the versions that pyproject.toml names"
            )
        _put(arrays, slice(bounds[i], bounds[i + 1]), episode)
    return BuiltDataset(
        episodes=np.stack([bounds[:-1], bounds[1:]], axis=1),
        tasks=[TASK] * len(demonstrations),
        features={key: FEATURES[key] for key in keys},
        stats={key: _stats(array) for key, array in arrays.items()},
        fps=10,
    )


def _bounds(trajectories: Sequence[Demonstration]) -> np.ndarray:
    """The first frame of each, and the one after the last."""
    return np.concatenate([[0], np.cumsum([len(each.action) for each in trajectories])])


def _put(arrays: dict[str, np.ndarray], rows: slice, episode: ReplayedEpisode) -> None:
    arrays["observation.state"][rows] = episode.observation_state
    arrays["action"][rows] = episode.action
    if episode.image is None:
        arrays["observation.environment_state"][rows] = episode.environment_state
    else:
        arrays["observation.image"][rows] = episode.image.transpose(0, 3, 1, 2)


def _replayed(trajectories: Sequence[Demonstration], image: bool) -> Iterator[tuple[int, ReplayedEpisode]]:
    """Each with its number, in order."""
    pairs = [(each.start, each.action) for each in trajectories]
    with closing(replay_all(pairs, image, cores())) as episodes:
        yield from enumerate(tqdm(episodes, "replaying", len(pairs), unit="demo", disable=None))


def _stats(array: np.ndarray) -> dict[str, Any]:
    """LeRobot's statistics of one feature: of pictures by channel, in [0, 1], shape (3, 1, 1)."""
    picture = array.dtype == np.uint8
    axes = (0, 2, 3) if picture else (0,)
    scale = 255.0 if picture else 1.0
    # By episodes' worth of frames: a float64 copy of all pictures would not fit in memory.
    parts = [array[i : i + 1000].astype(np.float64) / scale for i in range(0, len(array), 1000)]
    weights = [len(part) / len(array) for part in parts]
    mean = sum(w * part.mean(axes, keepdims=picture) for w, part in zip(weights, parts, strict=True))
    square = sum(w * ((part - mean) ** 2).mean(axes, keepdims=picture) for w, part in zip(weights, parts, strict=True))
    low = np.min([part.min(axes, keepdims=picture) for part in parts], axis=0)
    high = np.max([part.max(axes, keepdims=picture) for part in parts], axis=0)
    named = {"min": low, "max": high, "mean": mean, "std": np.sqrt(square)}
    shape = (3, 1, 1) if picture else (array.shape[1],)
    return {name: np.asarray(value).reshape(shape).tolist() for name, value in named.items()} | {"count": [len(array)]}
