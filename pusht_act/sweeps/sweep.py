"""Sweeps that can be gone on with: what each job came to, kept in the sweep's directory.

<hydra.sweep.dir>/
  multirun.yaml     Hydra's: the composed configuration
  sweep.json        the sweep's identity: its overrides and, of a grid, those of each job
  optuna.db         with hydra/sweeper=optuna its study (see optuna_sweeper.py)
  jobs/0.json ...   job 0: its state, how often it was begun, what it came to
  0/ 1/ ...         one run directory a job

    pusht-act -m sweep.resume=DIR     the same overrides, numbers and folders again: jobs that are done are left alone,
                                      those that were interrupted go on from their checkpoint, failures are tried again

Files alone tell the state, so it is the same from every machine. Imports neither torch nor lerobot.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from pusht_act.config.aliases import rename_overrides
from pusht_act.config.overrides import is_output_dir_typed
from pusht_act.config.schema import Metric, Mode
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import Holder

if TYPE_CHECKING:
    from pusht_act.job import Result
from pusht_act.sweeps.state import (
    FINISHED,
    IDENTITY,
    LAUNCH_KEYS,
    Job,
    describe_difference,
    load_job,
    read_identity,
    recorded_overrides,
    result_overrides,
    write_job,
)

log = logging.getLogger(__name__)


def expand_resume_args(argv: Sequence[str]) -> list[str]:
    """The command's arguments, those of the sweep that it is to go on with in place of `sweep.resume`.

    Raises:
        FileNotFoundError: there is no such sweep.
        UserError: the command, or the folder it names, is of another sweep.
    """
    given = dict(argument.partition("=")[::2] for argument in argv)
    multirun = not {"-m", "--multirun"}.isdisjoint(argv)
    if given.get("cluster.dry_run", "false").lower() == "true" and not multirun:
        raise UserError("cluster.dry_run=true shows the script of a sweep: give -m too")
    if multirun and given.get("mode") == "status":
        raise UserError("mode=status looks at one sweep or run and begins none: leave -m out")
    named = given.get("sweep.resume", "null")
    if named != "null":
        if not multirun:
            raise UserError(f"sweep.resume={named} goes on with a sweep: give -m too")
        began = read_identity(Path(named))
        if began is None:
            raise FileNotFoundError(
                f"sweep.resume={named} holds no sweep (no {IDENTITY}): give a folder such as multirun/DATE/TIME"
            )
        rest = [each for each in recorded_overrides(argv) if each != f"sweep.resume={named}"]
        if other := [each for each in result_overrides(rest) if each not in began]:
            raise UserError(
                f"{' '.join(other)}: the sweep in {named} goes on as it was begun; leave it out, or begin another one"
            )
        elsewhere = [each for each in rest if each.startswith(LAUNCH_KEYS)]
        replaced = {each.partition("=")[0] for each in elsewhere}
        kept = [each for each in began if each.partition("=")[0] not in replaced]
        return ["-m", *kept, *elsewhere, f"hydra.sweep.dir={named}"]
    if multirun and (folder := given.get("hydra.sweep.dir")) and (began := read_identity(Path(folder))) is not None:
        was, now = result_overrides(began), result_overrides(recorded_overrides(argv))
        if now != was:
            raise UserError(
                f"hydra.sweep.dir={folder} holds another sweep ({describe_difference(was, now)}): give the same "
                "overrides to go on with it, or another hydra.sweep.dir="
            )
    return list(argv)


def run_sweep_job(
    cfg: DictConfig, node: Any, execute: Callable[[DictConfig, Any], "Result"], explain: Callable[[Exception], str]
) -> float | None:
    """What the job `cfg` of a sweep comes to: done now by `execute`, or read if it was done before; None if it fails.

    One job's failure is written down and stops no other.
    """
    directory, number = Path(node.sweep.dir), int(node.job.num)
    overrides = list(node.overrides.task)
    _check_same(directory, number, overrides)
    found = load_job(directory, number, overrides)
    if found.state in FINISHED:
        log.info("job %d is %s already", number, found.state)
        return found.objective
    if found.state == "running":
        log.warning("job %d is under way: process %s on %s", number, found.holder["pid"], found.holder["host"])
        return None
    if found.state == "failed" and found.failures >= cfg.sweep.max_tries:
        log.warning(
            "job %d is left alone, it failed %d times (sweep.max_tries): %s", number, found.failures, found.error
        )
        return None
    if found.tries and cfg.mode in (Mode.test, Mode.full):
        cfg.resume.auto = True
    given = is_output_dir_typed(found.overrides)
    output_dir = str(Path(cfg.output_dir).absolute() if given else node.runtime.output_dir)
    began = Job(
        number, found.overrides, "running", found.tries + 1, found.failures,
        metric=_metric(node), output_dir=output_dir, holder=asdict(Holder()),
    )  # fmt: skip
    start = time.monotonic()
    ended = replace(began, state="interrupted")
    write_job(directory, began)
    try:
        result = execute(cfg, node)
        state = "pruned" if result.pruned else "done"
        ended = replace(began, state=state, step=result.step, objective=result.metrics.get(began.metric))
    except Exception as error:  # whatever it is, the other jobs go on
        ended = replace(began, state="failed", failures=began.failures + 1, error=explain(error))
        log.error("job %d: %s", number, ended.error, exc_info=not isinstance(error, UserError | OSError))
    finally:
        write_job(directory, replace(ended, seconds=time.monotonic() - start))
    return ended.objective


def _check_same(directory: Path, number: int, overrides: list[str]) -> None:
    """Refuse a job that is another one than when the sweep was begun, such as by a preset that was edited since."""
    grid: list[list[str]] = json.loads((directory / IDENTITY).read_text())["jobs"]
    recorded = rename_overrides(grid[number], quiet=True) if number < len(grid) else []
    was, now = result_overrides(recorded), result_overrides(overrides)
    if was and was != now:
        raise UserError(
            f"job {number} of the sweep in {directory} {describe_difference(was, now)}: conf/ has changed since; "
            "begin another sweep"
        )


def _metric(node: Any) -> str:
    """What the sweep compares its jobs by."""
    metric: Metric = OmegaConf.select(node, "sweeper.metric") or Metric.pc_success
    return metric.value
