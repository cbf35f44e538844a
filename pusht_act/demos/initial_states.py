"""Where demonstrations start: the environment's resets from a seed up, or the states of a file.

agent_x,agent_y,block_x,block_y,block_angle (px, rad)  -> states, each one checked before any is planned
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pusht_act.config.schema import DemosConfig
from pusht_act.demos.expert import check_plannable
from pusht_act.envs.pusht import Start
from pusht_act.runtime.errors import UserError

COLUMNS = ("agent_x", "agent_y", "block_x", "block_y", "block_angle")
HEADER = ",".join(COLUMNS)


def initial_states(demos: DemosConfig) -> Sequence[Start]:
    """What `demos` has planned, in order: reset seeds without an end, or all states of the file `demos.initial_states`.

    Raises:
        UserError: the file cannot be read, a line of it is no start, or it has fewer than `demos.n_episodes`.
    """
    if demos.initial_states is None:
        return range(demos.start_seed, np.iinfo(np.int64).max)
    starts = read_initial_states(demos.initial_states)
    if len(starts) < demos.n_episodes:
        raise UserError(
            f"demos.initial_states={demos.initial_states} has too few starts, {len(starts)}, for "
            f"demos.n_episodes={demos.n_episodes}: give demos.n_episodes={len(starts)} or less, or a longer list"
        )
    return starts


def read_initial_states(path: str) -> list[Start]:
    """The states in a CSV file whose first line is `HEADER`, one a line in px and rad; empty lines are skipped.

    Raises:
        UserError: no such file, another header, no start at all, or a line that is no start or repeats one.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"demos.initial_states={path} cannot be read ({reason}): give a CSV file that begins {HEADER}"
        ) from error
    header = ",".join(cell.strip() for cell in rows[0][1]) if rows else ""
    if header != HEADER:
        raise UserError(f"demos.initial_states={path} line 1: {header[:80]!r} is not the header: give {HEADER}")
    if len(rows) == 1:
        raise UserError(f"demos.initial_states={path} has no starts: give one a line below the header")
    lines: dict[Start, int] = {}
    for line, row in rows[1:]:
        try:
            start = _start(row)
        except ValueError as error:
            raise UserError(f"demos.initial_states={path} line {line}: {error}") from error
        if start in lines:  # it would be the same episode again
            raise UserError(
                f"demos.initial_states={path} line {line}: {describe_start(start)} is that of line {lines[start]}: "
                "remove it"
            )
        lines[start] = line
    return list(lines)


def _start(row: list[str]) -> Start:
    if len(row) != len(COLUMNS):
        raise UserError(f"{','.join(row)[:80]!r} has {len(row)} values: give {HEADER}")
    numbers = []
    for name, text in zip(COLUMNS, row, strict=True):
        try:
            numbers.append(float(text))
        except ValueError as error:
            unit = "rad" if name == "block_angle" else "px"
            raise UserError(f"{name}={text[:80]} is not a number: give one in {unit}") from error
    return check_plannable(numbers)


def describe_start(start: Start) -> str:
    """For people: `seed 7`, or `start (100, 400, 256, 300, 0.5)`."""
    return f"seed {start}" if isinstance(start, int) else f"start ({', '.join(f'{value:g}' for value in start)})"
