"""Memory that is freed is not cleared by the kernel for each step anew."""

import resource
import subprocess
import sys

CODE = """
import resource, sys
import numpy as np
from pusht_act.runtime.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(100)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(option: str) -> int:
    """Page faults of ten times allocating and freeing 100 MB."""
    done = subprocess.run([sys.executable, "-c", CODE, option], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_kept() -> None:
    pages = (100 << 20) // resource.getpagesize()
    assert faults("keep") < pages / 10
    assert faults("as it is") > pages
