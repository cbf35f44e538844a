"""The manifest of a checkpoint: size and hash of every file, to tell whether they are still those that were written.

Imports neither torch nor lerobot, so that a refusal is immediate.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pusht_act.checkpoints.tensor_file import find_damage
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.stored import check_is_file, read_json

MANIFEST = "manifest.json"
"""The file beside a checkpoint's two folders: {"pretrained_model/config.json": {"size": bytes, "sha256": hex}, ...}."""
EVAL_FILES = ("pretrained_model/", "pretrained_model_ema/", "training_state/training_step.json")
"""What an evaluation reads; a name that ends in a slash stands for all files of that folder."""
ALL_FILES = ("",)
RESUME_FILES = (
    *("pretrained_model/config.json", "pretrained_model/model.safetensors"),
    *("training_state/training_step.json", "training_state/rng_state.safetensors"),
    *("training_state/optimizer_param_groups.json", "training_state/optimizer_state.safetensors"),
)
"""What a resume cannot do without, in any checkpoint of LeRobot's layout. (The others have defaults.)"""


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a file."""

    size: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files that are in `folder` now."""
    # Names are relative, so that a checkpoint can be moved.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2))


def verify_manifest(folder: Path, files: tuple[str, ...] = ALL_FILES) -> str | None:
    """Return what differs from the manifest, as "FILE is ..."; None if nothing does or there is no manifest.

    Args:
        folder: The checkpoint.
        files: The beginnings of the names of the files to read.
    """
    try:
        entries = read_json(folder / MANIFEST, dict[str, Entry])
    except FileNotFoundError:
        # Written by stock LeRobot, or by this project before it had manifests.
        return None
    except UserError as error:
        return str(error).removeprefix(f"{folder}/").rpartition(": ")[0]
    for name, entry in entries.items():
        if name.startswith(files) and (wrong := _verify_entry(folder, name, entry)):
            return f"{name} {wrong}"
    return None


def find_corruption(folder: Path) -> str | None:
    """Return what keeps the checkpoint in `folder` from being resumed, as "FILE is ..."; None if it is valid."""
    if not folder.is_dir():
        return "its folder is missing"
    if (folder / MANIFEST).exists():
        return verify_manifest(folder)
    # Without a manifest, missing and truncated files are found. A bit that was flipped within a tensor is not.
    for name in RESUME_FILES:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for path in sorted(folder.rglob("*")):
        if wrong := _check_format(path):
            return f"{path.relative_to(folder)} {wrong}"
    return None


def _verify_entry(folder: Path, name: str, entry: Entry) -> str | None:
    """Return what is wrong with the file that `entry` describes, or None."""
    path = folder / name
    # A checkpoint may come from anywhere: its manifest must not make us read other files.
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        return "lies outside of the checkpoint"
    try:
        if not path.is_file():
            return "is missing"
        # The size is compared first, so that most damage is found without reading the file.
        if (size := path.stat().st_size) != entry.size:
            return f"is damaged: {size} bytes in place of {entry.size}"
        if sha256(path) != entry.sha256:
            return f"is damaged: its SHA-256 is not that of {MANIFEST}"
    except (OSError, ValueError) as error:
        # A name of a manifest may be no path at all, such as one with a null character.
        return _cannot_be_read(error)
    return None


def _cannot_be_read(error: Exception) -> str:
    return f"cannot be read ({(error.strerror if isinstance(error, OSError) else None) or error})"


def _check_format(path: Path) -> str | None:
    """Return what is wrong with a file that can be seen without knowing what it is for; None if nothing is."""
    try:
        check_is_file(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
        return find_damage(path) if path.suffix == ".safetensors" else None
    except OSError as error:
        return _cannot_be_read(error)
    except (ValueError, RecursionError) as error:
        return f"is damaged ({type(error).__name__})"


def size_of(folder: Path) -> int:
    """Return the size in bytes of all files under `folder`; 0 if it is missing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
