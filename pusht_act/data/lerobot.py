"""What `data` takes from LeRobot; the only module of the room that imports it.

`lerobot.datasets` takes seconds to import: everything from it is imported inside the function that needs it.
"""

import logging
from pathlib import Path
from typing import Any

from lerobot.utils.constants import ACTION, IMAGENET_STATS

from pusht_act.config.lerobot import DatasetConfig

__all__ = ["ACTION", "IMAGENET_STATS", "find_dataset", "sampler_state", "to_policy_features"]

log = logging.getLogger(__name__)


def find_dataset(dataset: DatasetConfig) -> Path:
    """Return the folder of the data set `dataset.repo_id`, downloaded from the Hub if it is not on this machine.

    Looks where LeRobot does: in $HF_LEROBOT_HOME, in its snapshot cache, then on the Hub.

    Raises:
        FileNotFoundError: It is in none of these places.
    """
    from huggingface_hub import snapshot_download
    from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.utils.constants import HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE

    # Local copies first, so that a job on a node without network starts at once.
    local = HF_LEROBOT_HOME / dataset.repo_id
    if (local / "meta" / "info.json").exists():
        return Path(local)
    # LeRobot tags data sets by their format version.
    revision = dataset.revision or CODEBASE_VERSION
    try:
        return Path(
            snapshot_download(
                dataset.repo_id,
                repo_type="dataset",
                revision=revision,
                cache_dir=HF_LEROBOT_HUB_CACHE,
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        log.info("downloading %s from the Hub", dataset.repo_id)
    try:
        return Path(LeRobotDataset(dataset.repo_id, revision=dataset.revision, video_backend="pyav").root)
    except Exception as error:
        # The Hub client, httpx and LeRobot raise classes of their own.
        raise FileNotFoundError(
            f"dataset.repo_id={dataset.repo_id} is not on this machine and cannot be downloaded "
            f"({type(error).__name__}): give dataset.root=PATH of a local copy, or dataset=demos for the built-in "
            "demonstrations"
        ) from error


def to_policy_features(features: dict[str, Any]) -> dict[str, Any]:
    """Convert the features of a data set's info.json to those of a policy."""
    from lerobot.utils.feature_utils import dataset_to_policy_features

    converted: dict[str, Any] = dataset_to_policy_features(features)
    return converted


def sampler_state(step: int, n_samples: int, batch_size: int, num_processes: int) -> dict[str, int]:
    """Return the position of LeRobot's sampler after `step` steps of stock training."""
    from lerobot.datasets.sampler import compute_sampler_state

    state: dict[str, int] = compute_sampler_state(step, n_samples, batch_size, num_processes)
    return state
