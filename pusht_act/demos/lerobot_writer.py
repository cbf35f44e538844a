"""Demonstrations -> a LeRobotDataset v3.0 with the features of lerobot/pusht or lerobot/pusht_keypoints.

Demonstration (start, labels, what was done) -> replay in gym-pusht -> frames -> LeRobotDataset.add_frame, .save_episode
                                                                  -> statistics of the pictures
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from pusht_act.demos.expert import Demonstration
from pusht_act.demos.features import FEATURES, TASK
from pusht_act.demos.initial_states import describe_start
from pusht_act.demos.replay import ReplayedEpisode, replay_all

FPS = 10
_SCALAR: dict[str, Any] = {"shape": [1], "names": None}
NEXT = {
    name: {"dtype": dtype, **_SCALAR}
    for name, dtype in (("next.reward", "float32"), ("next.done", "bool"), ("next.success", "bool"))
}


def features(image: bool) -> dict[str, dict[str, Any]]:
    """Those of lerobot/pusht if `image`, else of lerobot/pusht_keypoints; LeRobot adds its index columns."""
    seen = (
        {"observation.image": FEATURES["observation.image"] | {"dtype": "video"}}
        if image
        else {"observation.environment_state": FEATURES["observation.environment_state"]}
    )
    return seen | {key: FEATURES[key] for key in ("observation.state", "action")} | NEXT


def write_lerobot(root: Path, solved: Sequence[Demonstration], image: bool, workers: int) -> None:
    """Replay `solved` in gym-pusht and write what it shows, by LeRobot's writer, into the new folder `root`."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    counts = np.zeros((3, 256), np.int64)
    with _quiet():
        dataset = LeRobotDataset.create(
            "local/demos",
            FPS,
            features(image),
            root,
            use_videos=image,
            video_backend="pyav",
            image_writer_threads=2 if image else 0,
        )
        tried = [(made.start, made.executed) for made in solved]
        with closing(replay_all(tried, image, min(workers, 2))) as episodes:
            pairs = zip(solved, episodes, strict=True)
            for made, episode in tqdm(pairs, "writing", len(solved), unit="demo", disable=None):
                assert episode.success[-1], f"the demonstration of {describe_start(made.start)} does not replay"
                if episode.image is not None:
                    counts += _counts(episode.image)
                for frame in _rows(made, episode):
                    dataset.add_frame(frame)
                dataset.save_episode()
        dataset.finalize()
    if image:
        _correct_statistics(root, counts, sum(len(made.action) for made in solved))
    shutil.rmtree(root / "images", ignore_errors=True)  # where its videos' frames lay
    _let_others_read(root)


def _rows(made: Demonstration, episode: ReplayedEpisode) -> Iterator[dict[str, Any]]:
    """An episode frame by frame; the action is the label, which is what was done unless there is noise."""
    for t in range(len(made.action)):
        seen = (
            {"observation.environment_state": episode.environment_state[t]}
            if episode.image is None
            else {"observation.image": episode.image[t]}
        )
        yield seen | {
            "observation.state": episode.observation_state[t],
            "action": made.action[t],
            "next.reward": episode.reward[t : t + 1],
            "next.done": episode.done[t : t + 1],
            "next.success": episode.success[t : t + 1],
            "task": TASK,
        }


def _counts(image: UInt8[np.ndarray, "T H W 3"]) -> Int64[np.ndarray, "3 256"]:
    """How often each value occurs in each channel."""
    return np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])


def _correct_statistics(root: Path, counts: Int64[np.ndarray, "3 256"], frames: int) -> None:
    """Put the exact statistics of all pictures into stats.json.

    LeRobot 0.6.1 sums half a million float32 in one go (compute_stats.RunningQuantileStats), which puts the standard
    deviation of lerobot/pusht's channels 6 to 18 % too low; it also counts at most 100 frames of an episode.
    """
    path = root / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    value, share = np.arange(256) / 255.0, counts / counts.sum(axis=1, keepdims=True)
    mean = share @ value
    below = np.cumsum(share, axis=1)
    exact = {
        "min": value[(counts > 0).argmax(axis=1)],
        "max": value[255 - (counts[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1)),
        **{f"q{q:02d}": value[(below >= q / 100).argmax(axis=1)] for q in (1, 10, 50, 90, 99)},
    }
    assert exact.keys() | {"count"} == stats["observation.image"].keys()
    stats["observation.image"] = {
        **{name: array.reshape(3, 1, 1).tolist() for name, array in exact.items()},
        "count": [frames],
    }
    path.write_text(json.dumps(stats, indent=4))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar and the encoder's 20 lines that each episode would print."""
    import av.logging
    import datasets

    os.environ.setdefault("SVT_LOG", "1")
    av.logging.set_libav_level(av.logging.ERROR)
    lerobot, bars = logging.getLogger("lerobot"), not datasets.are_progress_bars_disabled()
    level = lerobot.level
    lerobot.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lerobot.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _let_others_read(root: Path) -> None:
    """LeRobot's videos come from a temporary file that is nobody else's; give all files the mode of ordinary ones."""
    mode = (root / "meta" / "info.json").stat().st_mode
    for path in root.rglob("*.mp4"):
        path.chmod(mode)
