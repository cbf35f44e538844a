"""mode=status dir=DIR: the progress of the jobs of a sweep, or of one run; of a folder of sweeps, one line each.

It is read from their files alone, so it is the same from every machine. Nothing is written and no lock is taken:

    <sweep>/sweep.json  jobs/N.json       overrides, state, tries, host (state.py)
    <run>/lock  runs.jsonl                the same for a run of its own
          config.yaml                     how many steps
          metrics.jsonl  checkpoints/     the step, its rate, the scores

Imports neither torch nor lerobot.
"""

import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from pusht_act.checkpoints.checkpoint import MODEL_DIR, Checkpoint
from pusht_act.config.optuna import Metric
from pusht_act.runs.commands import read_command
from pusht_act.runs.run_dir import RunDir, follow, parse_metrics
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import read_owner
from pusht_act.runtime.markdown import format_table
from pusht_act.runtime.stored import read_text
from pusht_act.sweeps.state import IDENTITY, Job, load_jobs, read_identity
from pusht_act.sweeps.table import HEADER_LINES, format_jobs

RUN_FILES = ("config.yaml", "lock", "metrics.jsonl", "checkpoints")
"""A folder with one of these is a run directory."""
RATE, SUCCESS = "train/samples_per_s", "eval/pc_success"
SWEEPS_TEXT = ("sweep", "states", "overrides")
UNFINISHED = ("running", "waiting")
"""States that change without anybody doing something."""


@dataclass(frozen=True)
class Progress:
    """The progress of a run; None where its files do not tell."""

    step: int | None = None
    steps: int | None = None
    rate: float | None = None
    """Steps a second without evaluations and saves, as the last line of its metrics says."""
    success: float | None = None
    """Of the latest evaluation, in percent."""
    best: float | None = None


def show_status(directory: Path, every: float) -> None:
    """Print the table of a sweep or a run. On a terminal, redraw it until all jobs have ended.

    Args:
        directory: The folder of a sweep, or a run directory.
        every: Seconds between two redraws; 0: print once.

    Raises:
        FileNotFoundError: the folder holds neither a sweep nor a run.
        UserError: the sweep cannot be read.
    """
    if sweeps := find_sweeps(directory):
        print("\n".join(sweeps), flush=True)
        return
    erase = ""
    while True:
        jobs = find_jobs(directory)
        ended = not any(job.state in UNFINISHED for job in jobs)
        if ended or every == 0 or not sys.stdout.isatty():
            print(erase + "\n".join(render(jobs)), flush=True)
            return
        # What does not fit on the screen would scroll away, and could not be erased: room for the line of counts, the
        # header and the cursor is left, and long lines are cut.
        size = shutil.get_terminal_size()
        shown = render(jobs, size.lines - 2 - HEADER_LINES)[: size.lines - 1]
        lines = [line[: size.columns - 1] for line in shown]
        print(erase + "\n".join(lines), flush=True)
        # To the beginning of the first of these lines, and erase everything from there.
        erase = f"\x1b[{len(lines)}F\x1b[J"
        time.sleep(every)


def find_sweeps(directory: Path) -> list[str]:
    """Return the lines of a table of the sweeps below `directory`, such as multirun; none if it is one, or a run."""
    if any((directory / name).exists() for name in (IDENTITY, *RUN_FILES)):
        return []
    rows = []
    # As Hydra names them, DATE/TIME, or one below the folder that was given.
    for path in sorted(path.parent for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/{IDENTITY}")):
        try:
            jobs, identity = load_jobs(path), read_identity(path)
        except UserError:
            rows.append([str(path), "", "damaged", "", ""])
            continue
        scores = [job.objective for job in jobs if job.state == "done" and job.objective is not None]
        percent = scores and {job.metric for job in jobs if job.tries} == {Metric.pc_success.value}
        rows.append([str(path), str(len(jobs)), _states(jobs), _percent(max(scores)) if percent else "",
                     " ".join(identity.overrides if identity is not None else [])])  # fmt: skip
    return format_table(("sweep", "jobs", "states", "best", "overrides"), rows, SWEEPS_TEXT) if rows else []


def find_jobs(directory: Path) -> list[Job]:
    """Return the jobs of the sweep in `directory`, or the run there as the only job.

    Raises:
        FileNotFoundError: it holds neither.
        UserError: it cannot be read.
    """
    if (directory / IDENTITY).exists():
        jobs = load_jobs(directory)
        # A job that was not started has no folder yet, and those of a sweep that was moved are not where they were.
        for job in jobs:
            if not job.output_dir or not Path(job.output_dir).is_dir():
                job.output_dir = str(directory / str(job.number))
        return jobs
    if not any((directory / name).exists() for name in RUN_FILES):
        raise FileNotFoundError(
            f"dir={directory} holds neither a sweep (no {IDENTITY}) nor a run (no config.yaml): give a folder such as "
            "multirun/DATE/TIME or outputs/act_pusht/train"
        )
    return [_run_as_job(RunDir(directory))]


def _run_as_job(run: RunDir) -> Job:
    """Return a run as a job. It is never `failed`: no file tells a failure from an interruption."""
    starts = run.starts()
    last = starts[-1] if starts else {}
    holder, alive = read_owner(run.path)
    progress = read_progress(run.path)
    is_complete = progress.step is not None and progress.steps is not None and progress.step >= progress.steps
    state = "running" if alive else "interrupted"
    # An evaluation may still be missing after the last step.
    if is_complete and holder is None and not _pending(run):
        state = "done"
    host = holder.host if holder is not None else last.get("host", "")
    overrides = read_command(last.get("command", ""))
    return Job(0, overrides, state, len(starts), output_dir=str(run.path), holder={"host": host})


def _pending(run: RunDir) -> list[int]:
    last = follow(run.checkpoints / "last")
    return Checkpoint(last / MODEL_DIR).pending if last is not None else []


def render(jobs: list[Job], most: int | None = None) -> list[str]:
    """Return the lines to print: the number of jobs in each state, then the table.

    Args:
        jobs: All jobs.
        most: Show at most so many, those that are running before those that ended last; None: all.
    """
    counts = f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}: {_states(jobs) or 'none was started'}"
    if most is None or len(jobs) <= most:
        return [counts, *_table(jobs)]
    interest = sorted(jobs, key=lambda job: (job.state != "running", job.state == "waiting", -job.number))
    shown = sorted(interest[: max(most, 1)], key=lambda job: job.number)
    hidden = f"; {len(jobs) - len(shown)} of them are not shown (status.every=0 shows all)"
    # Without the lines of errors after the table, for which there is no room.
    return [counts + hidden, *_table(shown)[: HEADER_LINES + len(shown)]]


def _states(jobs: list[Job]) -> str:
    return ", ".join(f"{number} {state}" for state, number in Counter(job.state for job in jobs).items())


def _table(jobs: list[Job]) -> list[str]:
    return format_jobs(jobs, [_columns(job, read_progress(Path(job.output_dir))) for job in jobs])


def _columns(job: Job, progress: Progress) -> dict[str, str]:
    """Return the columns of a job that its run directory tells."""
    # What the sweep recorded when the job ended wins over its metrics.
    step = job.step if job.step is not None else progress.step
    success = job.objective if job.objective is not None else progress.success
    rate = progress.rate if job.state == "running" else None
    left = ""
    if rate and progress.steps is not None and progress.step is not None:
        left = str(timedelta(seconds=round(max(progress.steps - progress.step, 0) / rate)))
    return {
        "step": " / ".join(f"{number:,}" for number in (step, progress.steps) if number is not None),
        "steps/s": f"{rate:.1f}" if rate else "",
        "left": left,
        "success": _percent(success),
        "best": _percent(progress.best),
        "host": str(job.holder.get("host", "")),
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def read_progress(path: Path) -> Progress:
    """Return the progress of the run in `path`."""
    config = _text(path / "config.yaml")
    steps, batch_size = _number(config, "steps"), _number(config, "batch_size")
    run = RunDir(path)
    logged = _read_metrics(run.metrics)
    last = follow(run.checkpoints / "last")
    saved = last.name if last is not None else ""
    # The last line of metrics may be older than the last checkpoint, or the other way round.
    known = [logged.step, int(saved) if saved.isdigit() else None, None if steps is None else 0]
    step = max((number for number in known if number is not None), default=None)
    rate = logged.rate / batch_size if logged.rate is not None and batch_size else None
    return replace(logged, step=step, steps=steps, rate=rate)


def _read_metrics(path: Path) -> Progress:
    """Return what metrics.jsonl tells; `rate` is in samples a second."""
    try:
        stat = path.stat()
        return _parse_metrics(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return Progress()


@cache
def _parse_metrics(path: Path, _size: int, _changed_ns: int) -> Progress:
    """Return the same, reading the file once for each of its states."""
    # All jobs of a sweep may have a million lines together: only those that look right are parsed.
    lines = read_text(path, errors="replace").splitlines()
    trained: dict[str, Any] = next((values for line in reversed(lines) if (values := _metrics(line, RATE))), {})
    evaluated = [values for line in lines if (values := _metrics(line, SUCCESS))]
    scores = [values[SUCCESS] for values in evaluated]
    steps = [values["step"] for values in (trained, *evaluated) if values]
    return Progress(
        max(steps, default=None), None, trained.get(RATE), scores[-1] if scores else None, max(scores, default=None)
    )


def _metrics(line: str, key: str) -> dict[str, Any] | None:
    """Return the metrics in a line that has `key`."""
    values = parse_metrics(line) if key in line else None
    return values if values is not None and key in values else None


def _number(config: str, key: str) -> int | None:
    """Return the integer `key` of a config.yaml, or None. Parsing a thousand of them would take seconds."""
    found = re.search(rf"^{key}: (\d+)$", config, flags=re.MULTILINE)
    return int(found[1]) if found else None


def _text(path: Path) -> str:
    try:
        return read_text(path, errors="replace")
    except OSError:
        return ""
