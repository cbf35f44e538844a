"""Jobs of a sweep side by side on this machine, hydra/launcher=joblib: cores and GPUs divided, signals passed on.

    pusht-act -m ...     the launcher: counts the places, and passes a signal on
      worker             n_jobs processes of joblib's, each with a share of the cores and one GPU, doing job after job
      worker             told to stop it saves, leaves its job and begins no other; with its launcher gone it ends, too

Imports neither torch nor lerobot, so that a worker knows its share before torch does.
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
from types import FrameType

from omegaconf import DictConfig, read_write

from pusht_act.runtime.signals import STOPPING, forward_to_children
from pusht_act.runtime.system import JOBS, cores

log = logging.getLogger(__name__)

GPUS = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"


def partition_resources(launcher: DictConfig, jobs: int) -> None:
    """In the launcher, before its workers begin: how many of the `jobs` at once (0: their number is not known)."""
    if not launcher._target_.endswith(".JoblibLauncher") or launcher.n_jobs == 0:
        return
    slots = len(_gpus()) or cores()
    at_once = launcher.n_jobs if launcher.n_jobs > 0 else max(1, slots + 1 + launcher.n_jobs)
    at_once = min(at_once, jobs or at_once)
    with read_write(launcher):
        launcher.n_jobs = at_once
    if at_once > 1:
        os.environ.setdefault(THREADS, str(max(1, cores() // at_once)))
        os.environ[JOBS] = str(at_once)
        forward_to_children()


class _Worker:
    """What a worker of joblib's is for itself: its place, and whether it was told to stop."""

    def __init__(self) -> None:
        self.leaving = False
        self._launcher = os.getppid()
        self._place = socket.socket(socket.AF_UNIX)
        if len(gpus := _gpus()) > 1:
            os.environ[GPUS] = gpus[self._take_place() % len(gpus)]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the launcher passes it on
        for number in set(STOPPING) - {signal.SIGINT}:
            signal.signal(number, self._handle)
        sys.stderr.isatty = lambda: False  # type: ignore[method-assign]  # bars of several would be drawn over each other
        threading.Thread(target=self._watch, name="launcher", daemon=True).start()

    def _take_place(self) -> int:
        """The lowest number that no other worker of this launcher has; it is free again when this process has ended.

        A worker's own number is none: joblib replaces those that have grown too large.
        """
        for number in itertools.count():
            try:
                self._place.bind(f"\0pusht-act/{self._launcher}/{number}")  # a name of the kernel's, no file
            except OSError:
                continue
            return number
        raise AssertionError

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getppid() != self._launcher:
            os._exit(128 + number)
        self.leaving = True

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while os.getppid() == self._launcher:
            time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGTERM)


_worker: _Worker | None = None


def init_worker(job: DictConfig) -> None:
    """In a worker, before each `job` of its own (Hydra's node of that name); in any other process nothing happens."""
    global _worker  # noqa: PLW0603  (there is one, as there is one process)
    if multiprocessing.parent_process() is None or JOBS not in os.environ:
        return
    _worker = _worker or _Worker()
    line = logging.Formatter(f"%(asctime)s %(levelname)s job {job.num}: %(message)s", "%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(line)
    gpu = f", GPU {os.environ[GPUS]}" if os.environ.get(GPUS) else ""
    log.info("%s of %d cores%s", os.environ[THREADS], cores() * int(os.environ[JOBS]), gpu)


def stopping() -> bool:
    """Whether this is a worker that was told to stop."""
    return _worker is not None and _worker.leaving


def _gpus() -> list[str]:
    """Those that CUDA may use, as CUDA_VISIBLE_DEVICES has them."""
    if (named := os.environ.get(GPUS)) is not None:
        return [each for each in named.split(",") if each]
    try:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
