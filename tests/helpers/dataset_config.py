"""LeRobot's configuration of the small data sets that conftest.py writes."""

from pathlib import Path

from lerobot.configs.default import DatasetConfig


def config(root: Path, repo_id: str = "local/tiny") -> DatasetConfig:
    """Return the configuration that reads the data set at `root`."""
    return DatasetConfig(repo_id=repo_id, root=str(root), video_backend="pyav")
