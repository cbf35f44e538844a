"""Cache decoded data sets as memory-mapped arrays that all runs on the machine share.

    LeRobotDataset v3.0 (parquet + mp4)  or  the built-in demonstrations
        -> <cache>/<content hash>/observation.image.npy  action.npy  ...  meta.json
        -> FrameDataset (np.memmap: pages are read on demand and shared between processes)

The name of the folder is a hash of its source, so a changed data set gets another folder and nothing ever needs to be
invalidated. The folder is built beside its final place, under a lock, and then renamed.

meta.json holds a CRC-32 of each array's file and of itself. All of them are checked whenever a data set is opened, and
a damaged folder is built again. CRC-32 detects every burst of up to 32 changed bits, and misses other damage once in
four billion cases; it does not protect from an attacker. It runs at 2.5 GB/s: 0.3 s for the images of the 206 human
demonstrations (0.7 GB), which training then finds in the page cache. Changes after a run has opened the folder are not
detected.

Nothing here holds more than a few megabytes of a data set. The pages of the map belong to the kernel, which writes them
out and drops them when it needs memory. A data set may be larger than the machine's memory.
"""

import json
import logging
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from pusht_act.runtime.atomic import new_dir

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of every folder's name; increase it when the layout changes, or what the same files are decoded to."""
BAR_DELAY_S = 1.0
"""How long writing and checking take before a progress bar shows them."""
FLUSH_BYTES = 64 << 20
"""How much of an array is written to the disk at a time; a multiple of the size of a page."""


@dataclass(frozen=True)
class FrameDataset:
    """All frames of a data set in order, one episode after the other."""

    repo_id: str
    arrays: dict[str, np.ndarray]
    """By feature: images uint8 [N, 3, H, W], the rest float32 [N, D]."""
    episodes: np.ndarray
    """int64 [E, 2]: the first frame of each episode, and the one after its last."""
    tasks: list[str]
    """The text of each episode's task."""
    features: dict[str, Any]
    """The features of LeRobot's info.json."""
    stats: dict[str, Any]
    """LeRobot's stats.json."""
    fps: float
    key: str = ""
    """Hash of the content, by which runs know the data set again; empty for frames that are not from the cache."""
    incomplete: dict[int, str] = field(default_factory=dict)
    """Episodes that lack a picture, and which one."""
    notice: str = ""
    """What is said of the data set whenever it is opened; empty where nothing is odd."""

    def __len__(self) -> int:
        return int(self.episodes[-1, 1])

    @property
    def image_keys(self) -> list[str]:
        """The features that are images."""
        return [key for key, feature in self.features.items() if feature["dtype"] in ("video", "image")]


Allocate = Callable[[str, dict[str, tuple[tuple[int, ...], str]]], dict[str, np.ndarray]]
"""(what is about to be done, shape and dtype of each feature) -> arrays on disk to fill. Called once."""


@dataclass(frozen=True)
class BuiltDataset:
    """What a builder returns once it has filled its arrays: the other fields of FrameDataset."""

    episodes: np.ndarray
    tasks: list[str]
    features: dict[str, Any]
    stats: dict[str, Any]
    fps: float
    incomplete: dict[int, str] = field(default_factory=dict)
    notice: str = ""


def cache_root() -> Path:
    """Return the folder of the cache: PUSHT_ACT_CACHE, else `pusht_act` in the user's cache folder."""
    if root := os.environ.get("PUSHT_ACT_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pusht_act"


def load_or_build(repo_id: str, key: str, build: Callable[[Allocate], BuiltDataset]) -> FrameDataset:
    """Load the data set cached under `key`, after building it if it is missing or damaged.

    Of several processes that ask at the same time one builds and the others wait.

    Args:
        repo_id: Name of the data set.
        key: Hash of the data set's source.
        build: Fills the arrays that its argument allocates.

    Raises:
        OSError: The disk has no room for the arrays.
    """
    folder = cache_root() / f"{key}-v{FORMAT}"
    # Without the lock at first: usually the data set is there and sound.
    if _find_corruption(folder) is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The lock is beside the folder, since the folder itself is replaced.
        with FileLock(f"{folder}.lock"):
            # Look again under the lock: another process may have built it meanwhile.
            if (damage := _find_corruption(folder)) is not None:
                if folder.exists():
                    log.warning("the cached data set %s is damaged (%s): building it again", folder, damage)
                _build(folder, build)
    return _load(repo_id, folder)


def _build(folder: Path, build: Callable[[Allocate], BuiltDataset]) -> None:
    # A damaged one goes first: the disk may have no room for two.
    shutil.rmtree(folder, ignore_errors=True)
    with new_dir(folder) as part:
        _write(part, folder, build)


def _write(part: Path, folder: Path, build: Callable[[Allocate], BuiltDataset]) -> None:
    """Write the data set into the folder `part`, which will be renamed to `folder`."""
    arrays: dict[str, np.memmap] = {}

    def allocate(task: str, specs: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
        needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs.values())
        free = shutil.disk_usage(part).free
        if needed > free:
            raise OSError(
                f"{task}: {_format_size(needed)} do not fit in {part.parent}, which has {_format_size(free)} free: "
                "free some or set PUSHT_ACT_CACHE to a folder on another disk"
            )
        log.info("%s: %s in %s", task, _format_size(needed), folder)
        for name, (shape, dtype) in specs.items():
            arrays[name] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                part / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape
            )
        return dict(arrays)

    # The builder asks for its arrays when it knows their size, and fills them page by page.
    contents = build(allocate)
    files = {name: part / f"{name}.npy" for name in arrays}
    checksums: dict[str, int] = {}
    with _progress("writing", files.values()) as bar:
        for name, array in arrays.items():
            assert isinstance(array.base, mmap.mmap)
            checksums[name] = _checksum(files[name], bar, array.base)
    # meta.json comes last and has a checksum of its own: it vouches for everything else.
    record = {
        "arrays": checksums,
        "episodes": contents.episodes.tolist(),
        "tasks": contents.tasks,
        "features": contents.features,
        "stats": contents.stats,
        "fps": contents.fps,
        "incomplete": [*contents.incomplete.items()],
        "notice": contents.notice,
    }
    meta = json.dumps(record)
    (part / "meta.json").write_text(f"{zlib.crc32(meta.encode())}\n{meta}")


def _format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _find_corruption(folder: Path) -> str | None:
    """Return which file in `folder` is damaged and how, or None."""
    path = folder / "meta.json"
    try:
        checksum, meta = _read_meta(folder)
        if checksum != zlib.crc32(meta):
            return f"{path.name} has another checksum than was written"
        # Reading every byte also brings the arrays into the page cache, where training finds them.
        checksums = {folder / f"{name}.npy": written for name, written in json.loads(meta)["arrays"].items()}
        with _progress("checking", checksums) as bar:
            for path, written in checksums.items():
                if _checksum(path, bar) != written:
                    return f"{path.name} has another checksum than was written"
    except (OSError, ValueError) as error:
        # A missing file, JSON that cannot be parsed, or a bad sector of the disk.
        return f"{path.name}: {error.strerror if isinstance(error, OSError) else error}"
    return None


def _read_meta(folder: Path) -> tuple[int, bytes]:
    """Return the CRC-32 in the first line of meta.json, and the JSON after it."""
    # meta.json cannot contain its own checksum, so that is a line above it.
    checksum, _, meta = (folder / "meta.json").read_bytes().partition(b"\n")
    return int(checksum), meta


def _load(repo_id: str, folder: Path) -> FrameDataset:
    meta = json.loads(_read_meta(folder)[1])
    return FrameDataset(
        repo_id=repo_id,
        # Read only. For a map that can be written, even a private one, the kernel wants as much memory as it is large.
        arrays={name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]},
        episodes=np.asarray(meta["episodes"], dtype=np.int64).reshape(-1, 2),
        tasks=meta["tasks"],
        features=meta["features"],
        stats=meta["stats"],
        fps=meta["fps"],
        key=folder.name.removesuffix(f"-v{FORMAT}"),
        incomplete=dict(meta.get("incomplete", ())),
        notice=meta.get("notice", ""),
    )


def _progress(description: str, paths: Iterable[Path]) -> "tqdm[Any]":
    """Return a progress bar over the bytes of files."""
    # Of those that exist: who opens the files will say which one does not.
    total = sum(path.stat().st_size for path in paths if path.exists())
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, delay=BAR_DELAY_S, disable=None)


def _checksum(path: Path, bar: "tqdm[Any]", pages: mmap.mmap | None = None) -> int:
    """Return the CRC-32 of a file, which is written to the disk first if `pages` are its map."""
    # By reads rather than through the memory map: there a bad sector would kill the process by SIGBUS.
    checksum, position = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            # The disk may have gigabytes left to write: in parts, so that the bar moves.
            if pages is not None and position % FLUSH_BYTES == 0:
                pages.flush(position, min(FLUSH_BYTES, len(pages) - position))
            checksum = zlib.crc32(block, checksum)
            position += len(block)
            bar.update(len(block))
    return checksum
