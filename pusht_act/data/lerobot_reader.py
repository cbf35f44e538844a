"""Decode a LeRobotDataset v3.0 into a FrameDataset: parquet by PyArrow, video by PyAV.

The metadata has been read and checked (lerobot_metadata.py). Here are data/**.parquet (one row a frame) and
videos/<key>/**.mp4 (several episodes one after the other in a file).
"""

import hashlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64
from PIL import Image
from tqdm.auto import tqdm

from pusht_act.config.lerobot import DatasetConfig
from pusht_act.data.cache import Allocate, BuiltDataset, FrameDataset, load_or_build
from pusht_act.data.dataset_files import DatasetError, content_hash, iter_parquet, numbers, read_parquet, show
from pusht_act.data.lerobot import ACTION, find_dataset
from pusht_act.data.lerobot_metadata import Metadata, path_within, read_metadata
from pusht_act.runtime.signals import signals
from pusht_act.runtime.system import cores

log = logging.getLogger(__name__)

# Long against the distance between two key frames, from which a thread has to start.
FRAMES_PER_PART = 1000
"""Frames of a video file that one thread decodes at a time."""
ROUNDING_S = 1e-5
"""By how much times in seconds may differ from those that were meant: they are float32."""


def read_dataset_metadata(dataset: DatasetConfig) -> Metadata:
    """Find the data set that `dataset` names and read its metadata.

    Raises:
        FileNotFoundError: It is neither at `root`, nor in LeRobot's local folders, nor on the Hub.
        UserError: It has another format version, or a file is damaged.
    """
    return read_metadata(Path(dataset.root) if dataset.root else find_dataset(dataset))


def open_lerobot_dataset(
    dataset: DatasetConfig, metadata: Metadata | None = None, names: dict[str, str] | None = None
) -> FrameDataset:
    """Open the data set that `dataset` names; it is decoded into the cache when it is first opened.

    Args:
        dataset: LeRobot's configuration.
        metadata: The data set's, if it has been read.
        names: The features to read, by their name in the data set, with the name that they get; None: the action and
            all observations.

    Raises:
        FileNotFoundError: It is neither at `root`, nor in LeRobot's local folders, nor on the Hub.
        UserError: It has another format version, or a file is damaged.
    """
    metadata = metadata or read_dataset_metadata(dataset)
    if names is None:
        names = {key: key for key in metadata.info.features if key.startswith("observation.") or key == ACTION}
    # Rewards, indices and time stamps are of no use to training: they are not cached.
    source = [content_hash(metadata.root), sorted(names.items())]
    key = hashlib.sha256(repr(source).encode()).hexdigest()[:24]
    frames = load_or_build(dataset.repo_id, key, lambda allocate: _decode(metadata, names, allocate))
    if frames.notice:
        log.warning("%s: %s", dataset.repo_id, frames.notice)
    return frames


def _decode(metadata: Metadata, names: dict[str, str], allocate: Allocate) -> BuiltDataset:
    info, total = metadata.info, metadata.info.total_frames
    timestamps, notice = _read_timestamps(metadata)
    features = {key: info.features[key] for key in names}
    specs: dict[str, tuple[tuple[int, ...], str]] = {}
    for key, feature in features.items():
        if feature.is_image:
            height, width, channels = feature.to_dict()["shape"]
            specs[names[key]] = (total, channels, height, width), "uint8"
        else:
            specs[names[key]] = (total, *feature.shape), "float32"
    arrays = allocate(f"decoding {metadata.root}, {total:,} frames", specs)
    _copy_columns(metadata, {key: arrays[names[key]] for key, f in features.items() if f.dtype != "video"})
    incomplete: dict[int, str] = {}
    for key, feature in features.items():
        if feature.dtype == "video":
            incomplete |= _decode_videos(metadata, key, timestamps, arrays[names[key]])
    return BuiltDataset(
        episodes=metadata.episodes,
        tasks=metadata.tasks,
        features={names[key]: feature.to_dict() for key, feature in features.items()},
        stats={names[key]: metadata.stats_of(key) for key in names if key in metadata.stats},
        fps=info.fps,
        incomplete=incomplete,
        notice=notice,
    )


def _read_timestamps(metadata: Metadata) -> tuple[Float64[np.ndarray, " N"], str]:
    """Return the time of each frame within its episode (s), and what is odd about them.

    The rows of all files must be the frames in order.
    """
    folder, total, episodes = metadata.root / "data", metadata.info.total_frames, metadata.episodes
    table = read_parquet(folder, ["index", "episode_index", "timestamp"])
    if len(table) != total:
        raise DatasetError(folder, f"holds {len(table)} frames, info.json says total_frames={total}")
    episode = np.repeat(np.arange(len(episodes)), np.diff(episodes).ravel())
    for name, expected in (("index", np.arange(total)), ("episode_index", episode)):
        found = numbers(table, name, folder)
        if (wrong := found != expected).any():
            row = int(np.argmax(wrong))
            raise DatasetError(folder, f"row {row} has {name}={found[row]}, expected {expected[row]}")
    timestamps: np.ndarray = numbers(table, "timestamp", folder, integer=False).astype(np.float64)

    # Within an episode the frames follow each other at the rate of fps.
    step, period = np.diff(timestamps), 1 / metadata.info.fps
    within = np.diff(episode) == 0
    if (backwards := within & (step <= 0)).any():
        row = int(np.argmax(backwards)) + 1
        raise DatasetError(folder, f"row {row} has timestamp={timestamps[row]:.4g}, not after that of the row before")
    if not (uneven := within & (np.abs(step - period) > period / 2 + ROUNDING_S)).any():
        return timestamps, ""
    row = int(np.argmax(uneven)) + 1
    notice = (
        f"{uneven.sum()} of {total} frames are not evenly spaced in time: frame {row}, in episode {episode[row]}, "
        f"comes {step[row - 1]:.3g} s after the one before, at fps={metadata.info.fps:g}"
    )
    return timestamps, notice


def _copy_columns(metadata: Metadata, arrays: dict[str, np.ndarray]) -> None:
    """Copy the columns of the parquet files, images among them, into `arrays`."""
    folder, stop = metadata.root / "data", 0
    with tqdm(total=metadata.info.total_frames, desc="decoding", unit="frame", delay=1, disable=None) as progress:
        for batch in iter_parquet(folder, [*arrays]) if arrays else ():
            start, stop = stop, stop + len(batch)
            for key, array in arrays.items():
                if metadata.info.features[key].is_image:
                    for i, cell in enumerate(batch[key].to_pylist(), start):
                        _put(array, i, _read_picture(cell, folder, f"frame {i}: {key}"), folder, f"frame {i}: {key}")
                else:
                    array[start:stop] = _read_rows(batch[key], array.shape[1:], folder, key)
            progress.update(len(batch))


def _read_rows(column: pa.Array, shape: tuple[int, ...], folder: Path, key: str) -> np.ndarray:
    """Return a column of numbers or of lists of them, of `shape` each; one number may be stored without a list."""
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    sizes = []
    # Flattening leaves out what is null, and with it the place of all that follows.
    while not values.null_count and isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1:
            raise DatasetError(folder, f"column {key} holds lists of different lengths, {show(sorted(lengths))}")
        sizes.append(lengths[0])
        values = values.flatten()
    if values.null_count:
        raise DatasetError(folder, f"column {key} has {values.null_count} rows without a value")
    is_number = any(of(values.type) for of in (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean))
    if not is_number or (tuple(sizes) or (1,)) != shape:
        has = f"{values.type} of shape {sizes or [1]}"
        raise DatasetError(folder, f"column {key} holds {has}, info.json says shape {list(shape)}")
    rows: np.ndarray = values.to_numpy(zero_copy_only=False).reshape(len(column), *shape)
    return rows


def _read_picture(cell: Any, folder: Path, what: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(BytesIO(cell["bytes"])).convert("RGB"))
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(folder, f"{what} is no picture ({' '.join(str(error).split())[:120]})") from error


def _put(out: np.ndarray, index: int, image: np.ndarray, path: Path, what: str) -> None:
    """Store an image [H, W, 3] as row `index` of `out` [N, 3, H, W]."""
    if image.shape[:2] != out.shape[2:]:
        has, says = (f"{height} x {width}" for height, width in (image.shape[:2], out.shape[2:]))
        raise DatasetError(path, f"{what} is a picture of {has} pixels, info.json says {says}")
    out[index] = image.transpose(2, 0, 1)


def _decode_videos(
    metadata: Metadata, key: str, timestamps: Float64[np.ndarray, " N"], out: np.ndarray
) -> dict[int, str]:
    """Decode every frame of feature `key` into `out` [N, 3, H, W], each the one LeRobot's PyAV reader would pick.

    Returns:
        The episodes in which a frame has no picture, and where.
    """
    parts = [
        (path, part) for path, spans in _spans_by_file(metadata, key, timestamps).items() for part in _parts(spans)
    ]
    # Threads of ours, since FFmpeg's would parallelize the decoding alone, a third of the work; the rest is conversion.
    stop, far = threading.Event(), []
    with (
        tqdm(total=len(out), desc=f"decoding {key}", unit="frame", disable=None) as progress,
        ThreadPoolExecutor(cores()) as pool,
    ):
        try:
            jobs = [signals.submit(pool, _decode_part, path, part, out, stop) for path, part in parts]
            for (path, (frames, times)), job in zip(parts, jobs, strict=True):
                signals.wait(job)
                distances = job.result()
                missing = distances > 0.5 / metadata.info.fps + ROUNDING_S
                far += [(*row, path) for row in zip(frames[missing], times[missing], distances[missing], strict=True)]
                progress.update(len(frames))
        finally:
            # When one part has failed, or a signal came, the others need not finish.
            stop.set()
    incomplete: dict[int, str] = {}
    for frame, time, distance, path in sorted(far):
        episode = int(np.searchsorted(metadata.episodes[:, 1], frame, side="right"))
        file = path.relative_to(metadata.root)
        text = f"{file} has no picture for frame {frame}, at {time:.2f} s: the nearest is {distance:.3g} s away"
        incomplete.setdefault(episode, text)
    return incomplete


def _spans_by_file(
    metadata: Metadata, key: str, timestamps: Float64[np.ndarray, " N"]
) -> dict[Path, list[tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"]]]]:
    """Return the frames of each video file, episode by episode: their numbers, and their times in the file (s)."""
    folder, prefix = metadata.root / "meta" / "episodes", f"videos/{key}"
    columns = [f"{prefix}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    table = read_parquet(folder, columns)
    chunks, files = (numbers(table, name, folder).tolist() for name in columns[:2])
    begins = numbers(table, columns[2], folder, integer=False).astype(np.float64)
    spans: dict[Path, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (start, stop), chunk, file, begin in zip(metadata.episodes, chunks, files, begins, strict=True):
        place = {"video_key": key, "chunk_index": chunk, "file_index": file}
        path = path_within(metadata.root, metadata.info.video_path, "video_path", **place)
        spans.setdefault(path, []).append((np.arange(start, stop), begin + timestamps[start:stop]))
    return spans


def _parts(spans: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split the frames of one file, ordered by time, into parts for the threads."""
    frames, times = (np.concatenate(each) for each in zip(*spans, strict=True))
    order = np.argsort(times, kind="stable")
    for start in range(0, len(order), FRAMES_PER_PART):
        part = order[start : start + FRAMES_PER_PART]
        yield frames[part], times[part]


def _decode_part(
    path: Path, wanted: tuple[np.ndarray, np.ndarray], out: np.ndarray, stop: threading.Event
) -> Float64[np.ndarray, " n"]:
    """Decode frames of a file into `out` and return how far each picture is from its frame's time (s).

    Args:
        path: The video file.
        wanted: The frames' numbers in `out`, and their times in the file (s), ordered by time.
        out: uint8 [N, 3, H, W].
        stop: Ends the decoding early when set.
    """
    frames, times = (each.tolist() for each in wanted)
    distances = np.zeros(len(frames))
    pictures = _iter_pictures(path, times[0])
    before, after = None, next(pictures, None)
    for i, (frame, time) in enumerate(zip(frames, times, strict=True)):
        # A picture may be the nearest to several frames, or to none: count by time, never by position.
        while after is not None and after[0] < time:
            before, after = after, next(pictures, None)
        near = [picture for picture in (before, after) if picture is not None]
        if not near:
            raise DatasetError(path, f"holds no picture from {time:.1f} s on")
        at, image = min(near, key=lambda picture: abs(picture[0] - time))
        _put(out, frame, image, path, f"frame {frame}")
        distances[i] = abs(at - time)
        if stop.is_set():
            break
    return distances


def _iter_pictures(path: Path, start: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the time (s) and image (uint8 [H, W, 3]) of each picture, from a key frame at or before `start` (s) on."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # The parts of the files already share out the cores.
            stream.codec_context.thread_count = 1
            # PyAV seeks to the last key frame before `start`; frames in between have to be decoded, too.
            if start > 0 and stream.time_base is not None:
                # As LeRobot does, one picture earlier: the one before `start` may be the nearest.
                container.seek(round(start / stream.time_base) - 1, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and stream.time_base is not None:
                    yield float(frame.pts * stream.time_base), frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError) as error:
        raise DatasetError(path, f"cannot be decoded ({error})") from error
