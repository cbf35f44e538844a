"""Initial states of demonstrations: the environment's resets from a seed on, or the states in a CSV file.

The columns are agent_x, agent_y, block_x, block_y (px) and block_angle (rad). All states are checked before the first
is planned.
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
    """Return the initial states to plan from, in order: endless reset seeds, or the states of a file.

    Raises:
        UserError: The file cannot be read, a line is not a state, or there are fewer than `demos.n_episodes`.
    """
    if demos.initial_states is None:
        # Without an end, since a start that is not solved is replaced by the next.
        return range(demos.start_seed, np.iinfo(np.int64).max)
    starts = read_initial_states(demos.initial_states)
    if len(starts) < demos.n_episodes:
        raise UserError(
            f"demos.initial_states={demos.initial_states} has too few starts, {len(starts)}, for "
            f"demos.n_episodes={demos.n_episodes}: give demos.n_episodes={len(starts)} or less, or a longer list"
        )
    return starts


def read_initial_states(path: str) -> list[Start]:
    """Read the states in a CSV file whose first line is `HEADER`; empty lines are skipped.

    Raises:
        UserError: No such file, another header, no state at all, or a line that is not a state or repeats one.
    """
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            # With line numbers as an editor shows them: empty lines count, though they are skipped.
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
        # The expert is deterministic: the same state would give the same episode again.
        if start in lines:
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
    """Describe a start in messages: `seed 7`, or `start (100, 400, 256, 300, 0.5)`."""
    return f"seed {start}" if isinstance(start, int) else f"start ({', '.join(f'{value:g}' for value in start)})"
