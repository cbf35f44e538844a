"""From a composed configuration to a checked `Config`: what can be refused without importing torch is refused here.

A misspelt key was refused by Hydra before: errors.py says how.
"""

import math
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pusht_act.config.lerobot_fields import lerobot_fields
from pusht_act.config.options import Option, find_options
from pusht_act.config.schema import (
    EMBEDDED_REPO_ID,
    LEROBOT_OPTIONS,
    MAX_DEMOS,
    PROFILED_STEPS,
    TRAIN_MODES,
    TRAINING,
    Config,
    EmaConfig,
    Mode,
    to_dict,
)
from pusht_act.config.secrets_check import refuse_tokens
from pusht_act.runtime.errors import UserError

OPTIONS = dict(find_options(Config)) | LEROBOT_OPTIONS
"""The rules of each option, by its dotted key; a section's own are there too."""
LARGEST = 2**31 - 1
"""The largest whole number of an option: torch and NumPy take no larger seeds and sizes everywhere."""
FIELD_TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "one text"),
    "pathlib.Path": (str, "one text"),
    "list": (list, "a list"),
    "tuple": ((list, tuple), "a list"),
    "dict": (dict, "a section, {KEY: VALUE}"),
    "None": (type(None), "null"),
}
"""What the types of LeRobot's fields (lerobot_fields.json) take, and what to give."""
TEXT_OPTIONS = {
    *(key for key, option in OPTIONS.items() if option.kind is str),
    *(
        f"{section}.{name}"
        for section, described in lerobot_fields().items()
        for name, field in described.items()
        if field["type"] in ("str", "str | None", "pathlib.Path | None")
    ),
    "hydra.sweep.dir",
}
"""Options whose value is a text."""


def to_config(cfg: DictConfig) -> Config:
    """Return a composed configuration as a validated `Config`; below this nothing sees a `DictConfig`.

    Raises:
        UserError: an unknown key, a wrong type or an impossible value, named with its remedy; or a token.
    """
    if unknown := [str(key) for key in cfg if str(key) not in {f.name for f in fields(Config)}]:
        raise UserError(f"{unknown[0]} is unknown: --cfg job shows the keys there are")
    check_secrets(cfg)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), cfg))
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: give {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(str(error.msg or error).splitlines()[0]) from error
    assert isinstance(config, Config)
    _check(config)
    return config


def check_secrets(cfg: DictConfig) -> None:
    """Refuse a configuration that holds a token.

    Raises:
        UserError: naming the key, without the value; or a value refers to one that is not there.
    """
    try:
        # An untyped copy, so that an objection to a value's type cannot show a token before it is refused here.
        untyped = OmegaConf.create(OmegaConf.to_container(cfg))
        refuse_tokens("", OmegaConf.to_container(untyped, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(str(error.msg or error).splitlines()[0]) from error


def check_value(key: str, value: Any) -> None:
    """Check `value` against the range or the choices of the option `key`.

    Raises:
        UserError: naming the key, the value and what to give.
    """
    option = OPTIONS.get(key, Option())
    objection = _objection(value, option)
    if objection:
        wanted = f"{key}={option.describe()}" if option.choices else option.describe()
        if option.nonempty:
            wanted = f"{key}=NAME, or leave it out"
        if isinstance(value, int) and value > LARGEST:
            wanted = f"at most {LARGEST}"
        because = f" ({option.reason})" if option.reason else ""
        raise UserError(f"{key}={value} {objection}: give {wanted}{because}")


def _objection(value: Any, option: Option) -> str | None:
    """Return what is wrong with `value`."""
    if option.choices:
        return None if value in option.choices else "is unknown"
    if option.nonempty:
        return None if value else "is empty"
    return _objection_to_number(value, option) if option.bounded else None


def _objection_to_number(value: Any, option: Option) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "is not a number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "is too large"
    if option.kind is int and not isinstance(value, int):
        return "is not a whole number"
    if not math.isfinite(value):
        return "is not a finite number"
    if option.contains(value):
        return None
    low = option.gt if option.ge is None else option.ge
    return "is too small" if low is not None and value <= low else "is too large"


def check_processes(mode: Mode, profile: bool, processes: int) -> None:
    """What one process does is refused to several.

    Raises:
        UserError: naming what it is.
    """
    if processes == 1:
        return
    if mode not in TRAINING:
        raise UserError(f"mode={mode.value} is for one process, and these are {processes}: give it without torchrun")
    if profile:
        raise UserError(f"train.profile=true is for one process, and these are {processes}: leave it out")


def check_share(batch_size: int, processes: int) -> None:
    """Each of several processes takes the same number of a batch's samples.

    Raises:
        UserError: that is no whole number.
    """
    # Unequal shares would make each step as slow as its largest one.
    if batch_size % processes:
        more = -(-batch_size // processes) * processes
        raise UserError(
            f"batch_size={batch_size} is that of a whole step and cannot be shared by {processes} processes: give a "
            f"multiple of {processes}, such as batch_size={more}"
        )


def _check(config: Config) -> None:
    """Refuse what can be refused without importing torch."""
    _check_values(config)
    check_target(config.mode, config.checkpoint, config.dir)
    _check_training(config)
    _check_precision(config)
    _check_dataset(config)
    # A chunk has no more actions than it predicts.
    chunk, replan = config.policy.get("chunk_size"), config.policy.get("n_action_steps")
    if chunk is not None and replan is not None and replan > chunk:
        raise UserError(
            f"policy.n_action_steps={replan} exceeds policy.chunk_size={chunk}: "
            f"give policy.n_action_steps={chunk} or less"
        )
    if config.policy.get("push_to_hub") and not config.save_checkpoint:
        raise UserError("save_checkpoint=false leaves nothing for policy.push_to_hub=true to upload: give one of them")
    _check_ema(config.ema)
    if config.checkpoints.keep_every and not config.checkpoints.keep_last:
        raise UserError(
            f"checkpoints.keep_every={config.checkpoints.keep_every}: all are kept with checkpoints.keep_last=0; "
            "give checkpoints.keep_last=3, say, or leave it out"
        )


def _check_ema(ema: EmaConfig) -> None:
    """Refuse a decay that contradicts the schedule's."""
    if ema.min_decay > ema.max_decay:
        raise UserError(f"ema.min_decay={ema.min_decay} exceeds ema.max_decay={ema.max_decay}: give a smaller one")
    defaults = {"min_decay": 0.0, "max_decay": 0.9999}
    if ema.decay is not None and (given := [key for key in defaults if getattr(ema, key) != defaults[key]]):
        raise UserError(
            f"ema.decay={ema.decay} is constant, and ema.{given[0]}={getattr(ema, given[0])} bounds a schedule: "
            "leave one of them out"
        )


def _check_values(config: Config) -> None:
    """Check each option on its own."""
    # One loop over all rules: bounds and choices are declared beside the fields, in schema.py.
    plain = to_dict(config)
    for key in OPTIONS:
        section, _, name = key.rpartition(".")
        values = plain[section] if section else plain
        # The schema says which of our own options may be null; LeRobot's bounded fields may not.
        if name in values and (values[name] is not None or key in LEROBOT_OPTIONS):
            check_value(key, values[name])
    if config.policy.get("type") is None:
        check_value("policy.type", None)
    for section, known in lerobot_fields().items():
        for name, value in plain[section].items():
            if name in known:
                _check_type(f"{section}.{name}", value, known[name])


def _check_type(key: str, value: Any, field: dict[str, Any]) -> None:
    """Refuse a value that has another type than LeRobot declares for its `field`, or is no number that can be used."""
    kinds = [kind.partition("[")[0] for kind in field["type"].split(" | ")]
    # LeRobot has an int whose default is False.
    if isinstance(field.get("default"), bool):
        kinds.append("bool")
    types = [FIELD_TYPES[kind][0] for kind in kinds if kind in FIELD_TYPES]
    # Python takes True for a number.
    fits = [each for each in types if isinstance(value, each) and (not isinstance(value, bool) or each is bool)]
    if not fits and len(types) == len(kinds):
        given = "null" if value is None else value
        raise UserError(f"{key}={given}: give {' or '.join(FIELD_TYPES[kind][1] for kind in kinds)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} is not a finite number: give one")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{key}={value} is too large: give at most {LARGEST}")


def check_target(mode: Mode, checkpoint: str | None, directory: str | None) -> None:
    """Check that mode=eval and mode=status are told what to look at.

    Raises:
        UserError: naming the option to give.
    """
    if mode is Mode.eval and not checkpoint:
        raise UserError("mode=eval needs a checkpoint: give checkpoint=PATH_OR_HUB_ID")
    if mode is Mode.status and not directory:
        raise UserError("mode=status needs a folder: give dir=DIR, that of a sweep or a run directory")


def _check_training(config: Config) -> None:
    """Refuse what contradicts the way in which a run starts."""
    # A checkpoint's features are its own; a new run's are those of the data set.
    if config.mode in TRAIN_MODES and (given := {"input_features", "output_features"} & {*config.policy}):
        key = min(given)
        raise UserError(f"policy.{key}={config.policy[key]}: features are taken from the data set, leave it out")
    if config.mode in TRAIN_MODES and config.train.profile and config.steps < PROFILED_STEPS:
        raise UserError(f"steps={config.steps} are too few for train.profile=true: give {PROFILED_STEPS} or more")


def _check_precision(config: Config) -> None:
    if config.train.precision == "fp32" and config.policy.get("use_amp"):
        raise UserError("train.precision=fp32 contradicts policy.use_amp=true, which is bf16: leave one of them out")
    if config.train.fast_dropout and config.train.compile:
        raise UserError("train.fast_dropout=true: what is compiled has a dropout of its own, give train.compile=false")


def _check_dataset(config: Config) -> None:
    dataset = config.dataset
    if not isinstance(dataset.get("repo_id"), str):
        raise UserError(f"dataset.repo_id={dataset.get('repo_id')} is no name: give one such as lerobot/pusht")
    # They are a file of the package: there is no folder to read and no revision.
    if dataset["repo_id"] == EMBEDDED_REPO_ID:
        given = {f"dataset.{key}": dataset.get(key) for key in ("root", "revision", "observations")}
        for key, value in {**given, "rename_map": config.rename_map}.items():
            if value:
                raise UserError(
                    f"{key}={value} means nothing for the built-in demonstrations: "
                    "leave it out, or give dataset=pusht or pusht_keypoints with it"
                )
    episodes = dataset.get("episodes")
    if episodes is not None and not _are_numbers(episodes):
        raise UserError(
            f"dataset.episodes={episodes} is no list of different numbers: give one such as [0,1,2], or leave it out"
        )
    observations = dataset.get("observations")
    if observations is not None and not (isinstance(observations, list) and {*map(type, observations)} == {str}):
        raise UserError(
            f"dataset.observations={observations} is no list of names: give one such as "
            "[observation.image,observation.state], or leave it out"
        )
    renamed = config.rename_map or {}
    if not isinstance(renamed, dict) or not {*map(type, (*renamed, *renamed.values()))} <= {str}:
        raise UserError(
            f"rename_map={config.rename_map} has no names in pairs: give some such as "
            "{observation.images.top: observation.image}, or leave it out"
        )
    # Without held-out episodes the validation loss would be that of nothing.
    if config.eval_steps and not dataset.get("eval_split"):
        raise UserError(f"eval_steps={config.eval_steps} needs held-out episodes: give dataset.eval_split=0.1, say")
    if config.mode is not Mode.demos and config.demos.n_episodes > MAX_DEMOS:
        raise UserError(f"demos.n_episodes={config.demos.n_episodes} is too large: give 1 to {MAX_DEMOS}")


def _are_numbers(episodes: Any) -> bool:
    return (
        isinstance(episodes, list)
        and all(isinstance(episode, int) and episode >= 0 for episode in episodes)
        and 0 < len(set(episodes)) == len(episodes)
    )
