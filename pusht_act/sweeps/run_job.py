"""Run one job of a sweep, unless it is done already, and record what becomes of it in jobs/N.json."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from pusht_act.config.optuna import Metric
from pusht_act.config.overrides import is_output_dir_typed, unused_overrides
from pusht_act.config.schema import Mode
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import LockOwner
from pusht_act.sweeps.backbone_weights import decide_for_sweep
from pusht_act.sweeps.state import (
    FINISHED,
    Job,
    describe_difference,
    load_job,
    read_identity,
    result_overrides,
    varied_overrides,
    write_job,
)

if TYPE_CHECKING:
    from pusht_act.job import Result

log = logging.getLogger(__name__)


def run_sweep_job(
    cfg: DictConfig, node: Any, execute: Callable[[DictConfig, Any], "Result"], explain: Callable[[Exception], str]
) -> float | None:
    """Run a job of a sweep, or read its result if it has one. A failure is recorded and stops no other job.

    Args:
        cfg: The job's configuration; resume.auto is set if the job was started before.
        node: Its Hydra configuration.
        execute: Runs the job.
        explain: Turns an error of the job into a line.

    Returns:
        The value of the sweep's metric; None if the job failed, was not evaluated or is not to be run now.

    Raises:
        UserError: the job's overrides are not those that the sweep was started with.
    """
    # With hydra.job.chdir=true the job is in a folder of its own.
    directory, number = Path(node.runtime.cwd) / node.sweep.dir, int(node.job.num)
    overrides = list(node.overrides.task)
    _check_same_job(directory, number, overrides)
    found = load_job(directory, number, overrides)
    if _is_left_alone(found, cfg.sweep.max_tries):
        return found.objective if found.state in FINISHED else None

    # One that was interrupted resumes from its own last checkpoint.
    if found.tries and cfg.mode in (Mode.test, Mode.full):
        cfg.resume.auto = True
    # Hydra gives each job a folder, unless the sweep names one itself.
    given = is_output_dir_typed(found.overrides)
    output_dir = str(Path(cfg.output_dir).absolute() if given else node.runtime.output_dir)
    started = Job(
        number, found.overrides, "running", found.tries + 1, found.failures,
        metric=_metric(node), output_dir=output_dir, holder=asdict(LockOwner()),
    )  # fmt: skip
    begin = time.monotonic()
    write_job(directory, started)

    # A signal is no Exception: then the job is recorded as interrupted.
    ended = replace(started, state="interrupted")
    try:
        decide_for_sweep(cfg, directory)
        name_in_wandb(cfg, directory, found.overrides)
        result = execute(cfg, node)
        state = "pruned" if result.pruned else "done"
        ended = replace(started, state=state, step=result.step, objective=result.metrics.get(started.metric))
        if (episodes := result.metrics.get("n_episodes")) is not None:
            low, high = (result.metrics.get(f"pc_success_{end}") for end in ("low", "high"))
            ended = replace(ended, n_episodes=int(episodes), low=low, high=high)
    except Exception as error:
        ended = replace(started, state="failed", failures=started.failures + 1, error=explain(error))
        is_same = number > 0 and load_job(directory, number - 1, []).error == ended.error
        said = f"the same as job {number - 1}" if is_same else ended.error
        log.error("job %d: %s", number, said, exc_info=not isinstance(error, UserError | OSError))
    finally:
        write_job(directory, replace(ended, seconds=time.monotonic() - begin))
    return ended.objective


def name_in_wandb(cfg: DictConfig, directory: Path, overrides: list[str]) -> None:
    """Group the jobs of a sweep in W&B by its folder, and name each by what varies, where nothing else was given."""
    # Two parts: by default they are the date and the time.
    cfg.wandb.group = cfg.wandb.group or "/".join(directory.absolute().parts[-2:])
    cfg.wandb.name = cfg.wandb.name or " ".join([cfg.job_name, *varied_overrides(directory, overrides)])


def _is_left_alone(job: Job, max_tries: int) -> bool:
    """Return whether a job must not be run, and log why: it is finished, running or has failed too often."""
    if job.state in FINISHED:
        log.info("job %d is %s already", job.number, job.state)
        return True
    if job.state == "running":
        log.warning("job %d is already running: process %s on %s", job.number, job.holder["pid"], job.holder["host"])
        return True
    if job.state == "failed" and job.failures >= max_tries:
        log.warning(
            "job %d is left alone, it failed %d times (sweep.max_tries): %s", job.number, job.failures, job.error
        )
        return True
    return False


def _check_same_job(directory: Path, number: int, overrides: list[str]) -> None:
    """Refuse a job whose overrides have changed since the sweep was started, such as by editing a preset."""
    # Optuna chooses the overrides of a job later, and a sweep may be given more trials on resume. In both cases nothing
    # is recorded for the job.
    identity = read_identity(directory)
    grid = identity.jobs if identity is not None else []
    recorded = grid[number] if number < len(grid) else []
    # What an older version accepted without a use is left out on resume.
    unused = unused_overrides(recorded)
    recorded = [override for override in recorded if override in overrides or override not in unused]
    was, now = result_overrides(recorded), result_overrides(overrides)
    if was and was != now:
        raise UserError(
            f"job {number} of the sweep in {directory} {describe_difference(was, now)}: conf/ has changed since; "
            "start another sweep"
        )


def _metric(node: Any) -> str:
    """Return the name of the metric by which the sweep compares its jobs."""
    metric: Metric = OmegaConf.select(node, "sweeper.metric") or Metric.pc_success
    return metric.value
