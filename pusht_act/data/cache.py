"""Data sets decoded once into memory-mapped arrays, outside the project, shared by every run on the machine.

    LeRobotDataset v3.0 (parquet + mp4)  or  the embedded demonstrations
        -> <cache>/<content hash>/observation.image.npy  action.npy  ...  meta.json
        -> FrameDataset (np.memmap: pages are read on demand and shared between processes)

The folder's name is a hash of the content it was made from, so a changed data set is another folder and nothing ever
needs to be invalidated. It is made under a lock in a sibling and renamed into place.

meta.json holds the CRC-32 of each array's file and of itself, and all of it is read whenever a data set is opened: what
lost bytes, or has a bit that flipped, is made again. CRC-32 finds every run of up to 32 bits that changed, and other
damage but for one case in four billion; it is no protection from somebody who means harm. It runs at 2.5 GB/s: 0.3 s
for the 206 human demonstrations in pictures (0.7 GB), which training then finds in memory. What changes on disk or in
memory after a run has opened it is not found.
"""

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from pusht_act.runtime.atomic import new_dir

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of every key; raise it when the layout below changes."""


@dataclass(frozen=True)
class FrameDataset:
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

    def __len__(self) -> int:
        return int(self.episodes[-1, 1])

    @property
    def image_keys(self) -> list[str]:
        """The features that are pictures."""
        return [key for key, feature in self.features.items() if feature["dtype"] in ("video", "image")]


Allocate = Callable[[str, tuple[int, ...], str], np.ndarray]
"""(key, shape, dtype) -> the array on disk to fill."""


@dataclass(frozen=True)
class BuiltDataset:
    """What a builder returns once its arrays are filled: the rest of FrameDataset."""

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


def load_or_build(repo_id: str, key: str, build: Callable[[Allocate], BuiltDataset]) -> FrameDataset:
    """The frames stored under `key`; `build` makes them when they are not there or damaged.

    Several processes may ask at once: one builds, the others wait for it.

    Raises:
        OSError: the disk has no room for them.
    """
    folder = cache_root() / f"{key}-v{FORMAT}"
    if _find_corruption(folder) is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (damage := _find_corruption(folder)) is not None:  # nobody has made it meanwhile
                if folder.exists():
                    log.warning("the cached data set %s is damaged (%s): making it again", folder, damage)
                _build(folder, build)
    return _load(repo_id, folder)


def _build(folder: Path, build: Callable[[Allocate], BuiltDataset]) -> None:
    # A damaged one goes first: the disk may have no room for two.
    shutil.rmtree(folder, ignore_errors=True)
    with new_dir(folder) as part:
        _write(part, build)


def _write(part: Path, build: Callable[[Allocate], BuiltDataset]) -> None:
    arrays: dict[str, np.memmap] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(part).free
        if needed > free:
            raise OSError(
                f"{part.parent} has {free / 1e6:.0f} MB free, {name} of the decoded data set needs "
                f"{needed / 1e6:.0f} MB: free some or set PUSHT_ACT_CACHE to a folder on another disk"
            )
        arrays[name] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            part / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape
        )
        return arrays[name]

    contents = build(allocate)
    for array in arrays.values():
        array.flush()
    record = {
        "arrays": {name: _checksum(part / f"{name}.npy") for name in arrays},
        "episodes": contents.episodes.tolist(),
        "tasks": contents.tasks,
        "features": contents.features,
        "stats": contents.stats,
        "fps": contents.fps,
    }
    meta = json.dumps(record)
    (part / "meta.json").write_text(f"{zlib.crc32(meta.encode())}\n{meta}")


def _find_corruption(folder: Path) -> str | None:
    """The file in `folder` that is not what was written, and why; None when all are."""
    path = folder / "meta.json"
    try:
        checksum, meta = _read_meta(folder)
        if checksum != zlib.crc32(meta):
            return f"{path.name} is not what was written"
        for name, written in json.loads(meta)["arrays"].items():
            path = folder / f"{name}.npy"
            if _checksum(path) != written:
                return f"{path.name} is not what was written"
    except (OSError, ValueError) as error:  # a bad sector of the disk, too
        return f"{path.name}: {error.strerror if isinstance(error, OSError) else error}"
    return None


def _read_meta(folder: Path) -> tuple[int, bytes]:
    """The CRC-32 in the first line of meta.json, and the JSON after it."""
    checksum, _, meta = (folder / "meta.json").read_bytes().partition(b"\n")
    return int(checksum), meta


def _load(repo_id: str, folder: Path) -> FrameDataset:
    meta = json.loads(_read_meta(folder)[1])
    return FrameDataset(
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


def _checksum(path: Path) -> int:
    """CRC-32 of a file. By reads, not through the memory map: a bad sector is then an error, not the process's end."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
