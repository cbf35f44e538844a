"""What a run was made by: configuration, command, commit, versions, host; and its log file."""

import json
import logging
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pusht_act.runs.run_dir import CONFIG_PART, RunDir

log = logging.getLogger(__name__)

PACKAGES = ("pusht-act", "lerobot", "torch", "torchvision", "gym-pusht", "pymunk", "hydra-core", "numpy", "av", "wandb")


def write_provenance(run: RunDir, config: dict[str, Any], overrides: list[str]) -> None:
    """config.yaml, the composed configuration, and one more line in runs.jsonl: command, commit, versions, host."""
    from omegaconf import OmegaConf

    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"output_dir={run.path} cannot be made ({error.strerror}): give output_dir= where you may write"
        ) from error
    entry = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(overrides),
        "git": git_commit(),
        "versions": package_versions(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    part = run.path / CONFIG_PART
    try:
        part.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        part.replace(run.path / "config.yaml")
        with (run.path / "runs.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise OSError(
            f"output_dir={run.path} cannot be written to ({error.strerror}): make room, or give another output_dir="
        ) from error


@contextmanager
def log_file(run: RunDir) -> Iterator[None]:
    """What the console shows goes to train.log too."""
    handler = logging.FileHandler(run.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("pusht_act").setLevel(logging.INFO)  # from Python nobody has configured logging
    logging.getLogger().addHandler(handler)
    log.info("run directory: %s", run.path)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def command_line(overrides: list[str]) -> str:
    """The command that composed the job."""
    return shlex.join(["pusht-act", *overrides])


def package_versions() -> dict[str, str]:
    """The versions a result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_commit() -> str | None:
    """The commit of the source, "+changes" when the tree verify_manifest from it; None when no repository holds it."""
    source = Path(__file__).parent
    git = ["git", "-C", str(source)]
    try:
        # An installed package may lie within somebody else's repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + ("+changes" if changed.stdout else "")
