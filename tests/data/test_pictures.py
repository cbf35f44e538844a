"""Pictures of videos: each frame has the one that is nearest to its time, or its episode is refused."""

import importlib.util
import logging
import re
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pusht_act.data import lerobot_reader
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.open_dataset import policy_features, split_episodes
from tests.helpers.dataset_config import config
from tests.helpers.odd_datasets import change_column, change_json, nearest_pictures, read_pictures, write_video

IMAGE = "observation.image"


@pytest.fixture
def dataset(image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(image_dataset, tmp_path / "data"))


def video_of(root: Path) -> Path:
    return next((root / "videos").rglob("*.mp4"))


def shift(*frames: int, by: float) -> Callable[[list[float]], None]:
    def change(times: list[float]) -> None:
        for frame in frames:
            times[frame] += by

    return change


@pytest.mark.parametrize("part", [1000, 7])
@pytest.mark.parametrize(
    ("change", "odd"),
    [
        (shift(by=0), None),
        (shift(10, by=0.06), "2 of 71 frames are not evenly spaced in time: frame 10, in episode 0, comes 0.16 s"),
        (shift(10, by=-0.06), "2 of 71 frames .* frame 10, in episode 0, comes 0.04 s"),
        (shift(10, 40, by=0.09), "4 of 71 frames"),
        (shift(*range(10, 23), by=0.06), "1 of 71 frames"),
        (shift(*range(71), by=0.04), None),  # all within half a frame, and as far apart as they should be
    ],
)
def test_each_frame_has_the_nearest_picture(
    change: Callable[[list[float]], None],
    odd: str | None,
    part: int,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lerobot_reader, "FRAMES_PER_PART", part)
    change_column(dataset, "data", "timestamp", change)
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        frames = open_lerobot_dataset(config(dataset))
        assert np.array_equal(frames.arrays[IMAGE], nearest_pictures(dataset))
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [bool(re.search(odd, line)) for line in said] == [True] if odd else not said
    assert not frames.incomplete


@pytest.mark.parametrize(
    ("missing", "lacking"),
    [([30], {1: 30}), ([0], {0: 0}), ([70], {2: 70}), ([30, 31, 60], {1: 30, 2: 60}), ([*range(54, 71)], {2: 54})],
)
def test_an_episode_that_lacks_a_picture_is_refused_and_the_others_are_right(
    missing: list[int], lacking: dict[int, int], dataset: Path
) -> None:
    times, pictures = read_pictures(dataset)
    kept = [i for i in range(71) if i not in missing]
    write_video(video_of(dataset), pictures[kept], (times[kept] * 1000).round().astype(int).tolist())
    frames = open_lerobot_dataset(config(dataset))
    assert np.array_equal(frames.arrays[IMAGE][kept], nearest_pictures(dataset)[kept])
    # Encoded again, the pictures are near to what they were, and far from their neighbours.
    assert np.abs(frames.arrays[IMAGE][kept].astype(int) - pictures[kept]).mean() < 2

    assert frames.incomplete.keys() == lacking.keys()
    first = min(lacking)
    rest = [episode for episode in range(3) if episode not in lacking]
    with pytest.raises(ValueError, match=f"no picture for frame {lacking[first]}, at .* s: the nearest is") as caught:
        split_episodes(frames, None, 0)
    assert f"local/tiny, episode {first}: videos/" in str(caught.value)
    # What the message says to give is right.
    (option,) = shlex.split(str(caught.value).rpartition("not whole: ")[2])
    assert option == f"+dataset.episodes={rest}".replace(" ", "")
    assert split_episodes(frames, rest, 0) == (rest, [])


@settings(max_examples=15, deadline=None)
@given(
    gaps=st.lists(st.integers(20, 300), min_size=4, max_size=12),
    wanted=st.lists(st.integers(0, 2500), min_size=1, max_size=20),
)
def test_any_times_find_the_nearest_picture(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], wanted: list[int]
) -> None:
    path = tmp_path_factory.mktemp("video") / "x.mp4"
    times = np.cumsum([0, *gaps])
    pictures = [np.full((3, 16, 16), 15 * i, np.uint8) for i in range(len(times))]
    write_video(path, pictures, times.tolist())
    out = np.zeros((len(wanted), 3, 16, 16), np.uint8)
    at = np.array(sorted(wanted)) / 1000
    distances = lerobot_reader._decode_part(path, (np.arange(len(at)), at), out, threading.Event())
    apart = np.abs(at[:, None] - times[None] / 1000)
    # Which of two that are equally near is a matter of rounding.
    found = np.round(out.mean((1, 2, 3)) / 15).astype(int)
    assert np.allclose(apart[np.arange(len(at)), found], apart.min(1), atol=1e-6)
    assert np.allclose(distances, apart.min(1), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([3, 96, 96], ["channels", "height", "width"]),
        ([3, 96, 96], ["channel", "height", "width"]),
        ([3, 96, 96], None),
        ([3, 96, 96], ["height", "width", "channel"]),  # the numbers are right, the names are not
        ([96, 96, 3], None),
        ([96, 96, 3], ["h", "w", "c"]),
    ],
)
def test_a_pictures_shape_may_begin_or_end_with_the_channels(
    shape: list[int], names: list[str] | None, dataset: Path
) -> None:
    right = open_lerobot_dataset(config(dataset))
    change_json(dataset, "info.json", lambda info: info["features"][IMAGE].update(shape=shape, names=names))
    frames = open_lerobot_dataset(config(dataset))
    assert np.array_equal(frames.arrays[IMAGE], right.arrays[IMAGE])
    assert policy_features(frames) == policy_features(right)
    assert policy_features(frames)[0][IMAGE].shape == (3, 96, 96)


def test_a_picture_of_another_size_is_named(dataset: Path) -> None:
    change_json(dataset, "info.json", lambda info: info["features"][IMAGE].update(shape=[64, 96, 3]))
    with pytest.raises(ValueError, match="mp4: frame .* is a picture of 96 x 96 pixels, info.json says 64 x 96: fetch"):
        open_lerobot_dataset(config(dataset))


@pytest.fixture
def cases(human: Path) -> Any:
    """The module that makes the odd data sets beside the checkout."""
    path = human.parent / "cases" / "make_datasets.py"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    spec = importlib.util.spec_from_file_location("make_datasets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_pictures_of_the_odd_data_sets_are_the_true_ones(
    cases: Any, human: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compare every frame with the human demonstrations' own picture. `pytest -s` shows the table."""
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "cache"))
    true = open_lerobot_dataset(config(human / "pusht")).arrays[IMAGE]
    table = [f"{'data set':14} {'frames':>6} {'other picture':>13} {'mean error':>10} {'refused'}"]
    for name in (name for name in cases.CASES if name.startswith("im_")):
        root = tmp_path / name
        cases.CASES[name]().write(root)
        frames = open_lerobot_dataset(config(root))
        images = frames.arrays[IMAGE]
        usable = np.concatenate([np.arange(*b) for e, b in enumerate(frames.episodes) if e not in frames.incomplete])
        # The true picture nearest to each time stamp; a video that was encoded again differs by a few grey levels, and
        # still must be nearer to its own picture than to its neighbours in time.
        expected = np.arange(len(frames))
        if name == "im_onelate":
            expected[50] = 51
        around = np.clip(expected[:, None] + [-2, -1, 0, 1, 2], 0, len(true) - 1)
        errors = np.stack(
            [np.abs(images.astype(np.int16) - true[column]).mean((1, 2, 3)) for column in around.T], axis=1
        )
        # Where the block and the agent rest, neighbours are the same picture.
        others = usable[errors[usable, 2] > errors[usable].min(1) + 1e-9]
        table.append(
            f"{name:14} {len(frames):6} {len(others):13} {errors[usable, 2].mean():10.4f} {[*frames.incomplete]}"
        )
        assert len(others) == 0, (name, others)
        assert np.array_equal(images[usable], nearest_pictures(root)[usable])
        assert [*frames.incomplete] == ([0] if name == "im_onemissing" else [])
    with capsys.disabled():
        print("\n" + "\n".join(table))
