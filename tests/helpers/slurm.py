"""A real SLURM of this machine alone, for as long as a test or a benchmark needs it.

It needs root, and does without munge and a data base.

    with Slurm(folder) as slurm:
        slurm.run("sbatch", ...)            any of SLURM's commands, on this cluster
        subprocess.run(..., env=slurm.environment)

Two partitions: main, and high, whose jobs preempt those of main: SIGTERM, after KillWait SIGKILL, then the queue again.
Several clusters can be up at once. Debian's package is slurm-wlm; .ci/run installs it where it may.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

KILL_WAIT_S = 2
"""Sites have 30 or more; a test would wait for them."""
CONFIGURATION = """
ClusterName=pusht
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={second_port}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait_s}
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes={host} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
SACCT = """#!/bin/sh
# submitit asks sacct what became of a job; without a data base squeue knows, as long as MinJobAge says.
while [ $# -gt 0 ]; do [ "$1" = -j ] && { shift; ids="$ids,$1"; }; shift; done
echo 'JobID|State|NodeList'
exec squeue -h -t all -j "${ids#,}" --format='%i|%T|%N'
"""


def missing() -> str | None:
    """Return why no SLURM can be started here, or None."""
    if absent := [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]:
        return f"SLURM is not installed ({', '.join(absent)}): apt-get install slurm-wlm"
    return None if os.geteuid() == 0 else "SLURM's daemons are started by root alone"


class Slurm:
    """A cluster of this machine, up for as long as the context."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.folder = folder
        self._cpus = cpus
        binaries = folder / "bin"
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{binaries}:{os.environ['PATH']}:/usr/sbin",
        }
        """What a command needs to be of this cluster."""

    def __enter__(self) -> "Slurm":
        for name in ("state", "spool", "log", "bin"):
            (self.folder / name).mkdir(parents=True)
        host, port = socket.gethostname().partition(".")[0], _free_port()
        configuration = CONFIGURATION.format(
            host=host, folder=self.folder, port=port, second_port=port + 1, cpus=self._cpus, kill_wait_s=KILL_WAIT_S
        )
        (self.folder / "slurm.conf").write_text(configuration)
        sacct = self.folder / "bin" / "sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)
        self.run("slurmctld")
        self.run("slurmd")
        self._wait_until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T", check=False), "no idle node")
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--signal=KILL", "--full", "-u", "root", check=False)
        self.run("scancel", "-u", "root", check=False)
        time.sleep(1)
        for daemon in ("slurmd", "slurmctld"):
            pid = int((self.folder / f"{daemon}.pid").read_text())
            os.kill(pid, 15)
            self._wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"{daemon} stays")  # type: ignore[misc]

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of SLURM's commands and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}{self._log()}")
        return done.stdout

    def _wait_until(self, holds: Callable[[], bool], otherwise: str, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                raise TimeoutError(f"{otherwise} after {seconds:.0f} s{self._log()}")
            time.sleep(0.1)

    def _log(self) -> str:
        logs: Sequence[Path] = sorted((self.folder / "log").glob("*.log"))
        return "".join(f"\n{path.name}:\n{path.read_text()[-2000:]}" for path in logs)


def _free_port() -> int:
    """Return a free port whose successor is free, too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
