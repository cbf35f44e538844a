"""Read a LeRobotDataset v3.0 into a FrameDataset: parquet by PyArrow, video by PyAV.

The format is meta/info.json (features, paths), meta/stats.json, meta/episodes/**.parquet (one row an episode),
data/**.parquet (one row a frame) and videos/<key>/**.mp4 (several episodes one after the other in a file).
"""

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from pusht_act.config.lerobot import DatasetConfig
from pusht_act.data.cache import Allocate, BuiltDataset, FrameDataset, load_or_build
from pusht_act.data.lerobot import find_dataset
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import signals
from pusht_act.runtime.system import cores

log = logging.getLogger(__name__)

# Long against the distance between two key frames, from which a thread has to start.
FRAMES_PER_PART = 1000
"""Frames of a video file that one thread decodes at a time."""
ROWS_PER_BATCH = 500
"""Rows of a parquet file that are in memory at a time, with their images if they have any."""


def open_lerobot_dataset(dataset: DatasetConfig) -> FrameDataset:
    """Open the data set that `dataset` names; it is decoded into the cache when it is first opened.

    Raises:
        FileNotFoundError: It is neither at `root`, nor in LeRobot's local folders, nor on the Hub.
        UserError: It has another format version, or a file is damaged.
    """
    root = Path(dataset.root) if dataset.root else find_dataset(dataset)
    info = _read_info(root)
    return load_or_build(dataset.repo_id, _content_hash(root), lambda allocate: _decode(root, info, allocate))


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"dataset.root={root} holds no LeRobot data set (no meta/info.json): give dataset.root=PATH of one"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): fetch the data set again") from error
    if not isinstance(info, dict):
        raise UserError(f"{path} is damaged (no JSON object): fetch the data set again")
    version = info.get("codebase_version")
    if version != "v3.0":
        raise UserError(
            f"dataset.root={root} has format {version}, this reads v3.0: convert it with "
            "python -m lerobot.scripts.convert_dataset_v21_to_v30"
        )
    _check_names(path, info)
    return info


def _check_names(path: Path, info: dict[str, Any]) -> None:
    """Check that the names in info.json cannot lead outside the data set or the cache.

    A feature names a file of the cache, a path template files of the data set.
    """
    features = info.get("features")
    numbers = (info.get(key) for key in ("total_frames", "total_episodes", "fps"))
    if not isinstance(features, dict) or not all(isinstance(number, int | float) for number in numbers):
        raise UserError(f"{path} is damaged (no features, total_frames, total_episodes or fps): fetch it again")
    for key, feature in features.items():
        sound = isinstance(feature, dict) and {"dtype", "shape"} <= {*feature} and re.fullmatch(r"\w[\w. -]*", key)
        if not sound:
            raise UserError(
                f"{path}: feature {key[:60]!r} is no name with a dtype and a shape: fetch the data set again"
            )
    for key in ("data_path", "video_path"):
        if info.get(key) is not None:
            _within(path.parent.parent, info[key], key, video_key="x", chunk_index=0, file_index=0)


def _within(root: Path, template: Any, key: str, **values: Any) -> Path:
    """Return the file that a path template of info.json names.

    Raises:
        UserError: The template is invalid, or the file is outside `root`.
    """
    # By name, without resolving links: files in the Hub's cache are links to elsewhere.
    try:
        path: Path = root / template.format(**values)
        inside = ".." not in path.relative_to(root).parts
    except (ValueError, KeyError, IndexError, AttributeError, TypeError):
        inside = False
    if not inside:
        raise UserError(
            f"{root / 'meta' / 'info.json'}: {key}={str(template)[:80]!r} names no file within the data set: "
            "fetch it from a source that you trust"
        )
    return path


def _content_hash(root: Path) -> str:
    # Of names within the data set and contents: a data set that was moved or copied is decoded once.
    digest = hashlib.sha256()
    for path in sorted(p for folder in ("meta", "data", "videos") for p in (root / folder).rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def _decode(root: Path, info: dict[str, Any], allocate: Allocate) -> BuiltDataset:
    # Rewards, indices and timestamps are of no use to training: do not cache them.
    features = {k: f for k, f in info["features"].items() if k.startswith("observation.") or k == "action"}
    total = info["total_frames"]
    episodes = _read_parquet(root / "meta" / "episodes", ["dataset_from_index", "dataset_to_index", "tasks"])
    bounds = np.stack([episodes["dataset_from_index"].to_numpy(), episodes["dataset_to_index"].to_numpy()], axis=1)
    if len(bounds) != info["total_episodes"] or bounds[-1, 1] != total:
        raise UserError(f"{root / 'meta'} is damaged: info.json and episodes disagree; fetch the data set again")
    specs: dict[str, tuple[tuple[int, ...], str]] = {}
    for key, feature in features.items():
        if feature["dtype"] in ("video", "image"):
            if (feature.get("info") or {}).get("is_depth_map"):
                raise UserError(f"{root}: {key} is a depth map, which ACT on PushT does not read")
            height, width, channels = feature["shape"]
            specs[key] = (total, channels, height, width), "uint8"
        else:
            specs[key] = (total, *feature["shape"]), "float32"
    _fill(root, info, allocate(f"decoding {root}, {total:,} frames", specs))
    return BuiltDataset(
        episodes=bounds,
        tasks=[task[0] if task else "" for task in episodes["tasks"].to_pylist()],
        features=features,
        stats=json.loads((root / "meta" / "stats.json").read_text()),
        fps=info["fps"],
    )


def _fill(root: Path, info: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    columns = [key for key in arrays if info["features"][key]["dtype"] != "video"]
    table = _read_parquet(root / "data", ["index", "timestamp"])
    # The rows of all files together are the frames in order; nothing below would notice a missing file.
    if not np.array_equal(table["index"].to_numpy(), np.arange(info["total_frames"])):
        raise UserError(f"{root / 'data'} is damaged: its frames are not 0 to {info['total_frames'] - 1}")
    _copy_columns(root / "data", info, {key: arrays[key] for key in columns})
    for key in arrays.keys() - set(columns):
        _decode_videos(root, info, key, table["timestamp"].to_numpy(), arrays[key])


def _copy_columns(folder: Path, info: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Copy the columns of the parquet files in `folder`, images among them, into `arrays`."""
    stop = 0
    with tqdm(total=info["total_frames"], desc="decoding", unit="frame", delay=1, disable=None) as progress:
        for batch in _iter_parquet(folder, [*arrays]):
            start, stop = stop, stop + len(batch)
            for key, array in arrays.items():
                if info["features"][key]["dtype"] == "image":
                    for i, cell in enumerate(batch[key].to_pylist(), start):
                        array[i] = np.asarray(Image.open(BytesIO(cell["bytes"])).convert("RGB")).transpose(2, 0, 1)
                else:
                    array[start:stop] = batch[key].flatten().to_numpy().reshape(-1, *array.shape[1:])
            progress.update(len(batch))


def _decode_videos(root: Path, info: dict[str, Any], key: str, timestamps: np.ndarray, out: np.ndarray) -> None:
    """Decode every frame of feature `key` into `out` [N, 3, H, W], each the one LeRobot's PyAV reader would pick."""
    prefix = f"videos/{key}"
    names = ["dataset_from_index", "dataset_to_index", f"{prefix}/chunk_index", f"{prefix}/file_index"]
    rows = _read_parquet(root / "meta" / "episodes", [*names, f"{prefix}/from_timestamp"]).to_pylist()

    # By file, for each episode: the numbers of its frames in the data set, and their times in the file (s).
    files: dict[Path, list[tuple[np.ndarray, np.ndarray]]] = {}
    for row in rows:
        start, stop, chunk, file = (row[name] for name in names)
        path = _within(root, info["video_path"], "video_path", video_key=key, chunk_index=chunk, file_index=file)
        times = row[f"{prefix}/from_timestamp"] + timestamps[start:stop]
        files.setdefault(path, []).append((np.arange(start, stop), times))

    # Threads of ours, since FFmpeg's would parallelize the decoding alone, a third of the work; the rest is conversion.
    parts = [(path, part) for path, spans in files.items() for part in _parts(spans)]
    stop = threading.Event()
    with (
        tqdm(total=len(out), desc=f"decoding {key}", unit="frame", disable=None) as progress,
        ThreadPoolExecutor(cores()) as pool,
    ):
        try:
            jobs = [
                signals.submit(pool, _decode_part, path, part, 0.5 / info["fps"], out, stop) for path, part in parts
            ]
            for job in jobs:
                signals.wait(job)
                progress.update(job.result())
        finally:
            # When one part has failed, or a signal came, the others need not finish.
            stop.set()


def _parts(spans: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split the frames of one file, ordered by time, into parts for the threads."""
    numbers, times = (np.concatenate(each) for each in zip(*spans, strict=True))
    order = np.argsort(times, kind="stable")
    for start in range(0, len(order), FRAMES_PER_PART):
        part = order[start : start + FRAMES_PER_PART]
        yield numbers[part], times[part]


def _decode_part(
    path: Path, wanted: tuple[np.ndarray, np.ndarray], tolerance: float, out: np.ndarray, stop: threading.Event
) -> int:
    """Decode frames of a file into `out` and return how many.

    Args:
        path: The video file.
        wanted: The frames' numbers in `out`, and their times in the file (s), ordered by time.
        tolerance: How far a frame may be from its time, s.
        out: uint8 [N, 3, H, W].
        stop: Ends the decoding early when set.
    """
    numbers, times = (each.tolist() for each in wanted)
    frames = _video_frames(path, times[0] - tolerance)
    for index, time in zip(numbers, times, strict=True):
        # LeRobot takes the frame that is nearest in time, which is within half a frame of it.
        image = next((image for at, image in frames if at > time - tolerance), None)
        if image is None:
            raise UserError(f"{path} is damaged: it ends before {time:.1f} s; fetch the data set again")
        out[index] = image.transpose(2, 0, 1)
        if stop.is_set():
            break
    return len(numbers)


def _video_frames(path: Path, start: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the time (s) and image (uint8 [H, W, 3]) of each frame, from the last key frame before `start` (s) on."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # The parts of the files already share out the cores.
            stream.codec_context.thread_count = 1
            # PyAV seeks to the last key frame before `start`; frames in between have to be decoded, too.
            if start > 0 and stream.time_base is not None:
                container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and stream.time_base is not None:
                    yield float(frame.pts * stream.time_base), frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"{path} cannot be decoded ({error}): fetch the data set again") from error


def _read_parquet(folder: Path, columns: list[str]) -> pa.Table:
    """Read columns of the parquet files of `folder` as one table; they should be small."""
    tables = []
    for path in _parquet_files(folder):
        with _readable(path):
            tables.append(pq.read_table(path, columns=columns))
    return pa.concat_tables(tables)


def _iter_parquet(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows that `_read_parquet` reads, some at a time."""
    for path in _parquet_files(folder):
        with _readable(path), pq.ParquetFile(path) as file:
            # Unlike read_table it would leave out what is missing.
            if missing := {*columns} - {*file.schema_arrow.names}:
                raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")
            yield from file.iter_batches(ROWS_PER_BATCH, columns=columns)


def _parquet_files(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no parquet file: fetch the data set again")
    return paths


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): fetch it again") from error
