"""The data set card, and the way to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.demos import info, make


def test_pushing_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pusht_act.checkpoints.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="demos.push_to_hub=true needs a Hub token"):
        make(tmp_path / "x", "demos.push_to_hub=true", "demos.repo_id=me/demos")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_finished_data_set_is_pushed_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    pushed: list[tuple[str, Path, dict[str, Any]]] = []
    monkeypatch.setattr("pusht_act.checkpoints.hub.get_token", lambda: "hf_x")
    monkeypatch.setattr(
        LeRobotDataset, "push_to_hub", lambda self, **given: pushed.append((self.repo_id, self.root, given))
    )
    options = ["demos.push_to_hub=true", "demos.repo_id=me/demos"]
    make(tmp_path / "x", *options, count=1)
    repo_id, root, given = pushed[0]
    assert (repo_id, root) == ("me/demos", tmp_path / "x")
    assert "starts solved" in given["dataset_description"]
    assert "path=me/demos" in (tmp_path / "x" / "README.md").read_text()
    monkeypatch.setattr(LeRobotDataset, "push_to_hub", lambda _self, **_given: 1 / 0)
    with pytest.raises(OSError, match=r"complete in .*y, but could not be pushed to me/demos \(ZeroDivisionError"):
        make(tmp_path / "y", *options, count=1)
    assert info(tmp_path / "y")["total_episodes"] == 1
