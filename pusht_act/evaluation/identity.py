"""What decides an evaluation's numbers: the same identity, the same record.

Imports neither torch nor lerobot, so that mode=eval prints a stored result at once.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pusht_act.checkpoints.manifest import sha256
from pusht_act.config.schema import EvalConfig

PACKAGES = ("gym-pusht", "pymunk", "torch", "lerobot")
NEUTRAL_POLICY_KEYS = (
    *("optimizer_", "pretrained_", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license"),
    *("kl_weight", "dropout", "device"),
)
"""Beginnings of the policy's keys that do not act at inference. The device is part of the identity on its own."""
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Without one of these (NVIDIA, AMD, Windows' Linux) there is no GPU."""


def identify(
    model: dict[str, str], policy: dict[str, Any], device: str, env: dict[str, Any], config: EvalConfig
) -> dict[str, Any]:
    """Return all that an evaluation's numbers follow from.

    Args:
        model: The digests of the weights and the processors.
        policy: LeRobot's configuration of the policy.
        device: Where it runs, resolved.
        env: The configuration of the environment.
        config: The `eval` section, of which videos and workers do not count.
    """
    return {
        "model": model,
        "policy": {key: value for key, value in policy.items() if not key.startswith(NEUTRAL_POLICY_KEYS)},
        "device": device,
        "env": env,
        "start_seed": config.start_seed,
        "n_episodes": config.n_episodes,
        "batch_size": min(config.batch_size, config.n_episodes),
        "versions": {package: version(package) for package in PACKAGES},
    }


def digest(values: dict[str, Any]) -> str:
    """Return the hash of an identity, in hex."""
    return hashlib.sha256(json.dumps(_plain(values), sort_keys=True).encode()).hexdigest()


def _plain(content: Any) -> Any:
    """Return `content` with all numbers as floats: LeRobot reads False as 0 where a field is an int."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(each) for each in content]
    return float(content) if isinstance(content, int | float) else content


def model_digests(model_dir: Path) -> dict[str, str]:
    """Return the digests of the model in a folder, as `identify` takes them."""
    return {"weights": sha256(model_dir / "model.safetensors"), "processors": processors_digest(model_dir)}


def processors_digest(folder: Path) -> str:
    """Return the hash of the processors in a folder: their steps, but for the device, and their statistics."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("policy_*processor*")):
        if path.suffix == ".json":
            steps = json.loads(path.read_text())
            found.update(json.dumps(_without_device(steps), sort_keys=True).encode())
        else:
            found.update(f"{path.name} {sha256(path)}".encode())
    return found.hexdigest()


def _without_device(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_device(value) for key, value in content.items() if key != "device"}
    return [_without_device(each) for each in content] if isinstance(content, list) else content


def has_gpu() -> bool:
    """Return whether there may be a GPU, without asking torch."""
    return any(Path(path).exists() for path in GPU_FILES)
