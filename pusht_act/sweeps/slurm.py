"""A sweep's jobs on SLURM: show their script, wait for them, requeue one of them, explain what SLURM refuses.

Hydra's submitit launcher submits the job array, of all jobs of the sweep. Its options are in conf/cluster/slurm.yaml.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pusht_act.runtime.errors import UserError
from pusht_act.sweeps.submitit_internals import make_sbatch_script

log = logging.getLogger(__name__)

LAUNCHER = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def sbatch_script(hydra_node: DictConfig, n_jobs: int) -> str:
    """Return the script of `n_jobs` jobs under the options of `hydra_node.launcher`.

    Raises:
        UserError: the launcher is not SLURM's, or has no such options.
    """
    options: dict[str, Any] = dict(OmegaConf.to_container(hydra_node.launcher, resolve=True))  # type: ignore[arg-type]
    if (target := options.pop("_target_")) != LAUNCHER:
        name = target.rpartition(".")[2]
        raise UserError(f"cluster.dry_run=true shows what SLURM would be given, not {name}: give cluster=slurm")
    # These two are the launcher's own, all others submitit's.
    folder = Path(options.pop("submitit_folder")).expanduser().absolute()
    options.pop("max_num_timeout")
    return make_sbatch_script(folder, options, n_jobs)


def wait_for_array(hydra_node: DictConfig) -> None:
    """Wait for the jobs submitted last under `hydra_node.launcher`, if that is SLURM's."""
    if hydra_node.launcher._target_ != LAUNCHER:
        return
    from submitit import SlurmJob

    # The launcher collects the results one after the other and gives up at the first job that left none, while the
    # others are still running. So they are found by the scripts in its folder, .../%j.
    folder = Path(hydra_node.launcher.submitit_folder).expanduser().absolute()
    scripts = folder.parent.glob("*/*_submission.sh")
    if (newest := max(scripts, key=lambda path: path.stat().st_mtime, default=None)) is not None:
        submitted = newest.name.partition("_")[0]
        for path in folder.parent.glob(f"{submitted}*"):
            if re.fullmatch(rf"{submitted}_\d+", path.name):
                SlurmJob(folder, path.name).wait()


def requeue(number: int, tries: int = 5, wait_s: float = 2) -> None:
    """Let the launcher's own handler act on a signal; in a job of SLURM's, submitit's requeues the job and exits.

    Args:
        number: The signal, which this process has acted upon so far as it must.
        tries: How often SLURM is asked.
        wait_s: Seconds in between.

    Raises:
        SystemExit: the job is queued again, or is about to be.
        subprocess.CalledProcessError: SLURM refused it each time.
    """
    for remaining in reversed(range(tries)):
        try:
            signal.raise_signal(number)
            return
        except subprocess.CalledProcessError:
            # SLURM does not requeue a job that it has just begun to requeue, as when a preemption comes on top of the
            # time limit. An error would be recorded as the job's result, so that it would be over for the launcher.
            if _is_ending():
                log.info("SLURM already requeues this job")
                sys.exit(128 + number)
            # Otherwise its controller may be busy: without an answer the job would be lost, so it is asked again.
            if not remaining:
                raise
            time.sleep(wait_s)


def _is_ending() -> bool:
    """Return whether SLURM counts this process's job as anything but running."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return asked.returncode == 0 and asked.stdout.split() != ["RUNNING"]


def explain_submit_error(error: RuntimeError) -> str:
    """Return what went wrong when jobs were submitted, and what to do about it."""
    message = " ".join(str(error).split())
    if "srun" in message and "slurm cluster" in message:
        return "there is no SLURM on this machine (no srun): leave out cluster= and hydra/launcher=, or log in to one"
    if "sbatch" in message:
        # SLURM's own words are in a traceback of submitit's.
        refused = [line.strip() for line in str(error).splitlines() if line.strip().startswith("sbatch: error:")]
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in refused) or message
        return f"SLURM refused them ({reason}): hydra.launcher.partition= and the like set what they ask for"
    return message
