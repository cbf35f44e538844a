"""Parallel jobs of a sweep on this machine, hydra/launcher=joblib: cores and GPUs are divided, signals forwarded.

    pusht-act -m ...     the launcher: decides how many jobs run at once, and forwards signals
      worker             n_jobs processes of joblib's, each with a share of the cores and one GPU, run job after job;
      worker             at a signal they save, leave their job and start no other; without their launcher they exit

Imports neither torch nor lerobot: torch reads OMP_NUM_THREADS and CUDA_VISIBLE_DEVICES when it is imported.
"""

import itertools
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from types import FrameType
from typing import Any

from omegaconf import DictConfig, read_write

from pusht_act.runtime.signals import STOPPING, signals
from pusht_act.runtime.system import JOBS, cores

log = logging.getLogger(__name__)

GPUS = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
LAUNCHER = "PUSHT_ACT_LAUNCHER"
"""The environment variable with the launcher's process number: it may be gone before a worker asks for its parent."""


def partition_resources(launcher: DictConfig, jobs: int) -> None:
    """Divide the machine among the workers of joblib's launcher, before it starts them.

    Args:
        launcher: Hydra's node of the launcher. Its n_jobs becomes the number of jobs at once.
        jobs: How many jobs there are; 0 if that is not known.
    """
    if not launcher._target_.endswith(".JoblibLauncher") or launcher.n_jobs == 0:
        return
    # One job a GPU or, without GPUs, a core. A negative n_jobs counts from there, as joblib's does.
    slots = len(_gpus()) or cores()
    at_once = launcher.n_jobs if launcher.n_jobs > 0 else max(1, slots + 1 + launcher.n_jobs)
    at_once = min(at_once, jobs or at_once)
    with read_write(launcher):
        launcher.n_jobs = at_once
    if at_once > 1:
        os.environ.setdefault(THREADS, str(max(1, cores() // at_once)))
        os.environ[JOBS] = str(at_once)
        os.environ[LAUNCHER] = str(os.getpid())
        signals.forward_to_children()
        _watch_from_the_start()


def _watch_from_the_start() -> None:
    """Let each worker of joblib's watch this launcher before it asks for a job, which it may never get."""
    from joblib.parallel import LokyBackend, register_parallel_backend

    class WatchingBackend(LokyBackend):  # type: ignore[misc]
        def configure(self, *args: Any, **kwargs: Any) -> int:
            return int(super().configure(*args, **kwargs, initializer=watch_launcher))

    register_parallel_backend("loky", WatchingBackend)


class _Worker:
    """The state of this process as a worker of joblib's: its slot, and whether it is stopping."""

    def __init__(self) -> None:
        self.stopping = False
        self._launcher = int(os.environ[LAUNCHER])
        self._slot = socket.socket(socket.AF_UNIX)
        if len(gpus := _gpus()) > 1:
            os.environ[GPUS] = gpus[self._take_slot() % len(gpus)]
        # A terminal sends SIGINT to all its processes, and the launcher forwards it to this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in set(STOPPING) - {signal.SIGINT}:
            signal.signal(number, self._handle)
        # The progress bars of several workers would be drawn over each other. tqdm has no switch for the bars of a
        # process that pass disable=None, so that they see a terminal or none: this process has none.
        sys.stderr.isatty = lambda: False  # type: ignore[method-assign]
        watch_launcher()

    def _take_slot(self) -> int:
        """Return the lowest number that no other worker of this launcher has, and hold it until this process ends."""
        # joblib replaces workers that have grown too large, so counting them would not do. A name in Linux's abstract
        # namespace of sockets is free again as soon as its process is gone, however that ends.
        for number in itertools.count():
            try:
                self._slot.bind(f"\0pusht-act/{self._launcher}/{number}")
            except OSError:
                continue
            return number
        raise AssertionError

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal between jobs; within a job, its own handler does."""
        if os.getppid() != self._launcher:
            os._exit(128 + number)
        self.stopping = True


_worker: _Worker | None = None


@cache
def watch_launcher() -> None:
    """Start a thread that waits until the launcher is gone, then stops this process as at a signal."""
    launcher, main = int(os.environ[LAUNCHER]), threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.2)
        # Before its first job there is nothing to save, and nobody who would give it one.
        if _worker is None:
            os._exit(1)
        signal.pthread_kill(main, signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def init_worker(job: DictConfig) -> None:
    """Prepare a worker for its next job; in any other process do nothing.

    Args:
        job: Hydra's node of the job.
    """
    # Global, as signal handlers and the environment are: there is one worker in a process.
    global _worker  # noqa: PLW0603
    if multiprocessing.parent_process() is None or JOBS not in os.environ:
        return
    _worker = _worker or _Worker()
    line = logging.Formatter(f"%(asctime)s %(levelname)s job {job.num}: %(message)s", "%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(line)
    gpu = f", GPU {os.environ[GPUS]}" if os.environ.get(GPUS) else ""
    log.info("%s of %d cores%s", os.environ[THREADS], cores() * int(os.environ[JOBS]), gpu)


def stopping() -> bool:
    """Return whether this process is a worker that got a signal to stop."""
    return _worker is not None and _worker.stopping


def _gpus() -> list[str]:
    """Return the GPUs that CUDA may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get(GPUS)) is not None:
        return [gpu for gpu in named.split(",") if gpu]
    try:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
