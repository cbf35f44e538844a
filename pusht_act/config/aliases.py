"""Old names of options: they work wherever an option is named, on the command line and in what was stored."""

import copy
import logging
import re
from collections.abc import Iterable
from typing import Any

log = logging.getLogger(__name__)

RENAMED = {"demos.starts": "demos.initial_states", "demos.mirror": "train.mirror"}
"""Dotted keys of the configuration: old -> new."""
CONVERTED: dict[str, dict[Any, Any]] = {"demos.mirror": {True: 0.5, False: 0.0}}
"""Values that have another form under the new name, by the old name."""


def rename_overrides(overrides: Iterable[str], quiet: bool = False) -> list[str]:
    """Return `overrides`, or a command's arguments, with the present names of options.

    Args:
        overrides: KEY=VALUE with or without Hydra's prefixes +, ++ and ~; what is not an override stays as it is.
        quiet: For what was stored: whoever wrote it cannot change it now.
    """
    return [_rename_override(override, quiet) for override in overrides]


def _rename_override(override: str, quiet: bool) -> str:
    prefix, old, rest = re.fullmatch(r"([+~]*)([^=]*)(.*)", override, re.DOTALL).groups()  # type: ignore[union-attr]
    if old not in RENAMED:
        return override
    new = RENAMED[old]
    for was, value in CONVERTED.get(old, {}).items():
        # As YAML spells it, alone or among the values of a sweep.
        rest = re.sub(rf"(?<=[=,\s]){was}(?=[,\s]|$)", str(value), rest, flags=re.IGNORECASE)
    if not quiet:
        log.warning("%s is called %s now", old, f"{new}{rest}" if old in CONVERTED else new)
    # A key of the schema is always there, so `+KEY=` is refused; the old name was given so where it was unknown.
    return f"{'' if prefix == '+' else prefix}{new}{rest}"


def rename_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration, a tree of sections, with the present names of options."""
    renamed = copy.deepcopy(config)
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        values = _section(renamed, section)
        if values is not None and name in values:
            value = values.pop(name)
            if isinstance(value, bool):
                value = CONVERTED.get(old, {}).get(value, value)
            target_section, _, target = new.rpartition(".")
            target_values = _section(renamed, target_section, create=True)
            assert target_values is not None
            # Where both are there, as for a while, the old one counts if it asks for something.
            if value or target not in target_values:
                target_values[target] = value
    return renamed


def _section(config: dict[str, Any], key: str, create: bool = False) -> dict[str, Any] | None:
    """Return the section at the dotted `key`; None where there is none."""
    section = config
    for name in filter(None, key.split(".")):
        inner = section.setdefault(name, {}) if create else section.get(name)
        if not isinstance(inner, dict):
            return None
        section = inner
    return section
