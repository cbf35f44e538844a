"""A command's arguments before Hydra reads them: what it would misread, and what it would refuse without a remedy.

Old names of options are replaced in aliases.py; what was composed from the arguments is checked in overrides.py.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from pusht_act.config.errors import explain_dashes
from pusht_act.config.schema import CONFIG_DIR
from pusht_act.config.validation import TEXT_OPTIONS
from pusht_act.runtime.errors import UserError

LISTS = ("experiment", "logging")
"""Groups that take several choices, such as experiment=[a,b]."""
FLAGS = (
    *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "info", "shell-completion"),
    *("config-path", "config-name", "config-dir", "experimental-rerun"),
)
"""Hydra's own, which begin with two dashes."""
HYDRA_INSTEAD = {"hydra.run.dir": "output_dir", "hydra.job.name": "job_name"}
"""Options of Hydra's that have no use here, and ours that do what they say."""
READ_AS_NUMBER = r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?|[+-]?inf|nan|true|false"
"""What Hydra takes for a number or a truth value, in any case; such a text would come out as another one."""
UNCHANGED = r"0|[1-9]\d*"
"""Numbers that are the same text again."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Check what Hydra would refuse without a remedy, or take without a use.

    Args:
        arguments: Those of a command: KEY=VALUE with or without Hydra's prefixes, and flags.

    Raises:
        UserError: naming the argument, and what to give in its place.
    """
    _check_dashes(arguments)
    for argument in arguments:
        _refuse_rerun(argument)
        key, _, value = argument.lstrip("+").partition("=")
        if (ours := HYDRA_INSTEAD.get(key)) is not None:
            raise UserError(f"{argument} has no use here: give {ours}={value}")
    _check_choices(arguments)


def _check_choices(arguments: Iterable[str]) -> None:
    """Check how the choices of groups are written, such as policy=act: Hydra refuses some forms with a traceback."""
    for argument in arguments:
        prefix, group, value = re.match(r"([+~]*)([\w/]*)=?(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        folder = Path(CONFIG_DIR) / group
        if not group or not folder.is_dir():
            continue
        choices = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        if "~" in prefix:
            raise UserError(f"{argument}: a group cannot be removed: give {group}= one of {choices}, or leave it out")
        is_list = value.startswith("[") and group in LISTS
        if value.startswith(("{", "[")) and not (is_list and not re.search(r"[\[,]\s*[\d\[{]", value)):
            raise UserError(f"{argument}: give {group}= one of {choices}")


def _refuse_rerun(argument: str) -> None:
    """Refuse Hydra's flag that unpickles a file, and with that runs whatever the file says; flags may be shortened."""
    flag = argument.partition("=")[0]
    if len(flag) > len("--") and "--experimental-rerun".startswith(flag):
        raise UserError(
            f"{flag} would run any code that its file has in it: give the overrides that are in the file's folder, "
            "in .hydra/overrides.yaml"
        )


def _check_dashes(arguments: Sequence[str]) -> None:
    """Refuse options with dashes, which is how LeRobot and most programs have them."""
    for argument, after in pairwise([*arguments, ""]):
        name, equals, value = argument.removeprefix("--").partition("=")
        # Hydra takes the beginning of a flag, too.
        if not argument.startswith("--") or any(flag.startswith(name) for flag in FLAGS):
            continue
        if not equals:
            is_flag = not after or after.startswith("-") or "=" in after
            value = "true" if is_flag else after
        raise UserError(explain_dashes(argument, name, value, CONFIG_DIR))


def quote_texts(arguments: Iterable[str]) -> list[str]:
    """Return `arguments` with quotes around texts that Hydra would read as numbers, such as job_name=2025_01_03."""
    return [_quote_text(argument) for argument in arguments]


def _quote_text(argument: str) -> str:
    key, equals, value = argument.partition("=")
    # Quotes, lists and functions are taken as they are.
    if key.lstrip("+") not in TEXT_OPTIONS or re.search(r"['\"\[({]", value):
        return argument
    values = (each if not _is_misread(each) else f"'{each.strip()}'" for each in value.split(","))
    return f"{key}{equals}{','.join(values)}"


def _is_misread(value: str) -> bool:
    text = value.strip()
    return bool(re.fullmatch(READ_AS_NUMBER, text, re.IGNORECASE)) and not re.fullmatch(UNCHANGED, text)
