"""Checks of what only the command line shows: which options were given, and what they look like there."""

from collections.abc import Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pusht_act.config.schema import EMBEDDED_REPO_ID, TRAIN_MODES, Mode
from pusht_act.runtime.errors import UserError


def check_overrides(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuse what only the command line shows: an option that this job would ignore, a number taken for true."""
    hydra = HydraConfig.get()
    sweeps = hydra.mode is RunMode.MULTIRUN
    if not sweeps and hydra.runtime.choices["hydra/sweeper"] == "optuna":
        raise UserError("hydra/sweeper=optuna chooses the values of a sweep's jobs: give -m too, or leave it out")
    read = [override for override in parse_overrides(overrides) if not override.is_delete()]
    given = dict(pair for override in read for pair in flatten(override.key_or_group, override.value()))
    if any(override.startswith("output_dir=") for override in overrides):
        given["output_dir"] = cfg.output_dir
    for key, value in given.items():
        section, _, name = key.partition(".")
        _check_status(key, value, cfg.mode)
        if section == "demos":
            _check_demos_option(name, value, cfg)
        if section == "sweep" and not sweeps:
            raise UserError(f"{key}={value} is for a sweep: give -m too, or leave it out")
        if section == "resume" and name == "auto" and cfg.mode not in (Mode.test, Mode.full):
            raise UserError(f"{key}={value} is for mode=test and mode=full, mode=resume goes on anyway: leave it out")
        trains = cfg.mode is Mode.resume or cfg.mode in TRAIN_MODES
        if section in ("train", "checkpoints") and not trains:
            raise UserError(f"{key}={value} is for training, which mode={cfg.mode.value} does not do: leave it out")
        if type(value) is int and value not in (0, 1) and isinstance(OmegaConf.select(cfg, key), bool):
            raise UserError(f"{key}={value}: give true or false")
    starts = OmegaConf.select(cfg, "demos.starts")
    if "demos.start_seed" in given and starts is not None:
        raise UserError(
            f"demos.start_seed={given['demos.start_seed']} and demos.starts={starts} both say where to start: "
            "leave one of them out"
        )


def _check_status(key: str, value: Any, mode: Mode) -> None:
    """mode=status has options of its own, and no others."""
    its_own = key == "dir" or key.startswith("status.")
    if its_own and mode is not Mode.status:
        raise UserError(f"{key}={value} is for mode=status: give that too, or leave it out")
    if mode is Mode.status and not its_own and key != "mode":
        raise UserError(f"{key}={value} does nothing in mode=status, which takes dir= and status.every=: leave it out")


def _check_demos_option(name: str, value: Any, cfg: DictConfig) -> None:
    """Refuse the option `name` of demos where nothing would read it."""
    if name == "mirror" and cfg.mode is Mode.demos:
        raise UserError(f"demos.mirror={value} is for training on dataset=demos, not for mode=demos: leave it out")
    users = ["mode=demos"] if name != "mirror" else []
    if name in ("n_episodes", "mirror"):
        users.append("dataset=demos")
        if cfg.mode is Mode.resume or OmegaConf.select(cfg, "dataset.repo_id") == EMBEDDED_REPO_ID:
            return  # a resumed run's data set is not known yet
    if f"mode={cfg.mode.value}" not in users:
        raise UserError(f"demos.{name}={value} is for {' or '.join(users)}: give that too, or leave it out")


def flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """demos={speed: 9} -> demos.speed, 9."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from flatten(f"{key}.{name}", inner)


def parse_overrides(overrides: list[str]) -> list[Override]:
    """What Hydra reads in `overrides`, without output_dir, which a sweep does not quote."""
    named = [override for override in overrides if not override.startswith("output_dir=")]
    read: list[Override] = OverridesParser.create().parse_overrides(named)
    return read
