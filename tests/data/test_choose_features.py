"""Whether a data set fits the environment: shapes, names and statistics, said before a frame is decoded."""

import logging
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pusht_act.data.cache import cache_root
from pusht_act.data.dataset_files import DatasetError
from pusht_act.data.open_dataset import normalization_stats, open_dataset, policy_features
from pusht_act.runtime.errors import UserError
from tests.helpers.dataset_config import job
from tests.helpers.odd_datasets import change_column, change_json

KEYPOINTS, STATE, IMAGE = "observation.environment_state", "observation.state", "observation.image"


def rename(root: Path, old: str, new: str) -> None:
    """Give a feature another name, as another recorder would have."""
    change_json(root, "info.json", lambda info: info["features"].update({new: info["features"].pop(old)}))
    change_json(root, "stats.json", lambda stats: stats.update({new: stats.pop(old)}))
    for folder in ("data", "meta/episodes"):
        (path,) = (root / folder).rglob("*.parquet")
        table = pq.read_table(path)
        names = [new if name == old else name.replace(f"/{old}/", f"/{new}/") for name in table.column_names]
        pq.write_table(table.rename_columns(names).replace_schema_metadata(None), path)
    if (video := root / "videos" / old).is_dir():
        video.rename(root / "videos" / new)


def add(root: Path, key: str, like: str) -> None:
    """Add a feature that is like another one."""
    change_json(root, "info.json", lambda info: info["features"].update({key: info["features"][like]}))
    change_json(root, "stats.json", lambda stats: stats.update({key: stats[like]}))
    if (video := root / "videos" / like).is_dir():
        shutil.copytree(video, root / "videos" / key)
        folder, prefix = root / "meta" / "episodes", f"videos/{like}/"
    else:
        folder, prefix = root / "data", like
    (path,) = folder.rglob("*.parquet")
    table = pq.read_table(path)
    for name in [name for name in table.column_names if name.startswith(prefix)]:
        table = table.append_column(name.replace(like, key), table[name])
    pq.write_table(table.replace_schema_metadata(None), path)


def refusal(root: Path, *overrides: str, env: str = "pusht_keypoints") -> str:
    """Return why the data set is refused; nothing has been decoded."""
    described = job(root, *overrides, env=env)
    with pytest.raises(UserError) as caught:
        open_dataset(*described)
    assert not list(cache_root().glob("*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "width", "says", "right"),
    [(STATE, 5, "gives", 2), (STATE, 1, "gives", 2), (KEYPOINTS, 8, "gives", 16), ("action", 3, "takes", 2)],
)
def test_another_shape_than_the_environments_is_refused_with_both(
    key: str, width: int, says: str, right: int, keypoints: Path
) -> None:
    change_json(keypoints, "info.json", lambda info: info["features"][key].update(shape=[width]))
    change_column(keypoints, "data", key, lambda _: pa.array(np.zeros((71, width)).tolist()))
    assert refusal(keypoints) == (
        f"dataset lerobot/pusht_keypoints: {key} has shape [{width}], but env.obs_type=environment_state_agent_pos "
        f"{says} shape [{right}]: give a data set that was recorded in this environment"
    )


@pytest.mark.parametrize("shape", [[96, 96, 1], [4, 96, 96], [96, 96]])
def test_a_picture_has_three_channels(shape: list[int], pictures: Path) -> None:
    change_json(pictures, "info.json", lambda info: info["features"][IMAGE].update(shape=shape))
    assert f"observation.image has shape {shape}: a picture has height, width and 3 channels" in refusal(
        pictures, env="pusht"
    )


@pytest.mark.parametrize(
    ("fps", "said"), [(10, None), (20, "at 20 Hz, .* at 0.5 times"), (5, "at 5 Hz, .* at 2 times")]
)
def test_another_rate_than_the_environments_is_said(
    fps: int, said: str | None, keypoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_json(keypoints, "info.json", lambda info: info.update(fps=fps))
    change_column(keypoints, "data", "timestamp", lambda times: [time * 10 / fps for time in times])
    open_dataset(*job(keypoints))
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == (said is not None)
    if said is not None:
        assert re.search(f"was recorded {said} their speed", lines[0])


# Names.


def follow(root: Path, message: str, *before: str, env: str) -> Any:
    """Open the data set with what a message says to give."""
    given = shlex.split(message.rpartition(": give ")[2])
    return open_dataset(*job(root, *before, *given, env=env))


def test_an_observation_too_many_is_left_out_as_the_message_says(keypoints: Path) -> None:
    right = open_dataset(*job(keypoints))
    shutil.rmtree(cache_root())
    gripper = pa.array(np.arange(71, dtype=np.float32))
    add(keypoints, "observation.gripper", STATE)
    change_json(keypoints, "info.json", lambda info: info["features"]["observation.gripper"].update(shape=[1]))
    change_column(keypoints, "data", "observation.gripper", lambda _: gripper)
    message = refusal(keypoints)
    assert message == (
        "dataset lerobot/pusht_keypoints has observation.environment_state, observation.gripper, observation.state, "
        "but env.obs_type=environment_state_agent_pos gives observation.environment_state, observation.state: "
        "give 'dataset.observations=[observation.environment_state,observation.state]'"
    )
    frames = follow(keypoints, message, env="pusht_keypoints")
    assert frames.arrays.keys() == right.arrays.keys()
    assert all(np.array_equal(frames.arrays[key], right.arrays[key]) for key in right.arrays)


def test_a_camera_of_another_name_is_renamed_as_the_message_says(pictures: Path) -> None:
    right = open_dataset(*job(pictures, env="pusht"))
    shutil.rmtree(cache_root())
    rename(pictures, IMAGE, "observation.images.top")
    message = refusal(pictures, env="pusht")
    assert message.endswith(": give 'rename_map={observation.images.top: observation.image}'")
    frames = follow(pictures, message, env="pusht")
    assert all(np.array_equal(frames.arrays[key], right.arrays[key]) for key in right.arrays)
    assert frames.image_keys == [IMAGE]
    assert policy_features(frames) == policy_features(right)
    assert normalization_stats(frames, False).keys() == normalization_stats(right, False).keys()


def test_one_of_two_cameras_is_chosen(pictures: Path) -> None:
    rename(pictures, IMAGE, "observation.images.top")
    add(pictures, "observation.images.wrist", "observation.images.top")
    message = refusal(pictures, env="pusht")
    assert message.endswith(
        ": give 'rename_map={observation.images.top: observation.image}' "
        f"'dataset.observations=[{STATE},observation.images.top]'"
    )
    assert [*follow(pictures, message, env="pusht").arrays].count(IMAGE) == 1
    # The other one, in place of what the message proposes.
    other = message.replace("images.top", "images.wrist")
    assert follow(pictures, other, env="pusht").key != follow(pictures, message, env="pusht").key


def test_state_and_action_may_have_other_names(keypoints: Path) -> None:
    rename(keypoints, STATE, "state")
    rename(keypoints, "action", "actions")
    message = refusal(keypoints)
    assert message == (
        f"dataset lerobot/pusht_keypoints has no action to learn, it has {KEYPOINTS}, actions, state: "
        f"give 'rename_map={{actions: action, state: {STATE}}}'"
    )
    assert follow(keypoints, message, env="pusht_keypoints").arrays.keys() == {KEYPOINTS, STATE, "action"}


@pytest.mark.parametrize(
    "given", ["dataset.observations=[observation.xy]", "rename_map={observation.xy: observation.state}"]
)
def test_what_was_given_is_kept_in_what_is_proposed(given: str, keypoints: Path) -> None:
    rename(keypoints, STATE, "observation.xy")
    add(keypoints, "observation.more", KEYPOINTS)
    message = refusal(keypoints, given)
    assert message.endswith(
        f": give 'rename_map={{observation.xy: {STATE}}}' 'dataset.observations=[{KEYPOINTS},observation.xy]'"
    )
    assert follow(keypoints, message, env="pusht_keypoints").arrays.keys() == {KEYPOINTS, STATE, "action"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rename_map={observation.images.top: observation.image}", "rename_map: observation.images.top is not in"),
        ("dataset.observations=[observation.images.top]", "dataset.observations: observation.images.top is not in"),
        (
            f"rename_map={{{STATE}: {KEYPOINTS}}}",
            f"{KEYPOINTS} and {STATE} would both be {KEYPOINTS}: rename both, or leave",
        ),
        (f"dataset.observations=[{STATE}]", f"has {STATE}, but env.obs_type=environment_state_agent_pos gives"),
    ],
)
def test_an_option_that_does_not_fit_the_data_set_is_refused(override: str, said: str, keypoints: Path) -> None:
    message = refusal(keypoints, override)
    assert said in message
    if "not in" in said:
        assert "it has observation.environment_state, observation.state, action" in message


@pytest.mark.parametrize(("kind", "env"), [("keypoints", "pusht"), ("pictures", "pusht_keypoints")])
def test_the_environment_that_fits_is_named(kind: str, env: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    other = {"pusht": "pusht_keypoints", "pusht_keypoints": "pusht"}[env]
    assert f": give env={other}, or a data set" in refusal(root, env=env)


# Statistics.


def test_missing_statistics_are_computed_as_the_message_says(keypoints: Path) -> None:
    (keypoints / "meta" / "stats.json").unlink()
    message = refusal(keypoints)
    assert message.startswith(f"{keypoints}/meta/stats.json: is missing, and with it the statistics")
    command = shlex.split(message.rpartition("compute them with ")[2])
    assert command == [
        *(
            "lerobot-edit-dataset",
            "--repo_id=lerobot/pusht_keypoints",
            f"--root={keypoints}",
            f"--new_root={keypoints}",
        ),
        *("--operation.type=recompute_stats", "--operation.overwrite=true"),
    ]


@pytest.mark.slow
def test_lerobots_command_computes_them(keypoints: Path) -> None:
    right = normalization_stats(open_dataset(*job(keypoints)), True)
    shutil.rmtree(cache_root())
    (keypoints / "meta" / "stats.json").unlink()
    name, *arguments = shlex.split(refusal(keypoints).rpartition("compute them with ")[2])
    subprocess.run([str(Path(sys.executable).parent / name), *arguments], check=True, capture_output=True)
    found = normalization_stats(open_dataset(*job(keypoints)), True)
    for key in (STATE, "action"):
        assert np.allclose(found[key]["mean"], right[key]["mean"], rtol=1e-4)
        assert np.allclose(found[key]["std"], right[key]["std"], rtol=1e-4)


@pytest.mark.parametrize(("key", "name"), [("action", None), (STATE, None), ("action", "std"), (STATE, "mean")])
def test_a_missing_statistic_is_named(key: str, name: str | None, keypoints: Path) -> None:
    change_json(
        keypoints, "stats.json", lambda stats: (stats if name is None else stats[key]).pop(name or key) and None
    )
    message = refusal(keypoints)
    assert message.startswith(
        f"{keypoints}/meta/stats.json: {key} has no {name or 'mean'}, which normalizes it: compute"
    )


def test_statistics_of_other_tools_do_no_harm(keypoints: Path) -> None:
    right = open_dataset(*job(keypoints)).stats["action"]
    odd = {"median": "none", "count": 71, "q05": [[1], [2]]}
    change_json(keypoints, "stats.json", lambda stats: stats["action"].update(odd))
    frames = open_dataset(*job(keypoints))
    assert frames.stats["action"] == right | {"count": 71, "q05": [[1], [2]]}
    normalization_stats(frames, True)


def test_what_nothing_normalizes_needs_no_statistics(pictures: Path) -> None:
    """ImageNet's are taken for pictures; other normalizations have other statistics."""
    quantiles = "+policy.normalization_mapping={VISUAL: MEAN_STD, STATE: QUANTILES, ACTION: MIN_MAX}"

    def thin(stats: Any) -> None:
        del stats[IMAGE]
        stats[STATE] = {name: stats[STATE][name] for name in ("q01", "q99")}
        stats["action"] = {name: stats["action"][name] for name in ("min", "max")}

    change_json(pictures, "stats.json", thin)
    frames = open_dataset(*job(pictures, quantiles, env="pusht"))
    assert normalization_stats(frames, True)[IMAGE].keys() == {"mean", "std"}
    shutil.rmtree(cache_root())
    assert "observation.state has no mean, which normalizes it" in refusal(pictures, env="pusht")
    message = refusal(pictures, quantiles, "+dataset.use_imagenet_stats=false", env="pusht")
    assert "observation.image has no mean, which normalizes it" in message


def test_a_file_error_is_a_mistake_of_the_user(keypoints: Path) -> None:
    (keypoints / "meta" / "stats.json").write_text("[1]")
    with pytest.raises(DatasetError, match=r"stats.json: holds \[1\], no JSON object: fetch the data set again"):
        open_dataset(*job(keypoints))
