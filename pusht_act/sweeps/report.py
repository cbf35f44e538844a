"""What a sweep prints when it ends: the table of its jobs, and how to resume it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException

from pusht_act.runs.commands import follow_up_sweep
from pusht_act.runtime.atomic import write_text
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import signals
from pusht_act.sweeps.callback import observe_launch
from pusht_act.sweeps.slurm import explain_submit_error, wait_for_array
from pusht_act.sweeps.state import FINISHED, Job, load_jobs, read_identity
from pusht_act.sweeps.table import format_best, format_csv, format_jobs, format_seeds

log = logging.getLogger(__name__)

TABLE_FILE = "jobs.csv"


@contextmanager
def sweep_summary() -> Iterator[None]:
    """Print a table of the jobs after the block, however that ends, if it has launched a sweep.

    Raises:
        UserError: some jobs are not done.
        StopSignal: the process got a signal.
    """
    jobs: list[Job] = []
    undone: list[Job] = []
    broken: RuntimeError | None = None
    shows = True
    with observe_launch() as launched:
        try:
            yield
            # A signal was forwarded to the jobs, which have stopped by now.
            signals.raise_if_stopped()
        except (HydraException, UserError):
            # Refused: a command that was not carried out leaves no file.
            launched.undo()
            raise
        except FileExistsError:
            # Another process is running this sweep, and will print the table.
            shows = False
            raise
        except RuntimeError as error:
            # Raised by submitit or joblib for a job whose process was killed. The table shows which.
            signals.raise_if_stopped()
            broken = error
            if launched.hydra_node is not None:
                wait_for_array(launched.hydra_node)
        finally:
            directory = launched.directory
            if shows and directory is not None and (directory / "jobs").is_dir():
                jobs = load_jobs(directory)
                undone = [job for job in jobs if job.state not in FINISHED]
                identity = read_identity(directory)
                best = format_best(identity.direction if identity is not None else None, jobs)
                print(*format_jobs(jobs), *format_seeds(jobs), *best, sep="\n", flush=True)
                _write_table(directory, jobs)
                if undone:
                    print(
                        f"to resume: {follow_up_sweep(directory, identity.flags if identity is not None else [])}",
                        flush=True,
                    )
    if undone:
        reasons = [f" (job {job.number}: {job.error})" for job in undone if job.error]
        raise UserError(f"{len(undone)} of {len(jobs)} jobs are not done{''.join(reasons[:1])}") from broken
    if broken is not None:
        # Without a sweep it is an error of our own, which keeps its traceback.
        if directory is None:
            raise broken
        raise UserError(f"the sweep's jobs could not be started: {explain_submit_error(broken)}") from broken


def _write_table(directory: Path, jobs: list[Job]) -> None:
    """Write the table into the sweep's folder, and say where that is."""
    try:
        write_text(directory / TABLE_FILE, format_csv(jobs))
    except OSError as error:
        log.warning("%s cannot be written (%s): the sweep's results are in %s/jobs", TABLE_FILE, error, directory)
    print(f"the sweep is in {directory}, its table in {directory / TABLE_FILE}", flush=True)
