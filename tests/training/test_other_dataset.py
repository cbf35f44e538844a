"""A run that goes on with a data set of other content: refused, or said where it is allowed."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import pusht_act
from pusht_act.job import Result
from tests.helpers.odd_datasets import change_json

Tiny = Callable[..., Result]


@pytest.fixture
def dataset(keypoints_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(keypoints_dataset, tmp_path / "data"))


def change(root: Path) -> None:
    """Give the data set other content, from which other statistics would follow."""
    change_json(root, "stats.json", lambda stats: stats["action"].update(mean=[1.0, 2.0]))


def statistics(run: Path) -> dict[str, Any]:
    (path,) = (run / "checkpoints" / "last" / "pretrained_model").glob("policy_preprocessor*.safetensors")
    return {key: tensor.tolist() for key, tensor in load_file(path).items()}


def resume(run: Path, steps: int, *overrides: str) -> Result:
    return pusht_act.run(["mode=resume", f"output_dir={run}", f"steps={steps}", *overrides])


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "other content" in record.getMessage()]


def recorded(run: Path) -> str:
    state = json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text())
    return str(state["dataset"])


def test_a_run_resumes_on_other_content_only_where_that_is_allowed(
    tiny: Tiny, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny("dataset=pusht_keypoints", f"dataset.root={dataset}", "steps=2").output_dir
    before, content = statistics(run), recorded(run)
    # The same content elsewhere is the same data set.
    moved = shutil.copytree(dataset, tmp_path / "moved")
    resume(run, 3, f"dataset.root={moved}")
    assert not said(caplog)

    # Other content is refused; allowed, it is said, and the statistics stay.
    change(dataset)
    with pytest.raises(ValueError, match=rf"dataset.root={dataset} has other content than what .*000003 was trained"):
        resume(run, 4, f"dataset.root={dataset}")
    assert not (run / "checkpoints" / "000004").exists()
    assert resume(run, 4, f"dataset.root={dataset}", "dataset.allow_change=true").step == 4
    (line,) = said(caplog)
    assert line.endswith("has other content than the checkpoint's data set; the old statistics stay")
    assert statistics(run) == before
    assert recorded(run) != content

    # It was a permission for that command: this content is the run's now, and another one is refused again.
    caplog.clear()
    resume(run, 5)
    assert not said(caplog)
    change_json(dataset, "stats.json", lambda stats: stats["action"].update(mean=[3.0, 4.0]))
    with pytest.raises(ValueError, match=r"dataset.allow_change=true to go on with this one"):
        resume(run, 6)


def test_the_same_command_resumes_on_other_content_only_where_that_is_allowed(tiny: Tiny, dataset: Path) -> None:
    command = ("dataset=pusht_keypoints", f"dataset.root={dataset}", "resume.auto=true", "save_freq=2")
    run = tiny(*command, "steps=2").output_dir
    change(dataset)
    with pytest.raises(ValueError, match=r"has other content than what .*000002 was trained on"):
        tiny(*command, "steps=3")
    assert tiny(*command, "steps=3", "dataset.allow_change=true").step == 3
    assert tiny(*command, "steps=4").output_dir == run


def test_more_built_in_demonstrations_are_other_content(tiny: Tiny) -> None:
    run = tiny("steps=2").output_dir
    with pytest.raises(ValueError, match=r"dataset.repo_id=pusht_act/demos has other content than what .*000002 was"):
        resume(run, 3, "demos.n_episodes=3")
    assert resume(run, 3).step == 3


def test_a_checkpoint_that_records_no_data_set_resumes_with_a_line(
    tiny: Tiny, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of stock LeRobot and of earlier versions do."""
    run = tiny("dataset=pusht_keypoints", f"dataset.root={dataset}", "steps=2").output_dir
    last = run / "checkpoints" / "last"
    state = last / "training_state" / "pusht_act.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "dataset"}))
    (last / "manifest.json").unlink()
    change(dataset)
    with caplog.at_level(logging.INFO):
        resume(run, 3)
    (line,) = [record.getMessage() for record in caplog.records if "is not recorded" in record.getMessage()]
    assert line.endswith(f"dataset.root={dataset} is normalized by its statistics")
