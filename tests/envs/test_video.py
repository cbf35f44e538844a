"""Videos that can be played: what was drawn is what is seen."""

from pathlib import Path

import av
import numpy as np

from pusht_act.envs.video import write_video


def test_videos_show_their_frames_one_after_the_other(tmp_path: Path) -> None:
    ramp = np.linspace(0, 200, 20).astype(np.uint8)
    videos = {
        tmp_path / "grey.mp4": [np.full((64, 64, 3), value, np.uint8) for value in ramp],
        tmp_path / "odd.mp4": [np.full((33, 41, 3), value, np.uint8) for value in ramp[::-1]],
    }
    for path, frames in videos.items():
        write_video(path, frames, fps=10)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 10
            assert stream.codec_context.pix_fmt == "yuv420p"
            seen = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(seen) == len(frames)
        assert seen[0].shape == (*(side - side % 2 for side in frames[0].shape[:2]), 3)
        assert max(abs(float(a.mean()) - float(b.mean())) for a, b in zip(seen, frames, strict=True)) < 4
