"""The files of a data set: what is wrong with one is said in a line that names it, before a frame is decoded."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pusht_act.data.cache import FrameDataset
from pusht_act.data.dataset_files import DatasetError
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.open_dataset import normalization_stats, open_dataset
from pusht_act.runtime.errors import UserError
from tests.helpers.dataset_config import config, job
from tests.helpers.odd_datasets import change_column, change_json
from tests.helpers.sampling import some_not_slow

# JSON.

WRONG: list[Any] = [None, True, -1, 0, 1.5, 10**30, "text", "", [], [[]], {}, {"a": 1}]
"""A value of each type, and some that are none of a size or a rate."""


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in `content`, sections included."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of `content` with another value at `path`."""
    changed = copy.deepcopy(content)
    section = changed
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return changed


def attempt(*described: Any) -> tuple[FrameDataset | None, str]:
    """Return the data set, or why it cannot be used."""
    try:
        frames = open_dataset(*described)
        normalization_stats(frames, True)
    except (UserError, FileNotFoundError) as error:
        return None, str(error)
    return frames, ""


# Of 900 and 4,608 cases: 1 in place of these numbers tries all, which takes three minutes.
@pytest.mark.parametrize(
    ("name", "every"), some_not_slow([("info.json", 61), ("info.json", 7), ("stats.json", 299), ("stats.json", 47)], 2)
)
def test_a_value_of_any_type_is_refused_in_a_line_that_names_the_file(
    name: str, every: int, keypoints: Path, tmp_path: Path
) -> None:
    described = job(keypoints)
    path = keypoints / "meta" / name
    content = json.loads(path.read_text())
    right = {key: array.copy() for key, array in open_dataset(*described).arrays.items()}
    cases = [(place, value) for place in leaves(content) for value in WRONG][::every]
    refused = 0
    for place, value in cases:
        path.write_text(json.dumps(replaced(content, place, value)))
        frames, said = attempt(*described)
        if frames is None:
            refused += 1
            # What the features are is compared with the environment, and is that of the whole data set.
            assert any(name in said for name in (str(path), str(keypoints), "lerobot/pusht_keypoints")), (place, value)
            assert "\n" not in said
        else:
            # What nobody reads may be anything.
            assert all(np.array_equal(frames.arrays[key], right[key]) for key in right), (place, value)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert refused > len(cases) / 10
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("info.json", ("fps",), "ten", "meta/info.json: fps"),
        ("info.json", ("fps",), 0, "meta/info.json: fps"),
        ("info.json", ("total_frames",), 71.5, "meta/info.json: total_frames=71.5: "),
        ("info.json", ("features", "action", "shape"), "2", "meta/info.json: features.action.shape='2': "),
        (
            "info.json",
            ("features", "action", "shape", 0),
            10**9,
            "meta/info.json: features.action.shape.0=1000000000: ",
        ),
        ("info.json", ("features", "action", "dtype"), None, "meta/info.json: features.action.dtype=None: "),
        ("info.json", ("total_frames",), 70, "meta/episodes: holds 71 frames, info.json says total_frames=70: "),
        ("info.json", ("total_episodes",), 4, "meta/episodes: has 3 episodes, info.json says total_episodes=4: "),
        ("stats.json", ("action",), [1], "meta/stats.json: action=[1] holds no statistics: "),
        ("stats.json", ("action", "mean"), [1], "meta/stats.json: action.mean=[1]: expected numbers of shape [2]: "),
        ("stats.json", ("action", "std"), [1, -1], "meta/stats.json: action.std=[1, -1] is out of range: "),
        ("stats.json", ("action", "mean"), [1, float("nan")], "meta/stats.json: action.mean=[1, nan] is out of "),
        ("stats.json", ("action", "q01"), ["a", {}], "meta/stats.json: action.q01=['a', {}]: expected numbers"),
    ],
)
def test_the_message_names_file_key_and_value(
    name: str, place: tuple[Any, ...], value: Any, said: str, keypoints: Path
) -> None:
    change_json(keypoints, name, lambda content: replaced(content, place, value))
    described = job(keypoints)
    with pytest.raises(DatasetError) as caught:
        open_dataset(*described)
    assert str(caught.value).startswith(f"{keypoints}/{said}")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"', "\x00", '{"a": 1}}', "nul"])
@pytest.mark.parametrize("name", ["info.json", "stats.json"])
def test_a_file_that_is_no_json_is_named(name: str, text: str, keypoints: Path) -> None:
    (keypoints / "meta" / name).write_text(text)
    with pytest.raises(DatasetError, match=f"{name}: holds no JSON .*: fetch the data set again"):
        open_lerobot_dataset(config(keypoints))


# What is no file.

FILES = ("meta/info.json", "meta/stats.json", "meta/episodes/*/*.parquet", "data/*/*.parquet", "videos/*/*/*.mp4")


@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize(
    ("replace", "said"),
    [
        (os.mkfifo, "is no regular file: fetch"),
        (lambda path: path.symlink_to("/nowhere/x"), r"cannot be read \(No such file or directory\): fetch"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file: fetch"),
        (
            lambda path: path.write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9\nsize 12345\n"
            ),
            "is a pointer of Git LFS, not the file itself: run git lfs pull in",
        ),
    ],
    ids=["pipe", "broken link", "device", "LFS pointer"],
)
def test_what_is_no_file_is_refused_at_once(
    pattern: str, replace: Callable[[Path], Any], said: str, pictures: Path
) -> None:
    (path,) = pictures.glob(pattern)
    path.unlink()
    replace(path)
    with pytest.raises(DatasetError, match=f"{path}: {said}"):
        open_lerobot_dataset(config(pictures))


def test_a_folder_in_place_of_a_file_is_named(keypoints: Path) -> None:
    path = keypoints / "meta" / "info.json"
    path.unlink()
    path.mkdir()
    with pytest.raises((UserError, OSError), match=str(path)):
        open_lerobot_dataset(config(keypoints))


def test_a_data_set_of_links_is_read(keypoints: Path, tmp_path: Path) -> None:
    """The Hub's cache consists of links."""
    linked = tmp_path / "linked"
    for path in (path for path in keypoints.rglob("*") if path.is_file()):
        link = linked / path.relative_to(keypoints)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert open_lerobot_dataset(config(linked)).key == open_lerobot_dataset(config(keypoints)).key


# Tables.


def put(row: int, value: Any) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[row] = value

    return change


@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        ("dataset_from_index", put(1, 24), "episode 1 has frames 24 to 54, the next is 23"),
        ("dataset_from_index", put(1, 20), "episode 1 has frames 20 to 54, the next is 23"),
        ("dataset_from_index", put(0, 1), "episode 0 has frames 1 to 23, the next is 0"),
        ("dataset_to_index", put(1, 23), "episode 1 has frames 23 to 23"),
        ("dataset_to_index", put(2, 72), "holds 72 frames, info.json says total_frames=71"),
        ("dataset_to_index", put(2, None), "column dataset_to_index has 1 rows without a value"),
        ("dataset_to_index", lambda _: pa.array(["x"] * 3), "column dataset_to_index holds string, not whole numbers"),
        ("dataset_to_index", lambda _: pa.array([23.0, 54.0, 71.0]), "column dataset_to_index holds double, not whole"),
        ("tasks", lambda _: pa.array([1, 2, 3]), "column tasks holds int64, not lists of texts"),
        ("tasks", lambda _: pa.array([[1], [2], [3]]), "column tasks holds list<.*int64>, not lists of texts"),
    ],
)
def test_the_table_of_episodes_is_checked(column: str, change: Any, said: str, keypoints: Path) -> None:
    change_column(keypoints, "meta/episodes", column, change)
    with pytest.raises(DatasetError, match=f"{keypoints}/meta/episodes: {said}"):
        open_lerobot_dataset(config(keypoints))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("chunk_index", "x", "column videos/observation.image/chunk_index holds string, not whole numbers"),
        ("from_timestamp", float("nan"), "column videos/observation.image/from_timestamp, row 0: nan is no finite"),
        ("from_timestamp", None, "column videos/observation.image/from_timestamp has 1 rows without a value"),
    ],
)
def test_a_videos_place_is_checked(column: str, value: Any, said: str, pictures: Path) -> None:
    rest: list[Any] = ["0", "0"] if isinstance(value, str) else [1.0, 2.0]
    change_column(pictures, "meta/episodes", f"videos/observation.image/{column}", lambda _: pa.array([value, *rest]))
    with pytest.raises(DatasetError, match=said):
        open_lerobot_dataset(config(pictures))


def swap(values: list[Any]) -> None:
    values[30], values[31] = values[31], values[30]


@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        ("index", swap, "row 30 has index=31, expected 30"),
        ("index", put(70, 90), "row 70 has index=90, expected 70"),
        ("index", put(70, None), "column index has 1 rows without a value"),
        ("episode_index", put(22, 1), "row 22 has episode_index=1, expected 0"),
        ("timestamp", swap, r"row 31 has timestamp=0.7, not after that of the row before"),
        ("timestamp", put(3, float("nan")), "column timestamp, row 3: nan is no finite number"),
        ("action", put(3, None), "column action has 1 rows without a value"),
        ("action", lambda _: pa.array([[1.0, 2.0]] * 70 + [[1.0]]), r"lists of different lengths, \[1, 2\]"),
        (
            "action",
            lambda _: pa.array([[1.0, 2.0, 3.0]] * 71),
            r"holds double of shape \[3\], info.json says shape \[2\]",
        ),
        ("action", lambda _: pa.array([1.0] * 71), r"holds double of shape \[1\], info.json says shape \[2\]"),
        ("action", lambda _: pa.array(["x"] * 71), r"holds string of shape \[1\], info.json says shape \[2\]"),
    ],
)
def test_the_table_of_frames_is_checked(column: str, change: Any, said: str, keypoints: Path) -> None:
    change_column(keypoints, "data", column, change)
    with pytest.raises(DatasetError, match=f"{keypoints}/data: .*{said}"):
        open_lerobot_dataset(config(keypoints))


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ([1], pa.array(np.arange(71, dtype=np.float32))),
        ([1], pa.array([[float(i)] for i in range(71)])),
        ([1], pa.array(np.arange(71))),
        ([2, 2], pa.array([[[i, 0], [1, 2]] for i in range(71)])),
    ],
)
def test_numbers_are_read_however_they_are_stored(shape: list[int], values: pa.Array, keypoints: Path) -> None:
    """LeRobot stores one number as a plain column, several as a list."""
    change_json(keypoints, "info.json", lambda info: info["features"]["observation.state"].update(shape=shape))
    change_column(keypoints, "data", "observation.state", lambda _: values)
    found = open_lerobot_dataset(config(keypoints)).arrays["observation.state"]
    assert found.shape == (71, *shape)
    assert found.reshape(71, -1)[:, 0].tolist() == [*range(71)]


@pytest.mark.parametrize("total", [0, 71])
def test_a_data_set_without_episodes_is_refused(total: int, keypoints: Path) -> None:
    change_json(keypoints, "info.json", lambda info: info.update(total_episodes=0, total_frames=total))
    with pytest.raises(UserError, match=f"dataset.root={keypoints} has no episodes .*: record some, or give another"):
        open_lerobot_dataset(config(keypoints))
