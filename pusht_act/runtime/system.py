"""How many cores this process may use."""

import os

JOBS = "PUSHT_ACT_JOBS"
"""The environment variable that says how many jobs of a sweep share the machine (sweeps/joblib_workers.py)."""


def cores() -> int:
    """Return how many cores this process may use: its share of them if several jobs run in parallel."""
    # The affinity, where the system has one: a container or SLURM may allow fewer cores than the machine has.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get(JOBS, "1")))
