"""Read the metadata of a LeRobotDataset v3.0 into one checked record, before anything is decoded.

meta/info.json (features, paths, numbers), meta/stats.json, meta/episodes/**.parquet (one row an episode).
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Int64
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pusht_act.data.dataset_files import FETCH, DatasetError, check_files, numbers, read_json, read_parquet, show
from pusht_act.runtime.errors import UserError

VERSION = "v3.0"
IMAGE_DTYPES = ("video", "image")
STATISTIC = re.compile(r"min|max|mean|std|count|q\d+")
"""The names of LeRobot's statistics; what else there is in stats.json normalizes nothing."""


class Feature(BaseModel):
    """A feature in info.json."""

    model_config = ConfigDict(strict=True, extra="allow")

    dtype: str
    shape: list[Annotated[int, Field(ge=1, le=65_536)]]
    names: Any = None
    info: dict[str, Any] | None = None

    @property
    def is_image(self) -> bool:
        """Whether its values are pictures."""
        return self.dtype in IMAGE_DTYPES

    @property
    def channels_last(self) -> bool:
        """Whether the shape of a picture is (height, width, channels); LeRobot also reads (channels, height, width)."""
        ends = self.shape[0] == 3, self.shape[-1] == 3
        # Where the numbers leave it open, the names tell.
        if ends[0] != ends[1]:
            return ends[1]
        return isinstance(self.names, list) and self.names[-1:] in (["channel"], ["channels"])

    def to_dict(self) -> dict[str, Any]:
        """Return the feature as LeRobot writes it, the shape of a picture as (height, width, channels)."""
        plain = self.model_dump(exclude_unset=True) | {"names": self.names}
        if not self.is_image:
            return plain
        shape = self.shape if self.channels_last else [*self.shape[1:], self.shape[0]]
        return plain | {"shape": shape, "names": ["height", "width", "channels"]}


class Info(BaseModel):
    """What is read of info.json."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    fps: Annotated[int | float, Field(gt=0, le=100_000)]
    total_frames: Annotated[int, Field(ge=0)]
    total_episodes: Annotated[int, Field(ge=0)]
    features: dict[str, Feature]
    data_path: str | None = None
    video_path: str | None = None


@dataclass(frozen=True)
class Metadata:
    """What is known of a data set before it is decoded."""

    root: Path
    info: Info
    episodes: Int64[np.ndarray, "E 2"]
    """The first frame of each episode, and the one after its last."""
    tasks: list[str]
    """The text of each episode's task."""
    stats: dict[str, Any] = field(default_factory=dict)
    """The content of stats.json, as it was found there; empty without the file."""

    @property
    def stats_path(self) -> Path:
        """Where `stats` was read."""
        return self.root / "meta" / "stats.json"

    def stats_of(self, key: str) -> dict[str, Any]:
        """Return LeRobot's statistics of a feature, by name."""
        return {name: value for name, value in self.stats.get(key, {}).items() if STATISTIC.fullmatch(name)}


def read_metadata(root: Path) -> Metadata:
    """Read and check the metadata of the data set at `root`.

    Raises:
        FileNotFoundError: There is no data set.
        UserError: It has another format version, or no episodes.
        DatasetError: A file of it cannot be used.
    """
    check_files(root)
    info = _read_info(root)
    try:
        stats = read_json(root / "meta" / "stats.json")
    except FileNotFoundError:
        stats = {}
    if not info.total_episodes or not info.total_frames:
        raise UserError(
            f"dataset.root={root} has no episodes (meta/info.json: total_episodes={info.total_episodes}, "
            f"total_frames={info.total_frames}): record some, or give another data set"
        )
    return Metadata(root, info, *_read_episodes(root / "meta" / "episodes", info), stats)


def _read_info(root: Path) -> Info:
    path = root / "meta" / "info.json"
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"dataset.root={root} holds no LeRobot data set (no meta/info.json): give dataset.root=PATH of one"
        ) from error
    # Of another version nothing else need be as it is here.
    version = content.get("codebase_version")
    if version != VERSION:
        raise UserError(
            f"dataset.root={root} has format {show(version).strip(chr(39))}, this reads {VERSION}: convert it with "
            "python -m lerobot.scripts.convert_dataset_v21_to_v30"
        )
    _check_names(root, content)
    try:
        return Info.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f"={show(first['input'])}"
        raise DatasetError(path, f"{key}{value}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def _check_names(root: Path, content: dict[str, Any]) -> None:
    """Check that the names in info.json cannot lead outside the data set or the cache.

    A feature names a file of the cache, a path template files of the data set.
    """
    features = content.get("features")
    for key, feature in features.items() if isinstance(features, dict) else ():
        sound = isinstance(feature, dict) and {"dtype", "shape"} <= {*feature} and re.fullmatch(r"\w[\w. -]*", key)
        if not sound:
            raise DatasetError(root / "meta" / "info.json", f"feature {key[:60]!r} is no name with a dtype and a shape")
    for key in ("data_path", "video_path"):
        if content.get(key) is not None:
            path_within(root, content[key], key, video_key="x", chunk_index=0, file_index=0)


def path_within(root: Path, template: Any, key: str, **values: Any) -> Path:
    """Return the file that a path template of info.json names.

    Raises:
        DatasetError: The template is invalid, or the file is outside `root`.
    """
    # By name, without resolving links: files in the Hub's cache are links to elsewhere.
    try:
        path: Path = root / template.format(**values)
        inside = ".." not in path.relative_to(root).parts
    except (ValueError, KeyError, IndexError, AttributeError, TypeError):
        inside = False
    if not inside:
        raise DatasetError(
            root / "meta" / "info.json",
            f"{key}={str(template)[:80]!r} names no file within the data set",
            "fetch it from a source that you trust",
        )
    return path


def _read_episodes(folder: Path, info: Info) -> tuple[Int64[np.ndarray, "E 2"], list[str]]:
    """Return the bounds of each episode and its task; the episodes must be in order, without a gap."""
    names = ("dataset_from_index", "dataset_to_index")
    table = read_parquet(folder, [*names, "tasks"])
    if len(table) != info.total_episodes:
        raise DatasetError(folder, f"has {len(table)} episodes, info.json says total_episodes={info.total_episodes}")
    bounds = np.stack([numbers(table, name, folder) for name in names], axis=1).astype(np.int64)
    expected = np.concatenate([[0], bounds[:-1, 1]])
    wrong = (bounds[:, 0] != expected) | (bounds[:, 1] <= bounds[:, 0])
    if wrong.any():
        i = int(np.argmax(wrong))
        raise DatasetError(
            folder, f"episode {i} has frames {bounds[i, 0]} to {bounds[i, 1]}, the next is {expected[i]}"
        )
    if bounds[-1, 1] != info.total_frames:
        raise DatasetError(folder, f"holds {bounds[-1, 1]} frames, info.json says total_frames={info.total_frames}")
    tasks = table["tasks"].to_pylist()
    if not all(task is None or (isinstance(task, list) and {*map(type, task)} <= {str}) for task in tasks):
        raise DatasetError(folder, f"column tasks holds {table['tasks'].type}, not lists of texts")
    return bounds, [task[0] if task else "" for task in tasks]


def check_stats(metadata: Metadata, needed: dict[str, tuple[str, ...]], repo_id: str) -> None:
    """Check the statistics that normalize features.

    Args:
        metadata: The data set's.
        needed: The names of statistics that each feature needs; of any other it is enough that it holds numbers.
        repo_id: Name of the data set.

    Raises:
        DatasetError: One is missing, or it is not of the feature's shape.
    """
    root, path = metadata.root, metadata.stats_path
    paths = shlex.join([f"--repo_id={repo_id}", f"--root={root}", f"--new_root={root}"])
    command = f"lerobot-edit-dataset {paths} --operation.type=recompute_stats --operation.overwrite=true"
    recompute = f"compute them with {command}"
    if not path.exists() and any(needed.values()):
        raise DatasetError(path, "is missing, and with it the statistics that normalize features", recompute)
    for key, names in needed.items():
        feature = metadata.info.features[key]
        # LeRobot's command leaves videos out.
        remedy = f"{FETCH}, or give +dataset.use_imagenet_stats=true" if feature.is_image else recompute
        if not isinstance(metadata.stats.get(key, {}), dict):
            raise DatasetError(path, f"{key}={show(metadata.stats[key])} holds no statistics", remedy)
        found = metadata.stats_of(key)
        shape = (3, 1, 1) if feature.is_image else tuple(feature.shape)
        for name in dict.fromkeys([*names, *found]):
            if name not in found:
                raise DatasetError(path, f"{key} has no {name}, which normalizes it", remedy)
            array, value = _to_array(found[name]), f"{key}.{name}={show(found[name])}"
            if array is None or (name in names and array.shape != shape):
                raise DatasetError(path, f"{value}: expected numbers of shape {list(shape)}", remedy)
            if name in names and not (np.isfinite(array).all() and (name != "std" or (array >= 0).all())):
                raise DatasetError(path, f"{value} is out of range", remedy)


def _to_array(value: Any) -> np.ndarray | None:
    """Return nested lists of numbers as an array; None for anything else."""
    try:
        array = np.array(value)
    except ValueError:
        # Lists of different lengths.
        return None
    return array if array.dtype.kind in "iuf" else None
