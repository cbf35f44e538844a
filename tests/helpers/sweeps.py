"""The outcome of a sweep, from its files and its table."""

import re
from pathlib import Path


def ran(run: Path) -> int:
    """Return how often a run was started."""
    return len((run / "runs.jsonl").read_text().splitlines())


def states(printed: str) -> list[list[str]]:
    """Return the number, state and tries of each job in a printed table."""
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if re.match(r"\| +\d", line)]
    return [row[1:4] for row in rows]
