"""Videos of rollouts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from pusht_act.cores import cores

PRESET = "veryfast"
"""Of x264: a third of the time of its default, which LeRobot takes, for what no eye tells apart."""


def write_video(path: Path, frames: Sequence[UInt8[np.ndarray, "H W 3"]], fps: int) -> None:
    """An H.264 mp4 that every player takes; of an odd side the last row of pixels is left out."""
    import av

    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": PRESET})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame[:height, :width], format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_videos(videos: dict[Path, Sequence[UInt8[np.ndarray, "H W 3"]]], fps: int) -> None:
    """Each at its path, several at once."""
    with ThreadPoolExecutor(cores(), "video") as threads:
        for written in [threads.submit(write_video, path, frames, fps) for path, frames in videos.items()]:
            written.result()
