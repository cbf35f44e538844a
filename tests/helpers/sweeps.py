"""Reading what a sweep came to."""

import re
from pathlib import Path


def ran(run: Path) -> int:
    """How often a run was begun."""
    return len((run / "runs.jsonl").read_text().splitlines())


def states(printed: str) -> list[list[str]]:
    """Number, state and tries of each job in the table."""
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if re.match(r"\| +\d", line)]
    return [row[1:4] for row in rows]
