"""The jobs of a sweep as lines of text: at its end, and in mode=status."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pusht_act.config.schema import Direction, Metric

if TYPE_CHECKING:
    from pusht_act.sweeps.state import Job


WORDS = ("state", "host", "overrides")
"""Columns that hold no numbers."""


def format_jobs(found: list["Job"], seen: Sequence[dict[str, str]] = ()) -> list[str]:
    """Lines that show every job, by the overrides that are not those of all; `seen` has more of its columns."""
    common = _common(found)
    metrics = {each.metric for each in found if each.tries} - {Metric.pc_success.value} or {"success"}
    score = metrics.pop()
    rows = []
    for each, more in zip(found, seen or [{}] * len(found), strict=True):
        known = {
            "job": f"{each.number}",
            "state": each.state,
            "tries": f"{each.tries}",
            "step": "" if each.step is None else f"{each.step:,}",
            score: _value(each),
        }
        rows.append({**known, **more, "overrides": _distinct_overrides(each, common)})
    head = {key: key for row in rows for key in row}
    width = {key: max(len(row[key]) for row in (head, *rows)) for key in head}
    lines = []
    for row in (head, *rows):
        cells = (row[key].ljust(width[key]) if key in WORDS else row[key].rjust(width[key]) for key in head)
        lines.append(f"| {' | '.join(cells)}".rstrip())
    return [*lines, *(f"job {each.number} failed: {each.error}" for each in found if each.error)]


def format_best(direction: str | None, found: list["Job"]) -> list[str]:
    """Of a sweep that seeks one, a line with the best job of those that were not pruned; the first of several."""
    done = [each for each in found if each.state == "done" and each.objective is not None]
    if direction is None or not done:
        return []
    sign = 1 if direction == Direction.maximize.value else -1
    first = max(done, key=lambda each: sign * (each.objective or 0.0))
    return [f"best: job {first.number}, {first.metric} {_value(first)}, {_distinct_overrides(first, _common(found))}"]


def _value(found: "Job") -> str:
    if found.objective is None:
        return ""
    return f"{found.objective:.1f} %" if found.metric == Metric.pc_success.value else f"{found.objective:.4g}"


def _common(found: list["Job"]) -> set[str]:
    """The overrides of all jobs whose overrides are known, if there are several."""
    known = [set(each.overrides) for each in found if each.overrides]
    return set.intersection(*known) if len(known) > 1 else set()


def _distinct_overrides(found: "Job", common: set[str]) -> str:
    return " ".join(override for override in found.overrides if override not in common)
