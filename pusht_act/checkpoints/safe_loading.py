"""Check that a model folder from an untrusted source is safe to load: plain JSON and safetensors, no pickle.

LeRobot builds a policy's processors from a JSON file that may name any class to import and any file to read. Only the
steps that LeRobot makes for ACT, and files of the folder itself, pass this check. It comes before anything is loaded.
Imports neither torch nor lerobot.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pusht_act.checkpoints.manifest import safetensors_header
from pusht_act.config.schema import METADATA_FILE
from pusht_act.runtime.errors import UserError

STEPS = (
    *("rename_observations_processor", "to_batch_processor", "device_processor", "normalizer_processor"),
    "unnormalizer_processor",
)
"""The steps that make_act_pre_post_processors uses, by their names in LeRobot's registry."""
STATE_FILE = re.compile(r"\w[\w.-]*\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
"""What makes hydra.utils.instantiate call something."""
SIZES = ("dim_model", "dim_feedforward", "chunk_size", "latent_dim", "shape")
"""Keys of a policy's configuration that decide how large its weights are, beside its numbers of layers."""
SECTIONS = ("policy", "env", "dataset", "optimizer", "scheduler", "eval", "wandb", "demos", "dagger", "checkpoints")
MAX_JSON_BYTES = 16_000_000
"""The largest JSON file that is read; LeRobot's have some kilobytes."""


def check_safe_to_load(model: Path) -> None:
    """Refuse a model folder that asks for more than numbers to be loaded.

    Files that are merely missing are not an error here: loading them names them.

    Raises:
        UserError: a file asks for something else; the message names both.
    """
    # A pickle beside safetensors does no harm, since nobody reads it.
    weights = model / "model.safetensors"
    pickles = sorted(path.name for path in model.iterdir() if path.suffix in PICKLES)
    if pickles and not weights.exists():
        raise UserError(
            f"{model} has its weights in {pickles[0]}, a pickle, which can run any code and is never read: "
            "give a checkpoint with model.safetensors"
        )
    for name in ("config.json", "train_config.json", METADATA_FILE):
        if (model / name).exists():
            content = _read(model / name)
            _check_plain(model / name, content)
            _check_sections(model / name, content)
    # Of a known policy, the sizes can be checked against the weights, and the steps against LeRobot's own.
    policy = _read(model / "config.json")
    if policy.get("type") != "act":
        raise UserError(f"{model} holds a policy of type {policy.get('type')}: this project trains and evaluates act")
    if weights.is_file():
        _check_sizes(model / "config.json", policy, weights)
    for path in (model / "policy_preprocessor.json", model / "policy_postprocessor.json"):
        if path.exists():
            _check_steps(path)


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise UserError("no file of a plausible size")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): give another checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object): give another checkpoint")
    return content


def _check_sections(path: Path, content: dict[str, Any]) -> None:
    """Refuse a value where our code expects a section: it would fail later, with a message about something else."""
    sections = {key: content.get(key) or {} for key in SECTIONS}
    if path.name == METADATA_FILE:
        sections = {key: content.get(key) for key in ("config", "choices")}
        if isinstance(inner := content.get("config"), dict):
            sections |= {key: inner.get(key) or {} for key in SECTIONS}
    for key, value in sections.items():
        if not isinstance(value, dict):
            raise UserError(f"{path} is damaged ({key} is no section): give another checkpoint")


def _check_plain(path: Path, content: dict[str, Any]) -> None:
    """Refuse what OmegaConf or Hydra would evaluate, such as ${oc.env:HF_TOKEN}."""
    for key, value in _items(content):
        if key in HYDRA_KEYS:
            raise UserError(f"{path} has the key {key}, which names something to run: give another checkpoint")
        for text in (key, value):
            if isinstance(text, str) and "${" in text:
                raise UserError(f"{path}: {key}={text[:60]!r} asks to be evaluated: give another checkpoint")


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth. The elements of a list have the key of the list."""
    # Not recursive: a file of thousands of brackets must not exhaust the stack.
    stack = [("", content)]
    while stack:
        key, value = stack.pop()
        yield key, value
        if isinstance(value, dict):
            stack += value.items()
        elif isinstance(value, list):
            stack += [(key, each) for each in value]


def _check_sizes(path: Path, policy: dict[str, Any], weights: Path) -> None:
    """Refuse sizes in config.json that the weights cannot have: they decide how much memory is allocated."""
    # The largest end of a tensor is the number of bytes of all of them.
    try:
        stored = max((e["data_offsets"][1] for k, e in safetensors_header(weights).items() if k != "__metadata__"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Damaged: loading the file says so.
        return
    width = policy.get("dim_model", 1)
    for key, value in [("dim_model", width), *_items(policy)]:
        if not isinstance(value, int) or not (key in SIZES or key.endswith("_layers")):
            continue
        # A weight matrix has at least dim_model rows and `value` columns; a layer has at least dim_model of both.
        floats = value * width * (width if key.endswith("_layers") else 1) if isinstance(width, int) else 0
        if 4 * floats > stored:
            raise UserError(
                f"{path}: {key}={value} does not fit the {stored} bytes of model.safetensors: give another checkpoint"
            )


def _check_steps(path: Path) -> None:
    """Refuse a processor with a step that LeRobot's processors for ACT do not have, or with a file elsewhere."""
    steps = _read(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(f"{path} is damaged (no list of steps): give another checkpoint")
    for step in steps:
        name = step.get("registry_name")
        # LeRobot imports what "class" names, and that is all it takes to run any code.
        if "class" in step:
            raise UserError(
                f"{path} names a class to import ({str(step['class'])[:60]}), which is never done: "
                "give a checkpoint whose processors are LeRobot's own"
            )
        if name not in STEPS:
            raise UserError(
                f"{path}: a step {str(name)[:60]} is none of those that LeRobot makes for ACT ({', '.join(STEPS)}): "
                "give another checkpoint"
            )
        file = step.get("state_file", "x.safetensors")
        if not isinstance(file, str) or not STATE_FILE.fullmatch(file):
            raise UserError(
                f"{path}: state_file={file!r:.60} is no .safetensors file of this folder: give another checkpoint"
            )
