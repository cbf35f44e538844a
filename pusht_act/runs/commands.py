"""Commands to paste: quoted for Hydra and for a shell, and started as the present one was.

    record_command   KEY=VALUE ... -> what runs.jsonl, cards and evaluations keep, the same on every machine
    follow_up        KEY=VALUE ... -> what is printed to go on with: with torchrun, --config-dir, the program's path

Imports neither torch nor lerobot.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from pusht_act.config.overrides import override
from pusht_act.config.schema import CONFIG_DIR

PROGRAM = "pusht-act"
RENDEZVOUS_PORT = 29500


def record_command(overrides: list[str], functions: dict[str, Any] | None = None) -> str:
    """Return the command that composed the job, quoted for a shell; with `functions`, the call from Python."""
    return _call(overrides, functions) if functions else shlex.join([PROGRAM, *_flags(), *overrides])


def follow_up(overrides: list[str], functions: dict[str, Any] | None = None) -> str:
    """Return the command, or the call from Python, that is printed to go on with `overrides`.

    Args:
        overrides: KEY=VALUE as Hydra reads them; "-m" comes first in a sweep.
        functions: As for `record_command`.
    """
    if functions:
        return _call(overrides, functions)
    # These start no training in this process.
    launcher = _torchrun() if is_launched() and not {"-m", "mode=eval"} & {*overrides} else []
    first = ["-m"] if "-m" in overrides else []
    return shlex.join([*launcher, _program(), *first, *_flags(), *(each for each in overrides if each != "-m")])


def read_command(command: str) -> list[str]:
    """Return the KEY=VALUE of a command that `record_command` wrote."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    return [word for word in words[1:] if not word.startswith("-") and ("=" in word or word.startswith("~"))]


def follow_up_sweep(directory: Path, flags: list[str]) -> str:
    """Return the command that resumes the sweep in `directory`, which was started with `flags`."""
    return shlex.join([_program(), "-m", *flags, override("sweep.resume", str(directory))])


def resume_command(path: Path, steps: int, more: list[str] | None = None, functions: Any = None) -> str:
    """Return the command that resumes the run in `path` and trains to `steps`."""
    return follow_up(["mode=resume", override("output_dir", str(path)), f"steps={steps}", *(more or [])], functions)


def config_flags(node: Any) -> list[str]:
    """Return the flags that say where a configuration was composed from.

    Args:
        node: Hydra's own node of it; None: that is not known.
    """
    if node is None:
        return []
    flags = []
    for source in node.runtime.config_sources:
        path = Path(source.path.removeprefix("file://"))
        if source.provider == "command-line":
            flags += ["--config-dir", shown(path)]
        elif source.provider == "main" and path != Path(CONFIG_DIR):
            flags += ["--config-path", str(path)]
    name = OmegaConf.select(node, "job.config_name")
    return flags + (["--config-name", str(name)] if name not in (None, "config") else [])


def _flags() -> list[str]:
    return config_flags(HydraConfig.get() if HydraConfig.initialized() else None)


def is_launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def shown(path: Path) -> str:
    """Return `path` from the working directory if it lies below that."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _call(overrides: list[str], functions: dict[str, Any]) -> str:
    names = {key: name if isinstance(name, str) else f"[{', '.join(name)}]" for key, name in functions.items()}
    # Where it is pasted, the script's own functions go by their names alone.
    given = [f"{key}={name}".replace("__main__.", "") for key, name in names.items()]
    return f"pusht_act.run({', '.join([repr(overrides), *given])})"


def _program() -> str:
    """Return the name of the command, or its path where a shell does not find it by that."""
    typed = Path(sys.argv[0])
    # `uv run` adds the environment's programs to the path for as long as its command runs.
    is_found = shutil.which(PROGRAM) is not None and "UV" not in os.environ
    return PROGRAM if is_found or typed.name != PROGRAM or typed == Path(PROGRAM) else _local(typed)


def _local(path: Path) -> str:
    return shown(path.absolute())


def _torchrun() -> list[str]:
    """Return the words that start this program on as many machines and processes again."""
    program = Path(_program())
    words: list[str] = ["torchrun" if program == Path(PROGRAM) else str(program.with_name("torchrun"))]
    words += list(_nodes())
    return [*words, "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "--no-python"]


def _nodes() -> Iterator[str]:
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if machines == 1:
        yield "--standalone"
        return
    # To be given on each machine.
    yield from ("--nnodes", str(machines), "--rdzv-backend", "c10d")
    yield from ("--rdzv-endpoint", f"{os.environ['MASTER_ADDR']}:{RENDEZVOUS_PORT}")
