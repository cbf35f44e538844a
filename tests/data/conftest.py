"""Copies of the small data sets that a test may change, with a cache of their own."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def keypoints(keypoints_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the data set of keypoints."""
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(keypoints_dataset, tmp_path / "data"))


@pytest.fixture
def pictures(image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the data set of images."""
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(image_dataset, tmp_path / "data"))
