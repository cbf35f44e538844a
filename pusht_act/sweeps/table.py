"""The jobs of a sweep as a table: when it ends, and in mode=status."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pusht_act.config.optuna import Direction, Metric
from pusht_act.runtime.markdown import format_table

if TYPE_CHECKING:
    from pusht_act.sweeps.state import Job

TEXT_COLUMNS = ("state", "host", "overrides")
HEADER_LINES = 2
"""The lines of the table before its first job."""


def format_jobs(jobs: Sequence["Job"], more: Sequence[dict[str, str]] = ()) -> list[str]:
    """Return the lines of the table, one for each job, then a line for each error.

    Args:
        jobs: What the sweep knows of its jobs.
        more: Further columns of each job, which replace those of the same name.
    """
    if not jobs:
        return []
    # Overrides that all jobs share tell nothing about the differences between them.
    common = _common(jobs)
    # The metric names its column, unless it is the usual one.
    metrics = {job.metric for job in jobs if job.tries} - {Metric.pc_success.value} or {"success"}
    score = metrics.pop()
    rows: list[dict[str, str]] = []
    for job, columns in zip(jobs, more or [{}] * len(jobs), strict=True):
        known = {
            "job": f"{job.number}",
            "state": job.state,
            "tries": f"{job.tries}",
            "step": "" if job.step is None else f"{job.step:,}",
            score: _value(job),
        }
        rows.append({**known, **columns, "overrides": _distinct_overrides(job, common)})
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = format_table(header, ([row[key] for key in header] for row in rows), text=TEXT_COLUMNS)
    return [*lines, *(f"job {job.number} failed: {job.error}" for job in jobs if job.error)]


def format_best(direction: str | None, jobs: Sequence["Job"]) -> list[str]:
    """Return a line with the best job; no line for a sweep without a `direction`, or with no job evaluated.

    Pruned jobs do not count: their score is that of an earlier step. The first of equal ones is the best.
    """
    done = [job for job in jobs if job.state == "done" and job.objective is not None]
    if direction is None or not done:
        return []
    sign = 1 if direction == Direction.maximize.value else -1
    best = max(done, key=lambda job: sign * (job.objective or 0.0))
    return [f"best: job {best.number}, {best.metric} {_value(best)}, {_distinct_overrides(best, _common(jobs))}"]


def _value(job: "Job") -> str:
    if job.objective is None:
        return ""
    return f"{job.objective:.1f} %" if job.metric == Metric.pc_success.value else f"{job.objective:.4g}"


def _common(jobs: Sequence["Job"]) -> set[str]:
    """Return the overrides that all jobs share; none if there is only one job."""
    # Those of a job that Optuna has not chosen values for are not known yet.
    known = [set(job.overrides) for job in jobs if job.overrides]
    return set.intersection(*known) if len(known) > 1 else set()


def _distinct_overrides(job: "Job", common: set[str]) -> str:
    return " ".join(override for override in job.overrides if override not in common)
