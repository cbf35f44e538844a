"""Write demonstrations as a LeRobotDataset v3.0, render its card, upload it: what `demos` needs LeRobot for.

Demonstration (start, labels, executed actions) -> replay in gym-pusht -> frames -> add_frame, save_episode
                                                                      -> statistics of the images

This is the only module of the room that imports LeRobot, which takes seconds: it does so inside functions.
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
from huggingface_hub import DatasetCard
from jaxtyping import Int64
from tqdm.auto import tqdm

from pusht_act.demos.expert import Demonstration
from pusht_act.demos.features import FEATURES, TASK
from pusht_act.demos.image_stats import count_values, image_stats
from pusht_act.demos.initial_states import describe_start
from pusht_act.demos.replay import ReplayedEpisode, replay_all

FPS = 10
_SCALAR: dict[str, Any] = {"shape": [1], "names": None}
NEXT = {
    name: {"dtype": dtype, **_SCALAR}
    for name, dtype in (("next.reward", "float32"), ("next.done", "bool"), ("next.success", "bool"))
}


def features(image: bool) -> dict[str, dict[str, Any]]:
    """Return the features of lerobot/pusht if `image`, else of lerobot/pusht_keypoints; LeRobot adds index columns."""
    observation = (
        {"observation.image": FEATURES["observation.image"] | {"dtype": "video"}}
        if image
        else {"observation.environment_state": FEATURES["observation.environment_state"]}
    )
    return observation | {key: FEATURES[key] for key in ("observation.state", "action")} | NEXT


def write_lerobot(root: Path, solved: Sequence[Demonstration], image: bool, workers: int) -> None:
    """Replay demonstrations in gym-pusht and write the data set by LeRobot's writer.

    Args:
        root: Folder of the data set, which must not exist.
        solved: The demonstrations; each replay has to succeed.
        image: Whether to observe images, written as videos, or keypoints.
        workers: Number of processes that render; at most two are used.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    counts = np.zeros((3, 256), np.int64)
    with _quiet():
        dataset = LeRobotDataset.create(
            # Neither looked up nor written into the data set.
            "local/demos",
            FPS,
            features(image),
            root,
            use_videos=image,
            video_backend="pyav",
            image_writer_threads=2 if image else 0,
        )
        # The executed actions, noise included, give the observations; the clean ones are stored as labels.
        trajectories = [(demo.start, demo.executed) for demo in solved]
        with closing(replay_all(trajectories, image, min(workers, 2))) as episodes:
            pairs = zip(solved, episodes, strict=True)
            for demo, episode in tqdm(pairs, "writing", len(solved), unit="demo", disable=None):
                assert episode.success[-1], f"the demonstration of {describe_start(demo.start)} does not replay"
                if episode.image is not None:
                    counts += count_values(episode.image)
                for frame in _frames(demo, episode):
                    dataset.add_frame(frame)
                dataset.save_episode()
        dataset.finalize()
    if image:
        _correct_statistics(root, counts, sum(len(demo.action) for demo in solved))
    # LeRobot leaves the folder in which it kept the frames of its videos.
    shutil.rmtree(root / "images", ignore_errors=True)
    _make_readable(root)


def _frames(demo: Demonstration, episode: ReplayedEpisode) -> Iterator[dict[str, Any]]:
    """Yield the frames of an episode as LeRobotDataset.add_frame takes them."""
    for t in range(len(demo.action)):
        observation = (
            {"observation.environment_state": episode.environment_state[t]}
            if episode.image is None
            else {"observation.image": episode.image[t]}
        )
        yield observation | {
            "observation.state": episode.observation_state[t],
            "action": demo.action[t],
            "next.reward": episode.reward[t : t + 1],
            "next.done": episode.done[t : t + 1],
            "next.success": episode.success[t : t + 1],
            "task": TASK,
        }


def _correct_statistics(root: Path, counts: Int64[np.ndarray, "3 256"], frames: int) -> None:
    """Replace the statistics of the images in stats.json by exact ones.

    Args:
        root: Folder of the data set.
        counts: Histogram of each channel over all frames.
        frames: Number of frames.
    """
    # LeRobot 0.6.1 sums half a million float32 numbers at once (compute_stats.RunningQuantileStats): the standard
    # deviations of lerobot/pusht's channels come out 6 to 18 % too low. It also samples at most 100 frames an episode.
    path = root / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    exact = image_stats(counts)
    assert exact.keys() | {"count"} == stats["observation.image"].keys()
    stats["observation.image"] = {
        **{name: array.reshape(3, 1, 1).tolist() for name, array in exact.items()},
        "count": [frames],
    }
    path.write_text(json.dumps(stats, indent=4))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bar and the 20 lines of the encoder that every episode would print."""
    import av.logging
    import datasets

    # SVT-AV1 encodes LeRobot's videos and reads its log level from the environment.
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


def _make_readable(root: Path) -> None:
    """Give the videos the mode of ordinary files."""
    # LeRobot moves them from temporary files, which only their owner may read.
    mode = (root / "meta" / "info.json").stat().st_mode
    for path in root.rglob("*.mp4"):
        path.chmod(mode)


def render_card(root: Path, fields: dict[str, Any]) -> DatasetCard:
    """Fill LeRobot's card template with `fields` and the features of the data set at `root`."""
    from lerobot.datasets.io_utils import load_info
    from lerobot.datasets.utils import create_lerobot_dataset_card

    card: DatasetCard = create_lerobot_dataset_card(dataset_info=load_info(root), **fields)
    return card


def upload(root: Path, repo_id: str, files: list[str], fields: dict[str, Any]) -> None:
    """Upload `files` (patterns) of the data set at `root` to the Hugging Face Hub, with a card from `fields`.

    Raises:
        Exception: Whatever LeRobot, the Hub client or httpx raise.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    LeRobotDataset(repo_id, root=root, video_backend="pyav").push_to_hub(allow_patterns=files, **fields)
