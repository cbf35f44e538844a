"""What became of a process."""

import time
from pathlib import Path


def gone(pid: int) -> bool:
    """Return whether the process ends within two minutes; one that nobody has waited for has ended, too."""
    for _ in range(1200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False
