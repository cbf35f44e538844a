"""A sweep's jobs on SLURM: the script they would be submitted by, waiting for all of them, what SLURM objects to."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pusht_act.runtime.errors import UserError

LAUNCHER = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def sbatch_script(hydra_node: DictConfig, n_jobs: int) -> str:
    """The script of `n_jobs` jobs under the options of `hydra_node.launcher`, an array if there are several.

    Raises:
        UserError: they are another launcher's, or no such options.
    """
    from submitit.slurm.slurm import SlurmExecutor, _convert_mem, _make_sbatch_string  # the plugin is pinned

    options: dict[str, Any] = dict(OmegaConf.to_container(hydra_node.launcher, resolve=True))  # type: ignore[arg-type]
    if (target := options.pop("_target_")) != LAUNCHER:
        name = target.rpartition(".")[2]
        raise UserError(f"cluster.dry_run=true shows what SLURM would be given, not {name}: give cluster=slurm")
    folder = Path(options.pop("submitit_folder")).expanduser().absolute()
    options.pop("max_num_timeout")
    names = SlurmExecutor._equivalence_dict()
    parameters = {names.get(key, key): value for key, value in options.items() if value is not None}
    if "mem" in parameters:
        parameters["mem"] = _convert_mem(parameters["mem"])
    if n_jobs > 1:
        parameters["map_count"] = n_jobs
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def wait_for_array(hydra_node: DictConfig) -> None:
    """Wait for the jobs submitted last under `hydra_node.launcher`, if it is SLURM's.

    The launcher takes their results one after the other, and no more after the first job that left none.
    """
    if hydra_node.launcher._target_ != LAUNCHER:
        return
    from submitit import SlurmJob

    folder = Path(hydra_node.launcher.submitit_folder).expanduser().absolute()  # .../%j
    scripts = folder.parent.glob("*/*_submission.sh")
    if (newest := max(scripts, key=lambda path: path.stat().st_mtime, default=None)) is not None:
        submitted = newest.name.partition("_")[0]
        for path in folder.parent.glob(f"{submitted}*"):
            if re.fullmatch(rf"{submitted}_\d+", path.name):
                SlurmJob(folder, path.name).wait()


def explain_submit_error(error: RuntimeError) -> str:
    """A launcher's error and what to do about it."""
    said = " ".join(str(error).split())
    if "srun" in said and "slurm cluster" in said:
        return "there is no SLURM on this machine (no srun): leave out cluster= and hydra/launcher=, or log in to one"
    if "sbatch" in said:
        refused = [line.strip() for line in str(error).splitlines() if line.strip().startswith("sbatch: error:")]
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in refused) or said
        return f"SLURM refused them ({reason}): hydra.launcher.partition= and the like say what they ask for"
    return said
