"""The configuration of mode=resume and mode=eval: the checkpoint's, with the command line's values in place of its own.

Reads plain files, of checkpoints of this project and of stock LeRobot. Imports neither torch nor lerobot.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.config.aliases import rename_config
from pusht_act.config.lerobot_fields import lerobot_fields
from pusht_act.config.overrides import flatten, is_fixed, parse_overrides
from pusht_act.config.schema import AUTOMATIC, METADATA_FILE, OUR_SECTIONS
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.stored import read_json

CLI_ONLY_KEYS = {
    *("mode", "steps", "output_dir", "overwrite", "print_lerobot_command", "checkpoint", "dir", "resume", "sweep"),
    *("cluster", "status"),
}
"""Root keys that mode=resume takes from the command; all others are the checkpoint's."""
EVAL_KEYS = {"policy", "env", "job_name", "wandb"}
"""Root keys that mode=eval takes from the checkpoint; all others are the command's."""
FIXED_GROUPS = ("policy", "env", "dataset", "experiment")
"""Groups that cannot be chosen again: a whole group would replace values that the checkpoint was trained with."""
STOCK_ROOT = {
    **{key: key for key in ("seed", "batch_size", "log_freq", "save_checkpoint", "save_freq", "job_name")},
    "eval_steps": "eval_steps",
    # Renamed in LeRobot 0.6.
    "eval_freq": "eval_freq",
    "env_eval_freq": "eval_freq",
    "rename_map": "rename_map",
}
"""Root keys of stock LeRobot's train_config.json, and ours."""
STOCK_FILE = "train_config.json"
STOCK_DATASET = ("repo_id", "root", "episodes", "revision", "use_imagenet_stats", "eval_split")
STOCK_ENV = ("type", "task", "fps", "obs_type", "episode_length", "visualization_width", "visualization_height")
STOCK_WANDB = ("project", "entity", "notes", "mode", "add_tags", "disable_artifact")


def merge_checkpoint_config(
    cfg: DictConfig, checkpoint: Checkpoint, overrides: list[str], choices: dict[str, str | None], resume: bool
) -> DictConfig:
    """Merge the configuration of a checkpoint with that of the command.

    Args:
        cfg: The configuration that the command composed.
        checkpoint: The checkpoint.
        overrides: The command line's. They win over the checkpoint's values.
        choices: The group choices of `cfg`.
        resume: For mode=resume, in which the checkpoint decides nearly everything; for mode=eval it decides policy and
            environment only.

    Raises:
        UserError: a group is chosen that the checkpoint has fixed, or its configuration cannot be read.
    """
    saved, saved_choices = _saved(checkpoint, resume)
    # Version 0.1 had mode=dagger. The empty section that it wrote for an ordinary run has no meaning any more.
    if resume and (labels := (saved.get("dagger") or {}).get("labels")):
        raise UserError(
            f"{checkpoint.directory} was trained with dagger.labels={labels} ({METADATA_FILE}), and mode=dagger "
            "was removed: it can be evaluated; train on with the version that wrote it, or start a new run"
        )
    saved = {key: value for key, value in saved.items() if key != "dagger"}
    # Untyped, since the typed nodes of `cfg` refuse to be replaced by a dict.
    merged = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(merged, DictConfig)
    for key, value in saved.items():
        if (key not in CLI_ONLY_KEYS) if resume else (key in EVAL_KEYS):
            # A field that our sections did not have when the checkpoint was written keeps its default.
            merged[key] = OmegaConf.merge(merged[key], value) if key in OUR_SECTIONS else value
    # Hardware depends on where the command runs, not on where the checkpoint was written.
    merged.policy.device = cfg.policy.device
    # A permission for this command, not for all that come after it.
    merged.dataset.allow_change = cfg.dataset.allow_change
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if key == "logging":
            merged.wandb.enable = cfg.wandb.enable
        if key in FIXED_GROUPS:
            if key in saved or key in saved_choices or key == "experiment":
                _check_choice(key, choices.get(key), saved_choices, checkpoint)
        elif key not in choices:
            if override.is_delete():
                raise UserError(f"~{key}: the checkpoint's configuration has this key; give {key}=VALUE")
            value = OmegaConf.select(cfg, key)
            if is_fixed(key) and (section := saved.get(key.partition(".")[0])):
                _check_fixed(key, value, section, checkpoint)
            else:
                OmegaConf.update(merged, key, value, merge=False)
    return merged


@contextmanager
def blamed_on(checkpoint: Checkpoint, overrides: list[str]) -> Iterator[None]:
    """Name the checkpoint's file in an error about a value that comes from it.

    Args:
        checkpoint: The checkpoint.
        overrides: The command line's, whose values are the user's own.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        typed = {key for override in overrides for key in [override.partition("=")[0].lstrip("+~")]}
        found = re.match(r"[\w.]+", message)
        key = found[0].rstrip(".") if found is not None else ""
        is_typed = any(key == each or key.startswith(f"{each}.") for each in typed)
        if is_typed or str(checkpoint.model_dir) in message or str(checkpoint.directory) in message:
            raise
        ours = checkpoint.record is not None
        file = "config.json" if key.startswith("policy") else METADATA_FILE if ours else STOCK_FILE
        raise UserError(f"{checkpoint.model_dir / file}: {message}") from error


def _check_fixed(key: str, value: Any, saved: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse another value of an option that follows from the weights; `saved` is the section of the checkpoint's."""
    # What leaves the choice open asks for nothing else than what was chosen.
    if key in AUTOMATIC and value == AUTOMATIC[key]:
        return
    section, name = key.split(".")[:2]
    fields = lerobot_fields()[section]
    known = OmegaConf.create({section: {name: fields[name].get("default")} | saved})
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    for leaf, asked in list(flatten(key, plain)) or [(key, plain)]:
        has = OmegaConf.select(known, leaf)
        if asked != has:
            raise UserError(
                f"{leaf}={asked}: {checkpoint.directory} was trained with {leaf}={has}, which it keeps: leave it out, "
                "or train a new policy with mode=full"
            )


def inherit_choices(choices: dict[str, str | None], checkpoint: Checkpoint) -> dict[str, str | None]:
    """Return the group choices of a run that resumes `checkpoint`: those that are fixed are the checkpoint's."""
    _, saved = _saved(checkpoint, resume=True)
    return choices | {group: choice for group, choice in saved.items() if group in FIXED_GROUPS}


def _check_choice(group: str, choice: str | None, saved: dict[str, str | None], checkpoint: Checkpoint) -> None:
    """Refuse a group choice other than the one that the checkpoint was trained with."""
    if group not in saved or saved[group] != choice:
        made = f" ({group}={saved[group]})" if group in saved else ""
        raise UserError(
            f"{group}={choice}: the checkpoint {checkpoint.directory} brings its own{made}; "
            f"give single values instead, such as {group}.NAME=VALUE"
        )


def _saved(checkpoint: Checkpoint, resume: bool) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Return the configuration of a checkpoint and its group choices, empty for one that stock LeRobot wrote."""
    config: dict[str, Any] = {}
    choices: dict[str, str | None] = {}
    rates: dict[str, Any] = {}
    if (record := checkpoint.record) is not None:
        config, choices = rename_config(record.config), record.choices
    elif (stock := _read_json(checkpoint.model_dir / STOCK_FILE)) is not None:
        if resume:
            _check_resumable(stock, checkpoint)
        config, rates = _from_stock(stock), _stock_rates(stock)
    # The policy is described by LeRobot's own file in any case: it is what loads the weights.
    policy = _read_json(checkpoint.model_dir / "config.json")
    assert policy is not None, "find_checkpoint has seen config.json"
    if policy.get("type") != "act":
        raise UserError(
            f"{checkpoint.model_dir} holds a policy of type {policy.get('type')}: this project trains and evaluates act"
        )
    if policy.get("use_peft"):
        file = checkpoint.model_dir / "config.json"
        raise UserError(f"{file} describes an adapter (use_peft), which is not trained here")
    del_keys = ("pretrained_path", "pretrained_revision", "use_peft")
    return {**config, "policy": {k: v for k, v in policy.items() if k not in del_keys} | rates}, choices


def _check_resumable(train: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that stock LeRobot trained in a way that resuming it here would change silently."""
    dataset, optimizer = train.get("dataset") or {}, train.get("optimizer") or {}
    if dataset.get("streaming") or (dataset.get("image_transforms") or {}).get("enable"):
        raise UserError(
            f"{checkpoint.model_dir / STOCK_FILE}: its data set was streamed or augmented (dataset.streaming, "
            "dataset.image_transforms), which this project does not do"
        )
    if optimizer.get("type", "adamw") != "adamw":
        raise UserError(
            f"{checkpoint.model_dir / STOCK_FILE}: it was trained with {optimizer['type']}, which this project does "
            "not use"
        )


def _from_stock(train: dict[str, Any]) -> dict[str, Any]:
    """Translate stock LeRobot's train_config.json to our keys, leaving out what an older LeRobot did not have."""
    dataset, optimizer = train.get("dataset") or {}, train.get("optimizer") or {}
    config = {ours: train[stock] for stock, ours in STOCK_ROOT.items() if train.get(stock) is not None}
    # Without a seed stock LeRobot orders its data as with seed 0.
    config["seed"] = config.get("seed", 0)
    config["save_freq"] = max(0, config.get("save_freq", 0))
    config["dataset"] = {key: dataset[key] for key in STOCK_DATASET if key in dataset}
    config["optimizer"] = {key: optimizer[key] for key in ("betas", "eps", "grad_clip_norm") if key in optimizer}
    config["scheduler"] = train.get("scheduler") or {}
    if env := train.get("env"):
        config["env"] = {key: env[key] for key in STOCK_ENV if key in env}
    if wandb := train.get("wandb"):
        config["wandb"] = {"enable": wandb["enable"]} | {key: wandb[key] for key in STOCK_WANDB if key in wandb}
    return config


def _stock_rates(train: dict[str, Any]) -> dict[str, Any]:
    """Return the learning rate and weight decay of stock's optimizer section, as keys of the policy.

    Stock trains with that section. The policy's values are only its defaults.
    """
    optimizer = train.get("optimizer") or {}
    return {f"optimizer_{key}": optimizer[key] for key in ("lr", "weight_decay") if key in optimizer}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path, dict[str, Any])
    except FileNotFoundError:
        return None
