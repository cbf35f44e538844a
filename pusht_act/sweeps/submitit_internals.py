"""Everything that sweeps need of submitit's internals, which are no public interface.

Written for submitit 1.5: tests/sweeps/test_internals.py fails, naming that version, if they have changed.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

SUBMITIT_VERSION = "1.5"


def make_sbatch_script(folder: Path, options: dict[str, Any], n_jobs: int) -> str:
    """Return the script that submitit would submit.

    Args:
        folder: Where the jobs' logs go, with submitit's %j in place of the job's id.
        options: The parameters of submitit's AutoExecutor.
        n_jobs: How many jobs: an array if there are several.
    """
    from submitit.slurm.slurm import SlurmExecutor, _convert_mem, _make_sbatch_string

    # What SlurmExecutor does with its parameters before it submits: names of its own, and memory in megabytes.
    names = SlurmExecutor._equivalence_dict()
    parameters = {names.get(key, key): value for key, value in options.items() if value is not None}
    if "mem" in parameters:
        parameters["mem"] = _convert_mem(parameters["mem"])
    if n_jobs > 1:
        parameters["map_count"] = n_jobs
    # Each job starts this module, which unpickles its function from the folder.
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **parameters))
