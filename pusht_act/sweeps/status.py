"""mode=status dir=DIR: how the jobs of a sweep, or one run, are getting on.

Read from their files alone, so it is the same from every machine; nothing is written and no lock taken:

    <sweep>/sweep.json  jobs/N.json       overrides, state, tries, host (sweep.py)
    <run>/lock  runs.jsonl                the same of a run that is no sweep's
          config.yaml                     how many steps
          metrics.jsonl  checkpoints/     the step, its rate, the scores

Imports neither torch nor lerobot.
"""

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import read_owner
from pusht_act.sweeps.state import IDENTITY, Job, load_jobs
from pusht_act.sweeps.table import format_jobs

OF_A_RUN = ("config.yaml", "lock", "metrics.jsonl", "checkpoints")
"""A folder with one of these is a run's."""
RATE, SUCCESS = "train/samples_per_s", "eval/pc_success"
UNDER_WAY = ("running", "waiting")
"""States that a job leaves by itself."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come; None: its files do not say."""

    step: int | None = None
    steps: int | None = None
    rate: float | None = None
    """Steps a second, evaluations and saves left out, as its last line of metrics has it."""
    success: float | None = None
    """Of the newest evaluation, in percent."""
    best: float | None = None


def show(directory: Path, every: float) -> None:
    """Print the table of `directory`; on a terminal again every so many seconds, until all jobs have ended.

    Raises:
        FileNotFoundError: it holds neither a sweep nor a run.
        UserError: it cannot be read.
    """
    back = ""
    while True:
        found = jobs_of(directory)
        ended = not any(each.state in UNDER_WAY for each in found)
        if ended or every == 0 or not sys.stdout.isatty():
            print(back + "\n".join(render(found)), flush=True)
            return
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in render(found, size.lines - 3)[: size.lines - 1]]
        print(back + "\n".join(lines), flush=True)
        back = f"\x1b[{len(lines)}F\x1b[J"  # to the beginning of the first of them, and all from there erased
        time.sleep(every)


def jobs_of(directory: Path) -> list[Job]:
    """The jobs of the sweep in `directory`, or the one of the run there.

    Raises:
        FileNotFoundError: it holds neither.
        UserError: it cannot be read.
    """
    if (directory / IDENTITY).exists():
        try:
            found = load_jobs(directory)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{directory / IDENTITY} is damaged ({error}): give the folder of one of its runs"
            ) from error
        for each in found:
            if not each.output_dir or not Path(each.output_dir).is_dir():  # not begun, or the sweep was moved
                each.output_dir = str(directory / str(each.number))
        return found
    if not any((directory / name).exists() for name in OF_A_RUN):
        raise FileNotFoundError(
            f"dir={directory} holds neither a sweep (no {IDENTITY}) nor a run (no config.yaml): give a folder such as "
            "multirun/DATE/TIME or outputs/act_pusht/train"
        )
    return [_job_of(RunDir(directory))]


def _job_of(run: RunDir) -> Job:
    """The run as the only job of a sweep; that it failed and not just stopped, no file tells."""
    starts = [start for line in _text(run.path / "runs.jsonl").splitlines() if (start := _values(line))]
    last = starts[-1] if starts else {}
    holder, alive = read_owner(run.path)
    come = progress(run.path)
    has_all_steps = come.step is not None and come.steps is not None and come.step >= come.steps
    state = "running" if alive else "interrupted"
    if has_all_steps and holder is None and Checkpoint(run.checkpoints / "last" / "pretrained_model").pending is None:
        state = "done"
    host = holder.host if holder is not None else last.get("host", "")
    overrides = shlex.split(last.get("command", ""))[1:]
    return Job(0, overrides, state, len(starts), output_dir=str(run.path), holder={"host": host})


def render(found: list[Job], most: int | None = None) -> list[str]:
    """A line that counts the jobs by state, then the table; of more than `most` jobs, those under way and the last."""
    states = [f"{number} {state}" for state, number in Counter(each.state for each in found).items()]
    counts = f"{len(found)} job{'' if len(found) == 1 else 's'}: {', '.join(states) or 'none was begun'}"
    if most is None or len(found) <= most:
        return [counts, *_table(found)]
    interest = sorted(found, key=lambda each: (each.state != "running", each.state == "waiting", -each.number))
    shown = sorted(interest[: max(most, 1)], key=lambda each: each.number)
    hidden = f"; {len(found) - len(shown)} of them are not shown (status.every=0 shows all)"
    return [counts + hidden, *_table(shown)[: len(shown) + 1]]


def _table(found: list[Job]) -> list[str]:
    return [] if not found else format_jobs(found, [_columns(each, progress(Path(each.output_dir))) for each in found])


def _columns(job: Job, come: Progress) -> dict[str, str]:
    """What the table shows of a job beside what the sweep knows of it."""
    step = job.step if job.step is not None else come.step
    success = job.objective if job.objective is not None else come.success
    rate = come.rate if job.state == "running" else None
    left = ""
    if rate and come.steps is not None and come.step is not None:
        left = str(timedelta(seconds=round(max(come.steps - come.step, 0) / rate)))
    return {
        "step": " / ".join(f"{each:,}" for each in (step, come.steps) if each is not None),
        "steps/s": f"{rate:.1f}" if rate else "",
        "left": left,
        "success": _percent(success),
        "best": _percent(come.best),
        "host": str(job.holder.get("host", "")),
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def progress(path: Path) -> Progress:
    """How far the run in `path` has come."""
    config = _text(path / "config.yaml")
    steps, batch_size = _number(config, "steps"), _number(config, "batch_size")
    run = RunDir(path)
    measured = _measured_now(run.metrics)
    saved = Path(os.path.realpath(run.checkpoints / "last")).name  # resolve() raises at a link to itself
    known = [measured.step, int(saved) if saved.isdigit() else None, None if steps is None else 0]
    step = max((each for each in known if each is not None), default=None)
    rate = measured.rate / batch_size if measured.rate is not None and batch_size else None
    return replace(measured, step=step, steps=steps, rate=rate)


def _measured_now(metrics: Path) -> Progress:
    """What `metrics` tells; its rate is that of samples."""
    try:
        stat = metrics.stat()
        return _measured(metrics, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return Progress()


@cache
def _measured(path: Path, _size: int, _changed_ns: int) -> Progress:
    """The same, read once for each state of the file. Most lines are not parsed: a sweep may have a million."""
    lines = path.read_text(errors="replace").splitlines()
    trained = next((values for line in reversed(lines) if RATE in line and (values := _values(line))), {})
    evaluated = [values for line in lines if SUCCESS in line and (values := _values(line))]
    scores = [values[SUCCESS] for values in evaluated]
    steps = [values["step"] for values in (trained, *evaluated) if values]
    return Progress(
        max(steps, default=None), None, trained.get(RATE), scores[-1] if scores else None, max(scores, default=None)
    )


def _values(line: str) -> dict[str, Any]:
    """A line's JSON; empty when it is being written."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}


def _number(config: str, key: str) -> int | None:
    """`key` of a config.yaml, which takes seconds to parse where there are a thousand."""
    found = re.search(rf"^{key}: (\d+)$", config, flags=re.MULTILINE)
    return int(found[1]) if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
