"""Which overrides of a sweep.json are taken: those of a sweep of ours, and none that could run anything.

The file may come from anybody. Hydra would call what `hydra.callbacks` or a `_target_` name, import what a logging
configuration names, and run the commands in `hydra.launcher.setup`. Imports neither torch nor lerobot.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from pusht_act.config.overrides import flatten, parse_overrides
from pusht_act.config.schema import CONFIG_DIR
from pusht_act.runtime.errors import UserError
from pusht_act.sweeps.state import IDENTITY

HYDRA_KEYS = (
    *("hydra.verbose", "hydra.job.chdir", "hydra.job.name", "hydra.sweeper.max_batch_size"),
    *("hydra.sweeper.n_trials", "hydra.sweeper.n_jobs", "hydra.sweeper.metric", "hydra.sweeper.direction"),
)
SECTIONS = ("hydra.launcher.", "hydra.sweeper.sampler.", "hydra.sweeper.pruner.")
GROUPS = ("hydra/launcher", "hydra/sweeper")
"""What of Hydra's configuration a sweep may record: where and how its jobs run, and how Optuna chooses."""
COMMANDS = ("setup", "additional_parameters", "submitit_folder", "backend", "temp_folder")
"""Options of launchers that run commands, or write anywhere."""
CALLS = re.compile(r"_target_|_partial_|_recursive_|\$\{[^}]*:")
"""What calls something: a key of Hydra's, or an interpolation that is no reference to another value."""


def check_recorded(overrides: Sequence[str], typed: Sequence[str], folder: str) -> None:
    """Refuse overrides of a sweep's file that could run something.

    Args:
        overrides: Those of the file.
        typed: Those of the command line, which are the user's own.
        folder: The sweep's.

    Raises:
        UserError: naming the file and the override.
    """
    for override in overrides:
        if override not in typed and not _is_harmless(override):
            raise UserError(
                f"{Path(folder) / IDENTITY} has {override!r:.200}, which is taken from no file, as it can run commands "
                "or read other files: if it is yours, type it again, else start another sweep"
            )


def _is_harmless(override: str) -> bool:
    # A flag, such as --config-dir, names more files to read.
    if override.startswith("-") or CALLS.search(override):
        return False
    try:
        return all(map(_is_harmless_value, parse_overrides([override])))
    except HydraException:
        return False


def _is_harmless_value(read: Override) -> bool:
    key, value = read.key_or_group, read.value()
    # A package would put what is chosen elsewhere in the configuration, such as into Hydra's own.
    if read.package is not None:
        return False
    is_hydras = re.match(r"(hydra|defaults)\b", key) is not None
    if key in GROUPS or (not is_hydras and (Path(CONFIG_DIR) / key).is_dir()):
        # The choices of a group are names of files in conf/.
        return re.search(r"[./\\]", str(read.input_line).partition("=")[2]) is None
    if not is_hydras:
        return True
    if key == "hydra.sweeper.params":
        return isinstance(value, dict) and all(_is_harmless(f"{name}={each}") for name, each in value.items())
    if key.startswith("hydra.sweeper.params."):
        return _is_harmless(str(read.input_line).partition("hydra.sweeper.params.")[2])
    return all(_is_harmless_key(each) for each, _ in flatten(key, value))


def _is_harmless_key(key: str) -> bool:
    if key.startswith("hydra.launcher."):
        return key.split(".")[2] not in COMMANDS
    return key in HYDRA_KEYS or key.startswith(SECTIONS)
