"""Checks of what only the command line shows: which options were typed, and what they look like there.

A misspelt key was refused by Hydra before: errors.py says how.
"""

import shlex
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pusht_act.config.errors import explain_unknown
from pusht_act.config.options import Option
from pusht_act.config.schema import (
    CONFIG_DIR,
    EMBEDDED_REPO_ID,
    NOT_STATUS,
    OUR_SECTIONS,
    ROLLOUTS,
    TRAIN_MODES,
    TRAINING,
    Mode,
)
from pusht_act.config.validation import OPTIONS, check_secrets, check_value
from pusht_act.runtime.errors import UserError

SWEEPS_ONLY = ("sweep", "cluster", "hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra/sweeper", "hydra/launcher")
"""Options, groups and sections that have a use with -m alone."""
GROUP_MODES = {"policy": ROLLOUTS, "dataset": ROLLOUTS, "logging": ROLLOUTS}
"""The modes that use a group's choice, or compare it with the checkpoint's; those of other groups are NOT_STATUS."""


def check_overrides(cfg: DictConfig, overrides: list[str]) -> None:
    """Check the options that were typed: each has a use in this job, and a value in its range.

    What came with a group or an experiment is not typed: a preset may hold values for other modes.

    Raises:
        UserError: naming the option, its value and the modes that use it.
    """
    check_secrets(cfg)
    hydra = HydraConfig.get()
    sweeps = hydra.mode is RunMode.MULTIRUN
    typed = _typed_values(cfg, overrides)
    for key, value in typed.items():
        if key in hydra.runtime.choices:
            _check_choice_used(key, value, cfg.mode)
        else:
            _check_known(key)
            # A sweep's jobs have its name on a cluster.
            if not (key == "job_name" and sweeps):
                _check_used(key, value, cfg.mode)
        if key == "demos.n_episodes":
            _check_builtin_demos(value, cfg)
        # OmegaConf takes any number for true.
        if type(value) is int and value not in (0, 1) and isinstance(OmegaConf.select(cfg, key), bool):
            raise UserError(f"{key}={value}: give true or false")
    if not sweeps:
        _check_one_job(OmegaConf.to_container(hydra.overrides.hydra, resolve=False), overrides)
    starts = OmegaConf.select(cfg, "demos.initial_states")
    if "demos.start_seed" in typed and starts is not None:
        raise UserError(
            f"demos.start_seed={typed['demos.start_seed']} and demos.initial_states={starts} both say where to start: "
            "leave one of them out"
        )


def check_typed_values(cfg: DictConfig, overrides: list[str]) -> None:
    """Check the range of what was typed, before the checkpoint is looked for that completes the configuration.

    Raises:
        UserError: naming the option, its value and what to give.
    """
    for key in _typed_values(cfg, overrides):
        value = OmegaConf.select(cfg, key)
        if value is not None:
            check_value(key, value)


def unused_overrides(overrides: list[str]) -> list[str]:
    """Return those of `overrides` that have no use in the mode which they name, and would be refused for it.

    What a sweep varies is not among them: without it there would be other jobs.
    """
    read = [override for override in parse_overrides(overrides) if not override.is_sweep_override()]
    modes = [override.value() for override in read if override.key_or_group == "mode"]
    if len(modes) != 1 or modes[0] not in [mode.value for mode in Mode]:
        return []
    mode, unused = Mode(modes[0]), []
    for override in read:
        # A group, such as dataset=demos, is never refused for the mode.
        if override.is_delete() or (Path(CONFIG_DIR) / override.key_or_group).is_dir():
            continue
        keys = [key for key, _ in flatten(override.key_or_group, override.value())]
        if keys and not any(mode in _modes(key, mode) for key in keys):
            unused.append(override.input_line)
    return unused


def is_output_dir_typed(overrides: list[str]) -> bool:
    """Return whether the command line names the run directory."""
    return any(override.lstrip("+").startswith("output_dir=") for override in overrides)


def is_fixed(key: str) -> bool:
    """Return whether the checkpoint of mode=resume or mode=eval decides `key`, or the option that it is a part of."""
    return OPTIONS.get(".".join(key.split(".")[:2]), Option()).fixed


def flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of `value`: demos={speed: 9} -> demos.speed, 9."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from flatten(f"{key}.{name}", inner)


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Return what Hydra reads in `overrides`."""
    read: list[Override] = OverridesParser.create().parse_overrides(overrides)
    return read


def override(key: str, text: str) -> str:
    """Return KEY=VALUE which Hydra reads as `text`: in quotes if it would take that for anything else."""
    plain = f"{key}={text}"
    try:
        value = OverridesParser.create().parse_override(plain).value()
    except HydraException:
        value = None
    if isinstance(value, str) and value == text:
        return plain
    quote = Quote.single if '"' in text else Quote.double
    return f"{key}={QuotedString(text=text, quote=quote).with_quotes()}"


def read_value(argument: str) -> str:
    """Return the value of the `argument` KEY=VALUE as Hydra reads it where a text is wanted.

    Raises:
        HydraException: it cannot be read.
    """
    value = parse_overrides([argument])[0].value()
    # A folder called 2026 is no number.
    return value if isinstance(value, str) else argument.partition("=")[2]


def describe_modes(modes: tuple[Enum, ...]) -> str:
    """Return `modes` in words, such as "training (mode=test, mode=full and mode=resume) and mode=eval"."""
    if set(modes) == set(NOT_STATUS):
        return "every mode but mode=status"
    if set(modes) > set(TRAINING):
        others = tuple(mode for mode in modes if mode not in TRAINING)
        return f"{describe_modes(TRAINING)} and {describe_modes(others)}"
    *some, last = (f"mode={mode.value}" for mode in modes)
    named = f"{', '.join(some)} and {last}" if some else last
    return f"training ({named})" if set(modes) == set(TRAINING) else named


def _typed_values(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    read = [override for override in parse_overrides(overrides) if not override.is_delete()]
    typed = dict(pair for override in read for pair in flatten(override.key_or_group, override.value()))
    return typed | ({"output_dir": cfg.output_dir} if is_output_dir_typed(overrides) else {})


def _modes(key: str, mode: Mode) -> tuple[Enum, ...]:
    """Return the modes that use an option; `mode` is the job's."""
    section = _section(key)
    return OPTIONS.get(key, section).modes or section.modes or (NOT_STATUS if mode is Mode.status else tuple(Mode))


def _section(key: str) -> Option:
    return OPTIONS.get(key.partition(".")[0], Option())


def _check_one_job(hydras: Any, overrides: list[str]) -> None:
    """Refuse what is for a sweep where there is none; `hydras` are those of the overrides that are Hydra's own."""
    # Hydra adds its mode to them.
    typed = [override for override in (*overrides, *hydras) if not override.startswith("hydra.mode=")]
    for override in typed:
        key, _, value = override.lstrip("+").partition("=")
        if value != "null" and (key in SWEEPS_ONLY or key.startswith(tuple(f"{name}." for name in SWEEPS_ONLY))):
            command = shlex.join(["pusht-act", "-m", *typed])
            raise UserError(f"{override} is for a sweep: give -m too, as in `{command}`, or leave it out")


def _check_known(key: str) -> None:
    """Refuse a key that + or ++ has added to our own options, for which Hydra accepts any."""
    section = key.partition(".")[0]
    if section not in OPTIONS or (section in OUR_SECTIONS and key not in OPTIONS):
        raise UserError(explain_unknown(key if section in OPTIONS else section, lambda: list(OPTIONS)))


def _check_choice_used(group: str, choice: Any, mode: Mode) -> None:
    """Refuse the choice of a group that `mode` does not use."""
    is_off = choice is None or (group == "logging" and choice in ("local", ["local"]))
    modes = tuple(Mode) if group == "mode" else GROUP_MODES.get(group, NOT_STATUS)
    if mode not in modes and not (is_off and mode is not Mode.status):
        raise UserError(f"{group}={choice} is for {describe_modes(modes)}, not for mode={mode.value}: leave it out")


def _check_used(key: str, value: Any, mode: Mode) -> None:
    """Refuse an option that `mode` does not use."""
    modes = _modes(key, mode)
    if mode in modes:
        return
    option = OPTIONS.get(key, _section(key))
    remedy = "leave it out" if len(modes) > 1 else f"give {describe_modes(modes)} too, or leave it out"
    instead = f" ({option.instead})" if option.instead else ""
    raise UserError(f"{key}={value} is for {describe_modes(modes)}, not for mode={mode.value}: {remedy}{instead}")


def _check_builtin_demos(value: int, cfg: DictConfig) -> None:
    """Refuse a number of built-in demonstrations where training reads another data set."""
    # Which data set a resumed run has is not known yet.
    if cfg.mode in TRAIN_MODES and OmegaConf.select(cfg, "dataset.repo_id") != EMBEDDED_REPO_ID:
        raise UserError(f"demos.n_episodes={value} is for mode=demos or dataset=demos: give that too, or leave it out")
