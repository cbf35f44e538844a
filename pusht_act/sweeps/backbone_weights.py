"""Decide once for all jobs of a sweep whether the backbone starts from ImageNet's weights.

Jobs run at different times on different machines. If each asked for itself, a network that comes and goes would give
some jobs ImageNet's weights and others random ones, and the sweep would compare the two.
"""

import json
import os
from pathlib import Path

from omegaconf import DictConfig

from pusht_act.config.schema import AUTO, TRAIN_MODES
from pusht_act.runtime.stored import read_json


def decide_for_sweep(cfg: DictConfig, directory: Path) -> None:
    """Replace `policy.pretrained_backbone_weights=auto` in the configuration of a job that has a backbone.

    Args:
        cfg: the job's; changed in place.
        directory: the sweep's; the first job that needs it writes the decision there.
    """
    policy = cfg.policy
    has_backbone = cfg.env.get("obs_type", "pixels_agent_pos") == "pixels_agent_pos"
    trains = cfg.mode in TRAIN_MODES and not cfg.print_lerobot_command
    if not trains or not has_backbone or policy.get("pretrained_backbone_weights") != AUTO:
        return
    backbone = policy.get("vision_backbone", "resnet18")
    path = directory / f"{backbone}_weights.json"
    if not path.exists():
        from pusht_act.policy.backbone_weights import available_weights

        _write_first(path, json.dumps(available_weights(backbone)))
    decided = read_json(path, list[str | None], "delete it", lambda content: [content])
    policy.pretrained_backbone_weights = decided[0]


def _write_first(path: Path, text: str) -> None:
    """Write `path` unless another job has done so meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    # Unlike a rename, a link fails where there is a file.
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:
        # A file system without hard links: jobs that decide at the same moment may decide differently.
        part.replace(path)
    part.unlink(missing_ok=True)
