"""Change a copy of a small data set, so that something about it is odd."""

import json
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def change_json(root: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Replace the content of `meta/NAME` by what `change` returns, or by what it has made of it."""
    path = root / "meta" / name
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def change_column(root: Path, folder: str, column: str, change: Callable[[list[Any]], Any]) -> None:
    """Replace a column of the table in `folder`, "data" or "meta/episodes", as `change_json` does with a file."""
    (path,) = (root / folder).rglob("*.parquet")
    table = pq.read_table(path)
    values = table[column].to_pylist()
    changed = change(values)
    array = changed if isinstance(changed, pa.Array) else pa.array(values if changed is None else changed)
    if array.type != table[column].type and isinstance(changed, list | None):
        array = pa.array(values if changed is None else changed, table[column].type)
    replaced = table.set_column(table.schema.get_field_index(column), column, array)
    pq.write_table(replaced.replace_schema_metadata(None), path)


def times_of(root: Path) -> np.ndarray:
    """Return the time (s) at which each frame's picture is in the video, which is a single file."""
    episodes = pq.read_table(next((root / "meta" / "episodes").rglob("*.parquet"))).to_pydict()
    begins = next(values for name, values in episodes.items() if name.endswith("from_timestamp"))
    frames = pq.read_table(next((root / "data").rglob("*.parquet")), columns=["timestamp", "episode_index"])
    times: np.ndarray = np.asarray(begins)[frames["episode_index"].to_numpy()]
    times += frames["timestamp"].to_numpy()
    return times


def read_pictures(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the time (s) of each picture of the video, and the pictures [M, 3, H, W], all in a row."""
    with av.open(str(next((root / "videos").rglob("*.mp4")))) as container:
        frames = list(container.decode(video=0))
    times = [frame.time for frame in frames]
    pictures = [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in frames]
    return np.array(times), np.stack(pictures)


def nearest_pictures(root: Path) -> np.ndarray:
    """Return what each frame must hold: of all pictures the nearest in time, the earlier one where two are."""
    times, pictures = read_pictures(root)
    nearest: np.ndarray = pictures[np.abs(times_of(root)[:, None] - times[None]).argmin(1)]
    return nearest


def write_video(path: Path, pictures: Iterable[np.ndarray], times_ms: Iterable[int]) -> None:
    """Write pictures [3, H, W] at these times as the video `path`, with a key frame every other picture."""
    pictures = [picture.transpose(1, 2, 0) for picture in pictures]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "10", "g": "2", "bf": "0"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(pictures, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
