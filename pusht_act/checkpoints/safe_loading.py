"""Check that a model folder from an untrusted source is safe to load: plain JSON and safetensors, no pickle.

The check comes before anything is loaded. What it lets through has the types that LeRobot expects, weights that are
finite, and processors that do their work (processor_files.py). Imports neither torch nor lerobot.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.processor_files import check_processors
from pusht_act.checkpoints.tensor_file import find_damage, read_header
from pusht_act.config.lerobot_fields import lerobot_fields
from pusht_act.config.schema import METADATA_FILE, OUR_SECTIONS
from pusht_act.runtime.errors import UserError, join_some
from pusht_act.runtime.stored import check_is_file, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
"""What makes hydra.utils.instantiate call something."""
SIZES = ("dim_model", "dim_feedforward", "chunk_size", "latent_dim", "shape")
"""Keys of a policy's configuration that decide how large its weights are, beside its numbers of layers."""
LEROBOT_SECTIONS = ("policy", "env", "dataset", "optimizer", "scheduler")
STOCK_SECTIONS = (*LEROBOT_SECTIONS, "eval", "wandb")
"""Of stock LeRobot's train_config.json, which has null for a section that it does not use."""


def check_safe_to_load(model: Path) -> None:
    """Refuse a model folder that asks for more than numbers to be loaded.

    Files that are merely missing are not an error here: loading them names them.

    Raises:
        UserError: a file asks for something else; the message names both.
    """
    # A pickle beside safetensors does no harm, since nobody reads it.
    weights = model / "model.safetensors"
    for path in model.iterdir():
        check_is_file(path)
    pickles = sorted(path.name for path in model.iterdir() if path.suffix in PICKLES)
    if pickles and not weights.exists():
        raise UserError(
            f"{model} has its weights in {pickles[0]}, a pickle, which can run any code and is never read: "
            "give a checkpoint with model.safetensors"
        )
    for name in ("config.json", "train_config.json", METADATA_FILE):
        if os.path.lexists(model / name):
            content = read_json(model / name, dict[str, Any])
            _check_plain(model / name, content)
            _check_sections(model / name, content)
    # Of a known policy, the sizes can be checked against the weights, and the steps against LeRobot's own.
    policy = read_json(model / "config.json", dict[str, Any])
    if policy.get("type") != "act":
        raise UserError(
            f"{model / 'config.json'} holds a policy of type {policy.get('type')!s:.60}: this project trains and "
            "evaluates act"
        )
    _check_fields(model / "config.json", policy)
    Checkpoint(model).record  # noqa: B018  (its types)
    for path in sorted(model.glob("*.safetensors")):
        if (damage := find_damage(path)) is not None:
            raise UserError(f"{path} {damage}: give another checkpoint")
    if weights.is_file():
        _check_sizes(model / "config.json", policy, weights)
    check_processors(model)


def _check_fields(path: Path, policy: dict[str, Any]) -> None:
    """Refuse fields that the LeRobot which is installed does not have: a newer one may mean anything by them."""
    if new := sorted(policy.keys() - lerobot_fields()["policy"].keys() - {"type"}):
        from importlib.metadata import version

        raise UserError(
            f"{path} has {join_some(new)}, which LeRobot {version('lerobot')} does not know: it was written by a newer "
            "LeRobot (or by hand); use that version, or give another checkpoint"
        )


def _check_sections(path: Path, content: dict[str, Any]) -> None:
    """Refuse a value where our code expects a section: it would fail later, with a message about something else."""
    sections = {key: content.get(key) or {} for key in STOCK_SECTIONS}
    if path.name == METADATA_FILE:
        sections = {key: content.get(key) for key in ("config", "choices")}
        if isinstance(inner := content.get("config"), dict):
            sections |= {key: inner.get(key, {}) for key in (*LEROBOT_SECTIONS, *OUR_SECTIONS)}
            # Of version 0.1.
            sections["dagger"] = inner.get("dagger") or {}
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
    stored = max((entry["data_offsets"][1] for entry in read_header(weights).values()), default=0)
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
