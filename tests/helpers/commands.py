"""The command `pusht-act` in processes forked from one that has imported torch already, which takes seconds.

What is forked does all that the command does, from reading its arguments to leaving with its exit code.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np


class Commands:
    """Starts commands, each with an output file; as a context manager, ends those that are left."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: list[str], output: Path, environment: dict[str, str] | None = None) -> int:
        """Start a command and return its process id; `environment` is added to this process's."""
        output.write_bytes(b"")  # it may be looked at before the process has got so far
        asked = {"start": arguments, "output": str(output), "cwd": str(Path.cwd()), "environment": environment or {}}
        return int(self._asked(asked))

    def wait(self, pid: int) -> int:
        """Wait for the process and return its exit code, which is -n after signal n."""
        return int(self._asked({"wait": pid}))

    def run(self, arguments: list[str], output: Path) -> int:
        """Run a command to its end and return its exit code."""
        return self.wait(self.start(arguments, output))

    def _asked(self, question: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()


def appears(path: Path, text: str, seconds: float = 300) -> None:
    """Wait until `text` is in the file at `path`.

    Raises:
        TimeoutError: it was not there after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text(errors="replace"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{text!r} is not in {path}: {path.read_text() if path.exists() else 'no file'}")
        time.sleep(0.002)


def serve() -> None:
    """Serve a `Commands` until it closes its end of the pipe."""
    import optuna  # noqa: F401

    import pusht_act.training.trainer
    from pusht_act.envs.coverage import coverage_of_poses

    # What else is slow the first time: Hydra's search for plugins, and what numba has compiled.
    with redirect_stdout(io.StringIO()):
        pusht_act.run(["print_lerobot_command=true"])
    coverage_of_poses(np.zeros((1, 3)))
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    begun: set[int] = set()
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if "wait" in asked:
            pid = asked["wait"]
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            begun.discard(pid)
        elif answer := os.fork():
            begun.add(answer)
        else:
            os.environ.update(asked["environment"])
            run(asked["start"], asked["output"], asked["cwd"])
        print(json.dumps(answer), flush=True)
    for pid in begun:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run(arguments: list[str], output: str, cwd: str) -> None:
    """Become the command, in the forked process."""
    import pusht_act.main

    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, standard in ((nothing, 0), (written, 1), (written, 2)):
        os.dup2(ours, standard)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born with it ignored
    os.chdir(cwd)
    sys.argv = ["pusht-act", *arguments]
    code: Any = 0
    try:
        pusht_act.main.main()
    except SystemExit as error:
        code = error.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code or 0)  # taking torch apart would take seconds more


if __name__ == "__main__":
    serve()
