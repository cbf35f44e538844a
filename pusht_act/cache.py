"""Data sets decoded once into memory-mapped arrays, outside the project, shared by every run on the machine.

    LeRobotDataset v3.0 (parquet + mp4)  or  the embedded demonstrations  (and DAgger's labels after either)
        -> <cache>/<content hash>/observation.image.npy  action.npy  ...  meta.json
        -> Frames (np.memmap: pages are read on demand and shared between processes)

The folder's name is a hash of the content it was made from, so a changed data set is another folder and nothing ever
needs to be invalidated. It is made under a lock in a sibling and renamed into place.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key; raise it when the layout below changes."""


@dataclass(frozen=True)
class Frames:
    """All frames of a data set, in order, episode after episode.

    `arrays[key]` is [N, ...]: images uint8 [N, 3, H, W], the rest float32 [N, D]; `episodes` is int64 [E, 2], the first
    frame of each episode and the one after its last; `tasks` holds one text an episode; `features` and `stats` are
    LeRobot's info.json and stats.json.
    """

    repo_id: str
    arrays: dict[str, np.ndarray]
    episodes: np.ndarray
    tasks: list[str]
    features: dict[str, Any]
    stats: dict[str, Any]
    fps: int
    key: str = ""
    """What `cached` stores them under, a hash of their content; empty for frames that were made otherwise."""
    n_labels: int = 0
    """How many episodes at the end are labels of DAgger (demos/labels.py) and not the data set's own."""

    def __len__(self) -> int:
        return int(self.episodes[-1, 1])

    @property
    def image_keys(self) -> list[str]:
        """The features that are pictures."""
        return [key for key, feature in self.features.items() if feature["dtype"] in ("video", "image")]


Allocate = Callable[[str, tuple[int, ...], str], np.ndarray]
"""(key, shape, dtype) -> the array on disk to fill."""


@dataclass(frozen=True)
class Contents:
    """What a builder returns once its arrays are filled: the rest of Frames."""

    episodes: np.ndarray
    tasks: list[str]
    features: dict[str, Any]
    stats: dict[str, Any]
    fps: int


def cache_root() -> Path:
    """PUSHT_ACT_CACHE, else `pusht_act` in the user's cache folder."""
    if root := os.environ.get("PUSHT_ACT_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pusht_act"


def cached(repo_id: str, key: str, build: Callable[[Allocate], Contents]) -> Frames:
    """The frames stored under `key`; `build` makes them when they are not there or damaged.

    Several processes may ask at once: one builds, the others wait for it.

    Raises:
        OSError: the disk has no room for them.
    """
    folder = cache_root() / f"{key}-v{FORMAT}"
    if (frames := _opened(repo_id, folder)) is not None:
        return frames
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (frames := _opened(repo_id, folder)) is None:
            _build(folder, build)
            frames = _opened(repo_id, folder)
    assert frames is not None
    return frames


def _build(folder: Path, build: Callable[[Allocate], Contents]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    for stale in (part, folder):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir()
    arrays: dict[str, np.memmap] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(part).free
        if needed > free:
            raise OSError(
                f"{folder.parent} has {free / 1e6:.0f} MB free, {name} of the decoded data set needs "
                f"{needed / 1e6:.0f} MB: free some or set PUSHT_ACT_CACHE to a folder on another disk"
            )
        arrays[name] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            part / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape
        )
        return arrays[name]

    try:
        contents = build(allocate)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for array in arrays.values():
        array.flush()
    meta = {
        "arrays": {name: (part / f"{name}.npy").stat().st_size for name in arrays},
        "episodes": contents.episodes.tolist(),
        "tasks": contents.tasks,
        "features": contents.features,
        "stats": contents.stats,
        "fps": contents.fps,
    }
    (part / "meta.json").write_text(json.dumps(meta))
    part.rename(folder)


def _opened(repo_id: str, folder: Path) -> Frames | None:
    """The frames in `folder`; None when it is not there or an array has lost bytes (then it is made again)."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("the cached data set %s is damaged: decoding again", folder)
        return None
    for name, size in meta["arrays"].items():
        path = folder / f"{name}.npy"
        if not path.exists() or path.stat().st_size != size:
            log.warning("the cached data set %s is damaged (%s.npy): decoding again", folder, name)
            return None
    return Frames(
        repo_id=repo_id,
        # "c", copy on write: PyTorch warns at arrays that it could not write to; nobody does.
        arrays={name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in meta["arrays"]},
        episodes=np.asarray(meta["episodes"], dtype=np.int64).reshape(-1, 2),
        tasks=meta["tasks"],
        features=meta["features"],
        stats=meta["stats"],
        fps=meta["fps"],
        key=folder.name,
    )
