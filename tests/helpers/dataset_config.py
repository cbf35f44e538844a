"""LeRobot's configuration of the small data sets that conftest.py writes."""

import copy
from functools import cache
from pathlib import Path

from lerobot.configs.default import DatasetConfig

from pusht_act.config.lerobot import LeRobotConfig, decode
from pusht_act.config.schema import Config
from tests.helpers.config import config as job_config


def config(root: Path, repo_id: str = "local/tiny") -> DatasetConfig:
    """Return the configuration that reads the data set at `root`."""
    return DatasetConfig(repo_id=repo_id, root=str(root), video_backend="pyav")


def job(root: Path, *overrides: str, env: str = "pusht_keypoints") -> tuple[Config, LeRobotConfig]:
    """Return the configuration of a job that trains on the data set at `root`, and LeRobot's view of it."""
    config = copy.deepcopy(_compose(env, *overrides))
    config.dataset["root"] = str(root)
    return config, decode(config)


@cache
def _compose(env: str, *overrides: str) -> Config:
    """Compose once what many tests ask for; it takes half a second."""
    return job_config(f"env={env}", f"dataset={env}", "policy.pretrained_backbone_weights=null", *overrides)
