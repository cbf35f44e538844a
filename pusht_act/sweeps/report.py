"""What a sweep prints in the end: the table of its jobs, and how to continue."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import raise_if_stopped
from pusht_act.sweeps.slurm import explain_submit_error, wait_for_array
from pusht_act.sweeps.table import format_best, format_jobs

if TYPE_CHECKING:
    pass
from pusht_act.sweeps.callback import SweepCallback
from pusht_act.sweeps.state import FINISHED, Job, load_jobs, read_direction


@contextmanager
def sweep_summary() -> Iterator[None]:
    """Within this a sweep may run; in the end a table shows its jobs, however it ends.

    Raises:
        UserError: some jobs are not done.
        StopSignal: by a signal.
    """
    SweepCallback.directory = SweepCallback.hydra_node = None
    found: list[Job] = []
    undone: list[Job] = []
    broken: RuntimeError | None = None
    try:
        yield
        raise_if_stopped()  # a signal was passed on to the jobs, which have left
    except FileExistsError:  # the sweep is another process's, and so is its table
        SweepCallback.directory = None
        raise
    except RuntimeError as error:  # submitit's or joblib's, of a job whose process was killed: the table shows that
        raise_if_stopped()
        broken = error
        if SweepCallback.hydra_node is not None:
            wait_for_array(SweepCallback.hydra_node)
    finally:
        directory = SweepCallback.directory
        if directory is not None and (directory / "jobs").is_dir():
            found = load_jobs(directory)
            undone = [each for each in found if each.state not in FINISHED]
            print(*format_jobs(found), *format_best(read_direction(directory), found), sep="\n", flush=True)
            if undone:
                print(f"to go on: pusht-act -m sweep.resume={directory}", flush=True)
    if undone:
        reasons = [f" (job {each.number}: {each.error})" for each in undone if each.error]
        raise UserError(f"{len(undone)} of {len(found)} jobs are not done{''.join(reasons[:1])}") from broken
    if broken is not None:
        if directory is None:
            raise broken
        raise UserError(f"the sweep's jobs could not be begun: {explain_submit_error(broken)}") from broken
