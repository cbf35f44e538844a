"""Small data sets."""

from pathlib import Path

from lerobot.configs.default import DatasetConfig


def config(root: Path, repo_id: str = "local/tiny") -> DatasetConfig:
    return DatasetConfig(repo_id=repo_id, root=str(root), video_backend="pyav")
