"""The jobs of a sweep as a table: when it ends, and in mode=status; and as a file for other programs."""

import csv
import io
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from pusht_act.config.optuna import Direction, Metric
from pusht_act.runtime.markdown import format_table

if TYPE_CHECKING:
    from pusht_act.sweeps.state import Job

TEXT_COLUMNS = ("state", "95 %", "host", "overrides")
SPREAD: dict[str, Callable[[list[float]], float]] = {"mean": mean, "min": min, "max": max}
"""What is said of the scores of several seeds."""
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
        if any(each.n_episodes for each in jobs):
            known |= {"n": f"{job.n_episodes or ''}", "95 %": _interval(job)}
        rows.append({**known, **columns, "overrides": _distinct_overrides(job, common)})
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = format_table(header, ([row[key] for key in header] for row in rows), text=TEXT_COLUMNS)
    # What all jobs are refused for is one mistake.
    errors: dict[str, list[str]] = {}
    for job in jobs:
        if job.error:
            errors.setdefault(job.error, []).append(f"job {job.number}")
    return [
        *lines,
        *(f"{', '.join(some)} failed: {error}" for error, some in errors.items()),
    ]


def format_seeds(jobs: Sequence["Job"]) -> list[str]:
    """Return a line for each group of jobs that differ in their seeds alone: mean and range of their scores."""
    common = _common(jobs)
    lines = []
    for others, group in _by_seed(jobs).items():
        scores = [job.objective for job in group if job.objective is not None]
        if len(scores) > 1:
            low, average, high = (_format(value, group[0].metric) for value in (min(scores), mean(scores), max(scores)))
            varied = " ".join(override for override in others if override not in common)
            lines.append(
                f"mean over {len(scores)} seeds: {average} (from {low} to {high}){', ' if varied else ''}{varied}"
            )
    return lines


def format_csv(jobs: Sequence["Job"]) -> str:
    """Return the table as comma-separated values: a row for each job, numbers unrounded, a column for each option."""
    common = _common(jobs)
    groups = {job.number: group for group in _by_seed(jobs).values() for job in group}
    rows: list[dict[str, Any]] = []
    for job in jobs:
        scores = [each.objective for each in groups.get(job.number, []) if each.objective is not None]
        row = {"job": job.number, "state": job.state, "tries": job.tries, "step": job.step, job.metric: job.objective}
        row |= {"n_episodes": job.n_episodes, "low": job.low, "high": job.high, "n_seeds": len(scores)}
        row |= {f"{name}_over_seeds": of(scores) if scores else None for name, of in SPREAD.items()}
        varied = (override.partition("=") for override in job.overrides if override not in common)
        row |= {key.lstrip("+"): value for key, _, value in varied}
        rows.append(row | {"seconds": round(job.seconds, 1), "output_dir": job.output_dir, "error": job.error})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _by_seed(jobs: Sequence["Job"]) -> dict[tuple[str, ...], list["Job"]]:
    """Return the jobs that are done, by their overrides without the seed."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        if job.state == "done" and any(override.startswith("seed=") for override in job.overrides):
            groups.setdefault(tuple(o for o in job.overrides if not o.startswith("seed=")), []).append(job)
    return groups


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
    return "" if job.objective is None else _format(job.objective, job.metric)


def _format(value: float, metric: str) -> str:
    return f"{value:.1f} %" if metric == Metric.pc_success.value else f"{value:.4g}"


def _interval(job: "Job") -> str:
    return "" if job.low is None or job.high is None else f"{job.low:.1f} to {job.high:.1f}"


def _common(jobs: Sequence["Job"]) -> set[str]:
    """Return the overrides that all jobs share; none if there is only one job."""
    # Those of a job that Optuna has not chosen values for are not known yet.
    known = [set(job.overrides) for job in jobs if job.overrides]
    return set.intersection(*known) if len(known) > 1 else set()


def _distinct_overrides(job: "Job", common: set[str]) -> str:
    return " ".join(override for override in job.overrides if override not in common)
