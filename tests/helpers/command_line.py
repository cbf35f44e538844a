"""The command `pusht-act` in a process of its own, imports included; `commands` is faster."""

import os
import subprocess
import sys
from pathlib import Path


def command(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; `environment` is added to this process's."""
    return subprocess.run(
        [sys.executable, "-m", "pusht_act", *arguments],
        cwd=cwd,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
