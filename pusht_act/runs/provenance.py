"""Record what made a run: configuration, command, commit, versions, host; and its log file."""

import json
import logging
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pusht_act.config.errors import explain
from pusht_act.config.schema import CONFIG_DIR
from pusht_act.runs.commands import record_command
from pusht_act.runs.run_dir import CONFIG_FILE, RUNS_FILE, RunDir
from pusht_act.runtime.atomic import write_text
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.system import cores

log = logging.getLogger(__name__)

PACKAGES = ("pusht-act", "lerobot", "torch", "torchvision", "gym-pusht", "pymunk", "hydra-core", "numpy", "av", "wandb")


def write_provenance(
    run: RunDir, config: dict[str, Any], overrides: list[str], functions: dict[str, Any] | None = None
) -> None:
    """Write config.yaml and append this start to runs.jsonl: command, commit, versions, host.

    Args:
        run: The run directory, which is made if need be.
        config: The composed configuration.
        overrides: The command line's.
        functions: The names of what was given beside them from Python, by argument of `pusht_act.run`.

    Raises:
        OSError: the directory cannot be made or written to.
    """
    from omegaconf import OmegaConf

    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"output_dir={run.path} cannot be made ({error.strerror}): give output_dir= where you may write"
        ) from error
    # What it takes to run the same again.
    entry = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": record_command(overrides, functions),
        **(functions or {}),
        "git": git_commit(),
        "versions": package_versions(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    try:
        # The first file of a run: until it is there, nothing in the directory counts as use (run_dir.py).
        write_text(run.path / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config)))
        with (run.path / RUNS_FILE).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        # Where a rename fails, its target is the second name.
        at = f", {name}" if (name := error.filename2 or error.filename) else ""
        raise OSError(
            f"output_dir={run.path} cannot be written to ({error.strerror}{at}): make room, or give another output_dir="
        ) from error


@contextmanager
def log_file(run: RunDir) -> Iterator[None]:
    """Copy what the console shows to train.log for the duration of the block, and the error that ends it."""
    handler = logging.FileHandler(run.log, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # Called from Python, nobody has configured logging.
    logging.getLogger("pusht_act").setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    log.info("run directory: %s", run.path)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        # Whoever catches it shows it on the console, so it is not logged but written to the file alone.
        known = isinstance(error, UserError | OSError | KeyboardInterrupt)
        message = f"pusht-act: {explain(error, CONFIG_DIR)}" if known else "an unexpected error ended the run"
        cause = None if known else (type(error), error, error.__traceback__)
        record = logging.LogRecord(log.name, logging.ERROR, __file__, 0, message, None, cause)
        # The error may be that the disk is full.
        with suppress(OSError), run.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(handler.format(record) + "\n")
        raise
    finally:
        # The next job of a sweep runs in the same process and has a file of its own.
        logging.getLogger().removeHandler(handler)
        handler.close()


def package_versions() -> dict[str, str]:
    """Return the versions that a result depends on, by package."""
    # Imported here: it takes longer than this module, and composing a configuration has no use for it.
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def machine() -> dict[str, Any]:
    """Return the host, its processor and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return {"host": socket.gethostname(), "cpu": model or platform.machine(), "cores": cores()}


def git_commit() -> str | None:
    """Return the commit of the source, with "+changes" if the tree differs from it; None outside of a repository."""
    source = Path(__file__).parent
    git = ["git", "-C", str(source)]
    try:
        # An installed package may lie within somebody else's repository, which does not track this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        # -uno: files that git does not know, such as run directories, are no changes of the source.
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + ("+changes" if changed.stdout else "")
