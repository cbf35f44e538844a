"""Check the two processors of a model folder: LeRobot's own steps for ACT, with statistics of all that they normalize.

LeRobot builds a processor from a JSON file that may name any class to import and any file to read. It leaves as it is
what has no statistics, and then the policy acts on numbers that it has never seen. Imports neither torch nor lerobot.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pusht_act.checkpoints.state import Natural
from pusht_act.checkpoints.tensor_file import read_header
from pusht_act.runtime.errors import UserError, join_some
from pusht_act.runtime.stored import read_json

STEPS = (
    *("rename_observations_processor", "to_batch_processor", "device_processor", "normalizer_processor"),
    "unnormalizer_processor",
)
"""The steps that make_act_pre_post_processors uses, by their names in LeRobot's registry."""
STATE_FILE = re.compile(r"\w[\w.-]*\.safetensors")
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "IDENTITY": (),
}
"""What each of LeRobot's normalization modes computes with."""
OTHER = "give another checkpoint"


@dataclass(frozen=True)
class Feature:
    """What the policy observes or does."""

    type: str
    shape: list[Natural]


@dataclass(frozen=True)
class StepConfig:
    """The options of the steps; each step has some of them."""

    eps: float = 0.0
    features: dict[str, Feature] = field(default_factory=dict)
    norm_map: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    float_dtype: str | None = None
    rename_map: dict[str, str] = field(default_factory=dict)
    normalize_observation_keys: list[str] | None = None


@dataclass(frozen=True)
class Step:
    """A step of a processor."""

    registry_name: str
    config: StepConfig = field(default_factory=StepConfig)
    state_file: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """A processor."""

    name: str
    steps: list[Step]


@dataclass(frozen=True)
class Features:
    """The features of a policy, in its config.json."""

    input_features: dict[str, Feature] | None = None
    output_features: dict[str, Feature] | None = None


def check_processors(model: Path) -> None:
    """Refuse processors with other steps, with files elsewhere, or without the statistics that they need.

    Raises:
        UserError: naming the file.
    """
    features = read_json(model / "config.json", Features)
    actions = features.output_features or {}
    for name, normalizer, needed in (
        ("policy_preprocessor.json", "normalizer_processor", {**(features.input_features or {}), **actions}),
        ("policy_postprocessor.json", "unnormalizer_processor", actions),
    ):
        path = model / name
        try:
            _check_steps(path)
            steps = read_json(path, Pipeline).steps
        except FileNotFoundError as error:
            raise UserError(_describe_missing(path)) from error
        normalizing = [step for step in steps if step.registry_name == normalizer]
        if not normalizing:
            raise UserError(f"{path} has no step {normalizer}: {OTHER}")
        for step in normalizing:
            _check_statistics(path, step, needed)


def _check_steps(path: Path) -> None:
    """Refuse a step that LeRobot's processors for ACT do not have, or a file elsewhere."""
    steps = read_json(path, dict[str, Any]).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UserError(f"{path} is damaged (no list of steps): {OTHER}")
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
                f"{OTHER}"
            )
        file = step.get("state_file", "x.safetensors")
        if not isinstance(file, str) or not STATE_FILE.fullmatch(file):
            raise UserError(f"{path}: state_file={file!r:.60} is no .safetensors file of this folder: {OTHER}")


def _check_statistics(path: Path, step: Step, needed: dict[str, Feature]) -> None:
    """Refuse a normalizer that would leave a feature as it is, though its mode says otherwise."""
    config = step.config
    modes = {key: config.norm_map.get(feature.type, "IDENTITY") for key, feature in needed.items()}
    if unknown := sorted(set(config.norm_map.values()) - {*STATISTICS}):
        raise UserError(f"{path}: norm_map has {unknown[0]!r:.60}, give {', '.join(STATISTICS)}: {OTHER}")
    wanted = {key: STATISTICS[mode] for key, mode in modes.items() if STATISTICS[mode]}
    if not wanted:
        return
    file = path.parent / step.state_file if step.state_file is not None else None
    if file is None or not file.is_file():
        raise UserError(f"{file or path} is missing, which has the statistics of {join_some([*wanted])}: {OTHER}")
    has = read_header(file)
    for key, statistics in wanted.items():
        for name in statistics:
            tensor = has.get(f"{key}.{name}")
            known = join_some(sorted({entry.rpartition(".")[0] for entry in has}))
            if tensor is None:
                raise UserError(f"{file} has no {name} of {key}, which is normalized ({known} has one): {OTHER}")
            # An image has statistics for each channel.
            shape = needed[key].shape[:1] if needed[key].type == "VISUAL" else needed[key].shape
            if math.prod(tensor["shape"]) not in (1, math.prod(shape)):
                raise UserError(f"{file}: {key}.{name} has shape {tensor['shape']}, the policy's is {shape}: {OTHER}")
        if key not in config.features and path.name == "policy_preprocessor.json":
            raise UserError(f"{path}: the features have no {key}, so it would not be normalized: {OTHER}")


def _describe_missing(path: Path) -> str:
    """Return what to do about a model folder without processors."""
    model, weights = path.parent, path.parent / "model.safetensors"
    old = ("normalize_inputs.", "unnormalize_outputs.", "normalize_targets.")
    if weights.is_file() and any(name.startswith(old) for name in read_header(weights)):
        return (
            f"{model} has no {path.name}: an older LeRobot wrote it, with the statistics among the weights; convert it "
            f"by `python -m lerobot.processor.migrate_policy_normalization --pretrained-path {model}` and give "
            f"{model}_migrated"
        )
    return f"{path}: the processors are missing: {OTHER}"
