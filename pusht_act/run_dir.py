"""The paths within a run directory, and whether a run may use it: fresh, resumed or refused.

Imports neither torch nor lerobot, so that a refusal answers at once.
"""

import itertools
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from pusht_act.integrity import MANIFEST, damage, differs
from pusht_act.lock import is_lock

log = logging.getLogger(__name__)

PACKAGES = ("pusht-act", "lerobot", "torch", "torchvision", "gym-pusht", "pymunk", "hydra-core", "numpy", "av", "wandb")
OURS = "pusht_act.json"
"""In a checkpoint's two folders, what LeRobot does not keep."""
CONFIG_PART = ".config.yaml.part"
"""config.yaml being written: the first file of a run."""


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, with the training state beside it if a training run wrote it."""

    model: Path

    @property
    def directory(self) -> Path:
        """The step's folder."""
        return self.model.parent

    @property
    def training(self) -> Path:
        """The training state, beside the model."""
        return self.directory / "training_state"

    @property
    def run(self) -> Path | None:
        """The run directory it lies in, if it does."""
        parent = self.directory.resolve().parent
        return parent.parent if parent.name == "checkpoints" else None

    @property
    def name(self) -> str:
        """Its step as the folder's name has it."""
        return self.directory.resolve().name

    @property
    def step(self) -> int:
        """The optimizer step it was written at.

        Raises:
            ValueError: there is no training state, so it can be evaluated but not resumed.
        """
        try:
            return int(json.loads((self.training / "training_step.json").read_text())["step"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{self.directory} has no readable training_state/training_step.json, so nothing can be resumed from "
                "it: give a checkpoint that a training run wrote"
            ) from error

    @property
    def pending(self) -> int | None:
        """The step whose evaluation was under way when it was written; None, too, where that cannot be read."""
        try:
            pending: int | None = json.loads((self.training / OURS).read_text())["pending"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pending


@dataclass(frozen=True)
class RunDir:
    """The files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """One folder a step, and the links last and best."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the console showed."""
        return self.path / "train.log"

    def has_checkpoints(self) -> bool:
        """Whether a checkpoint was ever saved here, sound or not."""
        steps = (path.name.isdigit() for path in self.checkpoints.glob("*"))
        return (self.checkpoints / "last").is_symlink() or any(steps)

    def metrics_of(self, step: int) -> dict[str, float]:
        """What metrics.jsonl has of `step`, without the groups' names and but the validation loss."""
        lines = map(json.loads, self.metrics.read_text().splitlines())
        values = {key: value for line in lines if line["step"] == step for key, value in line.items()}
        return {key.partition("/")[2]: value for key, value in values.items() if key not in ("step", "eval/loss")}

    def configuration(self) -> dict[str, Any]:
        """config.yaml as the last start wrote it; empty when there is none that can be read."""
        try:
            content = yaml.safe_load((self.path / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return content if isinstance(content, dict) else {}

    def evaluation(self, step: int, start_seed: int, n_episodes: int) -> Path:
        """One folder a (checkpoint, seeds): evaluating again writes the same numbers to the same place."""
        return self.path / "eval" / f"step-{step:06d}_seeds-{start_seed}-{start_seed + n_episodes - 1}"


def check_unused(
    path: Path, overwrite: bool, remedy: str = "continue it with mode=resume, give another job_name= or output_dir="
) -> None:
    """Before a new run: its directory must be empty or absent, unless it may be moved aside.

    Raises:
        FileExistsError: it is in use.
    """
    if _in_use(path) and not overwrite:
        raise FileExistsError(f"output_dir={path} is in use: {remedy}, or move it aside with overwrite=true")
    if _in_use(path) and Path.cwd().is_relative_to(path.resolve()):
        raise FileExistsError(f"output_dir={path} is the working directory or above it: give a folder of the run's own")


def move_aside(path: Path) -> Path | None:
    """Rename a run directory in use to path.old-N, which is returned; nothing is ever deleted."""
    if not _in_use(path):
        return None
    names = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def _in_use(path: Path) -> bool:
    """A job that was killed before it wrote its configuration has left nothing that would be."""
    return path.exists() and (
        not path.is_dir() or any(not is_lock(each) and each.name != CONFIG_PART for each in path.iterdir())
    )


def find_checkpoint(path: str, key: str) -> Checkpoint:
    """The checkpoint at `path`: a run directory (then its `last`), a step's folder, its model folder or a file in it.

    Raises:
        FileNotFoundError: there is none; `key` names the option in the message.
    """
    at = Path(path).expanduser()
    if at.is_file():
        at = at.parent
    for model in (at, at / "pretrained_model", at / "checkpoints" / "last" / "pretrained_model"):
        if (model / "config.json").is_file():
            return Checkpoint(model.parent.resolve() / model.name)
    if at.is_dir():
        raise FileNotFoundError(
            f"{key}={path} holds no checkpoint (no config.json): give .../checkpoints/STEP of a run"
        )
    raise FileNotFoundError(f"{key}={path} does not exist: give a checkpoint of a run, such as .../checkpoints/last")


def check_sound(checkpoint: Checkpoint, key: str, files: tuple[str, ...]) -> None:
    """A checkpoint that the user has named is the one written, in those of its `files` that are needed, or refused.

    Raises:
        ValueError: a file is missing or damaged; `key` names the option in the message.
    """
    if checkpoint.model.name == "pretrained_model" and (wrong := differs(checkpoint.directory, files)):
        raise ValueError(
            f"{key}: {checkpoint.directory}/{wrong}; give another checkpoint "
            f"(or delete its {MANIFEST} if you changed the file yourself)"
        )


def newest_sound(run: RunDir, most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """`last` of a run or, where that is damaged, its newest sound checkpoint; and what is wrong with those before it.

    Only those of step `most` and before are looked at.
    """
    link, wrong = run.checkpoints / "last", []
    target = Path(os.path.realpath(link))  # resolve() raises at a link to itself
    steps = [path for path in run.checkpoints.glob("*") if path.name.isdigit()]
    others = sorted((path for path in steps if path.resolve() != target), key=lambda path: int(path.name), reverse=True)
    if not link.exists() and (steps or link.is_symlink()):
        wrong.append(f"{link} points to {target.name}, which is missing" if link.is_symlink() else f"{link} is missing")
    for path in [*([target] if link.exists() else []), *others]:
        if most is not None and path.name.isdigit() and int(path.name) > most:
            continue
        if (found := damage(path)) is None:
            return Checkpoint(path.resolve() / "pretrained_model"), wrong
        wrong.append(f"{path}: {found}")
    return None, wrong


def last_checkpoint(
    run: RunDir,
    most: int | None = None,
    remedy: str = "name one elsewhere with resume.path=, or start afresh with overwrite=true",
) -> Checkpoint:
    """`last` of a run or, with a warning, the newest sound one; of step `most` or before.

    Raises:
        FileNotFoundError: nothing to resume.
        ValueError: there are checkpoints, none of them sound.
    """
    sound, wrong = newest_sound(run, most)
    if sound is None and wrong:
        raise ValueError(f"no checkpoint in {run.checkpoints} is sound ({'; '.join(wrong)}): {remedy}")
    if sound is not None:
        if wrong:
            log.warning("%s; going on from step %d instead, %s", "; ".join(wrong), sound.step, sound.directory)
        return sound
    others = sorted(str(p.parent.parent) for p in run.path.parent.glob("*/checkpoints/last"))
    hint = f"; there is {', '.join(others)} (give output_dir=)" if others else ""
    raise FileNotFoundError(
        f"nothing to resume in {run.path}{hint}: start with mode=full, or name a checkpoint with resume.path="
    )


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
    """The commit of the source, "+changes" when the tree differs from it; None when no repository holds it."""
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
