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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from pusht_act.cluster import plainly, sbatch_script, wait_for_all
from pusht_act.config import Metric, Mode
from pusht_act.lock import NAME as LOCK
from pusht_act.lock import Holder
from pusht_act.side_by_side import divide, settle
from pusht_act.signals import check
from pusht_act.sweep_table import best, table

if TYPE_CHECKING:
    from pusht_act.job import Result

log = logging.getLogger(__name__)

IDENTITY = "sweep.json"
FREE = (
    *("hydra.launcher.", "hydra/launcher", "cluster=", "hydra.verbose"),
    *("sweep.max_tries", "hydra.sweeper.n_trials="),
)
"""Overrides that a sweep may go on with other values of: where and how often its jobs run, not what they come to."""
FINISHED = ("done", "pruned")
"""States of a job that is left alone."""


@dataclass
class Job:
    """What is known of one job; `state` is done, pruned, failed, interrupted, running or waiting."""

    number: int
    overrides: list[str]
    state: str = "waiting"
    tries: int = 0
    """How often it was begun."""
    failures: int = 0
    """How often it failed."""
    step: int | None = None
    objective: float | None = None
    """Its `metric` if it was evaluated."""
    metric: str = Metric.pc_success.value
    error: str | None = None
    """Why it failed, in a line."""
    seconds: float = 0.0
    """Of its last try."""
    output_dir: str = ""
    holder: dict[str, Any] = field(default_factory=dict)
    """The process that began it last."""


class Recorder(Callback):  # type: ignore[misc]
    """Hydra's callback that writes down what a sweep is before its first job; conf/config.yaml names it."""

    directory: Path | None = None
    """Of this process's sweep."""
    hydra_node: DictConfig | None = None
    """Its Hydra configuration."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:  # noqa: D102
        task, hydras = (_as_given(each) for each in (config.hydra.overrides.task, config.hydra.overrides.hydra))
        grid = _grid(config, task)
        if config.cluster.dry_run:
            _show_script(config.hydra, max(len(grid), 1))
        Recorder.directory = directory = Path(config.hydra.sweep.dir)
        Recorder.hydra_node = config.hydra
        content = {"overrides": _recorded([*task, *hydras]), "jobs": grid}
        if direction := OmegaConf.select(config, "hydra.sweeper.direction"):
            content["direction"] = direction.value
        if not (directory / IDENTITY).exists():
            _write(directory / IDENTITY, content)
        divide(config.hydra.launcher, len(grid))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:  # noqa: D102
        settle(config.hydra.job)


def arguments(argv: Sequence[str]) -> list[str]:
    """The command's arguments, those of the sweep that it is to go on with in place of `sweep.resume`.

    Raises:
        FileNotFoundError: there is no such sweep.
        ValueError: the command, or the folder it names, is of another sweep.
    """
    given = dict(argument.partition("=")[::2] for argument in argv)
    multirun = not {"-m", "--multirun"}.isdisjoint(argv)
    if given.get("cluster.dry_run", "false").lower() == "true" and not multirun:
        raise ValueError("cluster.dry_run=true shows the script of a sweep: give -m too")
    if multirun and given.get("mode") == "status":
        raise ValueError("mode=status looks at one sweep or run and begins none: leave -m out")
    named = given.get("sweep.resume", "null")
    if named != "null":
        if not multirun:
            raise ValueError(f"sweep.resume={named} goes on with a sweep: give -m too")
        began = _identity(Path(named))
        if began is None:
            raise FileNotFoundError(
                f"sweep.resume={named} holds no sweep (no {IDENTITY}): give a folder such as multirun/DATE/TIME"
            )
        rest = [each for each in _recorded(argv) if each != f"sweep.resume={named}"]
        if other := [each for each in _of_the_sweep(rest) if each not in began]:
            raise ValueError(
                f"{' '.join(other)}: the sweep in {named} goes on as it was begun; leave it out, or begin another one"
            )
        elsewhere = [each for each in rest if each.startswith(FREE)]
        replaced = {each.partition("=")[0] for each in elsewhere}
        kept = [each for each in began if each.partition("=")[0] not in replaced]
        return ["-m", *kept, *elsewhere, f"hydra.sweep.dir={named}"]
    if multirun and (folder := given.get("hydra.sweep.dir")) and (began := _identity(Path(folder))) is not None:
        was, now = _of_the_sweep(began), _of_the_sweep(_recorded(argv))
        if now != was:
            raise ValueError(
                f"hydra.sweep.dir={folder} holds another sweep ({_difference(was, now)}): give the same overrides to "
                "go on with it, or another hydra.sweep.dir="
            )
    return list(argv)


def jobs(directory: Path) -> list[Job]:
    """All jobs of the sweep in `directory`, those that were not begun too."""
    content = json.loads((directory / IDENTITY).read_text())
    grid = dict(enumerate(content["jobs"]))
    begun = (int(path.stem) for path in (directory / "jobs").glob("*.json") if path.stem.isdigit())
    return [job(directory, number, grid.get(number, [])) for number in sorted({*grid, *begun})]


def job(directory: Path, number: int, overrides: list[str]) -> Job:
    """Job `number`; one that a killed process has left running is interrupted."""
    path = directory / "jobs" / f"{number}.json"
    found = _read(path)
    if found is None:
        return Job(number, overrides)
    if found.state == "running" and not _is_alive(found, path) and _read(path) == found:  # it has not ended just now
        found.state = "interrupted"
    return found


def objective(
    cfg: DictConfig, node: Any, execute: Callable[[DictConfig, Any], "Result"], explain: Callable[[Exception], str]
) -> float | None:
    """What the job `cfg` of a sweep comes to: done now by `execute`, or read if it was done before; None if it fails.

    One job's failure is written down and stops no other.
    """
    directory, number = Path(node.sweep.dir), int(node.job.num)
    overrides = list(node.overrides.task)
    _check_same(directory, number, overrides)
    found = job(directory, number, overrides)
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
    given = any(each.startswith("output_dir=") for each in found.overrides)
    output_dir = str(Path(cfg.output_dir).absolute() if given else node.runtime.output_dir)
    began = Job(
        number, found.overrides, "running", found.tries + 1, found.failures,
        metric=_metric(node), output_dir=output_dir, holder=asdict(Holder()),
    )  # fmt: skip
    start = time.monotonic()
    ended = replace(began, state="interrupted")
    _keep(directory, began)
    try:
        result = execute(cfg, node)
        state = "pruned" if result.pruned else "done"
        ended = replace(began, state=state, step=result.step, objective=result.metrics.get(began.metric))
    except Exception as error:  # whatever it is, the other jobs go on
        ended = replace(began, state="failed", failures=began.failures + 1, error=explain(error))
        log.error("job %d: %s", number, ended.error, exc_info=not isinstance(error, ValueError | OSError))
    finally:
        _keep(directory, replace(ended, seconds=time.monotonic() - start))
    return ended.objective


@contextmanager
def reported() -> Iterator[None]:
    """Within this a sweep may run; in the end a table shows its jobs, however it ends.

    Raises:
        ValueError: some jobs are not done.
        Stopped: by a signal.
    """
    Recorder.directory = Recorder.hydra_node = None
    found: list[Job] = []
    undone: list[Job] = []
    broken: RuntimeError | None = None
    try:
        yield
        check()  # a signal was passed on to the jobs, which have left
    except FileExistsError:  # the sweep is another process's, and so is its table
        Recorder.directory = None
        raise
    except RuntimeError as error:  # submitit's or joblib's, of a job whose process was killed: the table shows that
        check()
        broken = error
        if Recorder.hydra_node is not None:
            wait_for_all(Recorder.hydra_node)
    finally:
        directory = Recorder.directory
        if directory is not None and (directory / "jobs").is_dir():
            found = jobs(directory)
            undone = [each for each in found if each.state not in FINISHED]
            print(*table(found), *best(_direction(directory), found), sep="\n", flush=True)
            if undone:
                print(f"to go on: pusht-act -m sweep.resume={directory}", flush=True)
    if undone:
        reasons = [f" (job {each.number}: {each.error})" for each in undone if each.error]
        raise ValueError(f"{len(undone)} of {len(found)} jobs are not done{''.join(reasons[:1])}") from broken
    if broken is not None:
        if directory is None:
            raise broken
        raise ValueError(f"the sweep's jobs could not be begun: {plainly(broken)}") from broken


def _show_script(hydra_node: DictConfig, n_jobs: int) -> NoReturn:
    """Leave, whatever happens: what a callback raises Hydra makes a warning of, and would submit the jobs."""
    try:
        print(sbatch_script(hydra_node, n_jobs))
    except Exception as error:
        sys.exit(f"pusht-act: {error}")
    sys.exit()


def _as_given(overrides: ListConfig) -> list[str]:
    """Not as OmegaConf reads them out, with the values of their `${...}` in place."""
    given: list[str] = OmegaConf.to_container(overrides, resolve=False)  # type: ignore[assignment]
    return given


def _recorded(overrides: Sequence[str]) -> list[str]:
    """All but where the sweep lies: those of its jobs, then Hydra's."""
    left_out = ("hydra.sweep.dir=", "hydra.mode=", "-m", "--multirun")
    said = [each for each in overrides if not each.startswith(left_out)]
    return sorted(said, key=lambda each: each.startswith(("hydra.", "hydra/")))


def _of_the_sweep(overrides: Sequence[str]) -> list[str]:
    """Those that say what its jobs come to."""
    return [each for each in overrides if not each.startswith(FREE)]


def _grid(config: DictConfig, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job in Hydra's own order; where a sweeper chooses them as it goes none of each."""
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        return [[]] * max(sweeper.get("n_trials", 0), 0)
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    try:
        parsed = OverridesParser.create().parse_overrides([*params, *overrides])
        batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, None)
    except HydraException:  # the sweeper will raise it too
        return []
    return batches[0]


def _check_same(directory: Path, number: int, overrides: list[str]) -> None:
    """Refuse a job that is another one than when the sweep was begun, such as by a preset that was edited since."""
    grid: list[list[str]] = json.loads((directory / IDENTITY).read_text())["jobs"]
    was, now = _of_the_sweep(grid[number] if number < len(grid) else []), _of_the_sweep(overrides)
    if was and was != now:
        raise ValueError(
            f"job {number} of the sweep in {directory} {_difference(was, now)}: conf/ has changed since; begin another "
            "sweep"
        )


def _difference(was: list[str], now: list[str]) -> str:
    lost, new = (" ".join(each for each in a if each not in b) for a, b in ((was, now), (now, was)))
    return f"was {lost or 'without that'}, now {new or 'without that'}" if lost or new else "in order"


def _direction(directory: Path) -> str | None:
    direction: str | None = json.loads((directory / IDENTITY).read_text()).get("direction")
    return direction


def _metric(node: Any) -> str:
    """What the sweep compares its jobs by."""
    metric: Metric = OmegaConf.select(node, "sweeper.metric") or Metric.pc_success
    return metric.value


def _identity(directory: Path) -> list[str] | None:
    try:
        overrides: list[str] = json.loads((directory / IDENTITY).read_text())["overrides"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory / IDENTITY} is damaged ({error}): begin another sweep") from error
    return overrides


def _read(path: Path) -> Job | None:
    """What a job's file says; None when there is none that can be read."""
    try:
        return Job(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_alive(job: Job, path: Path) -> bool:
    """Whether the process that began `job`, as the file at `path` says, is at work."""
    try:
        lock = Path(job.output_dir) / LOCK  # touched every 30 s
        touched = max(each.stat().st_mtime for each in (path, lock) if each.exists())
        return Holder.read(job.holder).alive(time.time() - touched)
    except (OSError, TypeError, ValueError):  # removed just now, or not written by this program
        return False


def _keep(directory: Path, found: Job) -> None:
    """Write down what is known of a job."""
    _write(directory / "jobs" / f"{found.number}.json", asdict(found))


def _write(path: Path, content: dict[str, Any]) -> None:
    """All at once: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
