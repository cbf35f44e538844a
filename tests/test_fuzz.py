"""Damaged files of strangers: a checkpoint and a sweep's folder, one value or one file of which is wrong.

Each JSON value is replaced by every wrong type. Each file is cut, emptied, or replaced by what is no file. The job then
goes on as if nothing were wrong, or is refused in one line that names the file: no traceback, no wait without end.

A sample of the cases is tried; `pytest tests/test_fuzz.py --fuzz=3000` tries 3000 of them.
"""

import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pusht_act.config.errors import explain
from pusht_act.job import Result, run_job
from pusht_act.main import CONFIG_DIR, USER_ERRORS
from pusht_act.sweeps.resume import expand_resume_args
from pusht_act.sweeps.run_job import run_sweep_job
from pusht_act.sweeps.status import show_status

FIXTURES = Path(__file__).parent / "fixtures"
STEP = "checkpoints/000006/"
MODEL, STATE = f"{STEP}pretrained_model/", f"{STEP}training_state/"
WRONG: list[Any] = [None, True, 3, 0.5, "x", [], [[1]], {}, -1, 10**30, math.nan]


BRIEFLY = ("steps=7", "eval_freq=0", "train.compile=false")
"""A resume by one step, which takes no minute where the file asks for more."""


@dataclass(frozen=True)
class Case:
    """One damage to one file, and what is done with the folder then."""

    scene: str
    file: str
    damage: str
    keys: tuple[str | int, ...] = ()
    """The way to the value that is replaced."""
    value: Any = None

    def __str__(self) -> str:
        if self.damage != "value":
            return f"{self.scene} {self.file} {self.damage}"
        return f"{self.scene} {self.file} {'.'.join(map(str, self.keys))}={json.dumps(self.value)}"


def values(content: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield each value in JSON, itself and those within, with the way to it."""
    yield keys, content
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from values(value, (*keys, key))


def replaced(content: Any, keys: tuple[str | int, ...], value: Any) -> Any:
    if not keys:
        return value
    content = deepcopy(content)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return content


def read(path: Path) -> Any:
    """The JSON in a file: all of it, the header of a safetensors file, or a list of lines."""
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def write(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        was = path.read_bytes()
        header = json.dumps(content).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + was[8 + struct.unpack("<Q", was[:8])[0] :])
    elif path.suffix == ".jsonl" and isinstance(content, list):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(json.dumps(content))


def no_file(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0" + path.read_bytes()),
    "deep": lambda path: path.write_text("[" * 100_000),
    "long": lambda path: path.write_text('"' + "{x: " * 50_000 + '"'),
    "a pipe": no_file(os.mkfifo),
    "a folder": no_file(Path.mkdir),
    "a link to nowhere": no_file(lambda path: path.symlink_to("nowhere")),
    "a link to an endless file": no_file(lambda path: path.symlink_to("/dev/zero")),
}


# What is done with a folder after one of its files was damaged.


def evaluate(folder: Path) -> None:
    job("mode=eval", f"checkpoint={folder}", "eval.n_episodes=1", "eval.batch_size=1")


def resume(folder: Path) -> None:
    job(
        "mode=resume", f"resume.path={folder}/{STEP}", "output_dir=out", "steps=7", "eval_freq=0", "train.compile=false"
    )


def resume_stock(folder: Path) -> None:
    for name in (MODEL, STATE):
        (folder / name / "pusht_act.json").unlink()
    resume(folder)


def go_on(folder: Path) -> None:
    job("mode=resume", f"output_dir={folder}", *BRIEFLY)


def show(folder: Path) -> None:
    show_status(folder, 0)


def resume_sweep(folder: Path) -> None:
    cfg, _ = composed("mode=test")
    overrides = expand_resume_args(["-m", f"sweep.resume={folder}"])
    for number in (0, 1):
        grid = [*overrides[1:-2], f"seed={number + 1}"]
        of_job = OmegaConf.create({"sweep": {"dir": str(folder)}, "job": {"num": number}})
        of_job.overrides = {
            "task": [override.replace("=true", "=True").replace("=false", "=False") for override in grid]
        }
        of_job.runtime = {"output_dir": str(folder / str(number))}
        run_sweep_job(cfg.copy(), of_job, lambda *_: Result(folder), lambda error: explain(error, CONFIG_DIR))


MODEL_FILES = tuple(
    MODEL + name for name in (
        "config.json", "pusht_act.json", "policy_preprocessor.json", "policy_postprocessor.json", "model.safetensors",
        "policy_preprocessor_step_3_normalizer_processor.safetensors",
    )
)  # fmt: skip
STATE_FILES = tuple(
    STATE + name for name in (
        "training_step.json", "optimizer_param_groups.json", "pusht_act.json", "rng_state.safetensors",
        "optimizer_state.safetensors",
    )
)  # fmt: skip
SCENES: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "eval": (evaluate, "run", (*MODEL_FILES, f"{STATE}training_step.json")),
    "resume": (resume, "run", (*MODEL_FILES, *STATE_FILES, f"{STEP}manifest.json")),
    "resume stock's": (resume_stock, "run", (f"{MODEL}train_config.json",)),
    "go on": (go_on, "run", ("metrics.jsonl", f"{STATE}pusht_act.json", "config.yaml", "runs.jsonl")),
    "status": (show, "run", ("metrics.jsonl", "runs.jsonl", f"{STATE}pusht_act.json", "config.yaml")),
    "status of a sweep": (
        show, "sweep", ("sweep.json", "jobs/0.json", "jobs/1.json", "1/metrics.jsonl", "1/lock", "1/config.yaml")
    ),
    "sweep.resume": (resume_sweep, "sweep", ("sweep.json", "jobs/0.json", "jobs/1.json")),
}  # fmt: skip


def cases() -> list[Case]:
    found = []
    for scene, (_, source, files) in SCENES.items():
        for file in files:
            found += [Case(scene, file, damage) for damage in DAMAGE]
            if file.endswith(".yaml"):
                continue
            for keys, value in values(read(FIXTURES / source / file)):
                for wrong in WRONG:
                    if type(wrong) is not type(value) or (not wrong and value) or wrong in (-1, 10**30):
                        found.append(Case(scene, file, "value", keys, wrong))
    return found


def sample(count: int) -> list[Case]:
    """The same cases each time, as many of each file as there are."""
    by_file: dict[tuple[str, str], list[Case]] = {}
    for case in cases():
        by_file.setdefault((case.scene, case.file), []).append(case)
    for some in by_file.values():
        random.Random(0).shuffle(some)
    turns = zip_longest(*by_file.values())
    return [case for turn in turns for case in turn if case is not None][:count]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", sample(metafunc.config.getoption("fuzz")), ids=str)


COMPOSED: dict[str, Any] = {}


def composed(mode: str) -> tuple[DictConfig, Any]:
    """The configuration of a mode, composed once: that takes longer than a tiny job."""
    if mode not in COMPOSED:
        with initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
            COMPOSED[mode] = compose("config", [mode], return_hydra_config=True)
    HydraConfig.instance().set_config(COMPOSED[mode])
    cfg = COMPOSED[mode].copy()
    OmegaConf.set_struct(cfg, False)
    return cfg, cfg.pop("hydra")


def job(*overrides: str) -> None:
    overrides = (*overrides, "eval.n_videos=0", "eval.workers=1")
    cfg, node = composed(overrides[0])
    cfg.wandb.enable = False
    for override in overrides[1:]:
        key, _, value = override.partition("=")
        OmegaConf.update(cfg, key, int(value) if value.isdigit() else value)
    run_job(cfg, [*overrides], dict(node.runtime.choices))


@pytest.mark.timeout(60)
def test_a_damaged_file_is_named_or_does_no_harm(case: Case, in_tmp: Path) -> None:
    attempt(case, in_tmp)


def attempt(case: Case, tmp: Path) -> None:
    run, source, _ = SCENES[case.scene]
    folder = Path(shutil.copytree(FIXTURES / source, tmp / "folder", symlinks=True))
    path = folder / case.file
    if source == "run" and path.name != "manifest.json":
        (folder / STEP / "manifest.json").unlink()
    if case.damage == "value":
        write(path, replaced(read(path), case.keys, case.value))
    else:
        DAMAGE[case.damage](path)
    try:
        run(folder)
    except USER_ERRORS as error:
        line = explain(error, CONFIG_DIR)
        assert "\n" not in line
        assert len(line) < 1500
        assert path.name in line, line
