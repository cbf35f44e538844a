"""Videos of rollouts."""

from collections.abc import Iterable
from pathlib import Path

import av
import cv2
import numpy as np
from jaxtyping import UInt8

PRESET = "ultrafast"
"""Of x264: 0.4 of the time of its default, which LeRobot takes at the same PSNR; thrice the bytes, 1.3 kB a frame."""


class Video:
    """An H.264 mp4 at `path` that every player takes; of an odd side the last row of pixels is left out.

    Raises:
        OSError: `path` cannot be written, at the start, amid it or at the end.
    """

    def __init__(self, path: Path, fps: int) -> None:
        self._container = av.open(str(path), mode="w")
        self._stream = self._container.add_stream("libx264", rate=fps, options={"preset": PRESET})
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1  # the environments share out the cores among their processes

    def add(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """The next one, of the size of the first."""
        height, width = (side - side % 2 for side in frame.shape[:2])
        if not self._stream.codec_context.is_open:
            self._stream.width, self._stream.height = width, height
        # FFmpeg's own conversion takes as long as all the rest.
        planes = np.asarray(cv2.cvtColor(frame[:height, :width], cv2.COLOR_RGB2YUV_I420), np.uint8)
        picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Write what is left."""
        self._container.mux(self._stream.encode())
        self._container.close()


def write_video(path: Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: int) -> None:
    """A `Video` of `frames`."""
    video = Video(path, fps)
    for frame in frames:
        video.add(frame)
    video.close()
