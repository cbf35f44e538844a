"""How many processes this machine has room for."""

import os

JOBS = "PUSHT_ACT_JOBS"
"""The environment's: how many jobs of a sweep share the machine (side_by_side.py)."""


def cores() -> int:
    """The cores that this process may use: its share of them where jobs run side by side."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get(JOBS, "1")))
