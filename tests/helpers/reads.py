"""Which options a job reads: one that nobody reads has no effect."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import FrameType
from typing import Any

import pytest

from pusht_act.config import validation
from pusht_act.config.schema import Config

CHECKS = ("pusht_act.config", "pusht_act.checkpoints.merge_config", "draccus", "dataclasses", "copy", "omegaconf")
"""Modules that read every option, whatever becomes of it."""
APPLYING = ("_decode_optimizer", "_decode_scheduler", "resolve_device", "train_pipeline_config")
"""Functions of config/lerobot.py that hand on what they read."""


class _Section(dict[str, Any]):
    """A section of LeRobot's that tells which of its keys are read."""

    def __new__(cls, values: Any, tell: Callable[[str], None] | None = None) -> Any:
        # A copy, as dataclasses.asdict makes one, is a plain dict.
        return dict(values) if tell is None else super().__new__(cls)

    def __init__(self, values: Any, tell: Callable[[str], None]) -> None:
        super().__init__(values)
        self._tell = tell

    def __getitem__(self, key: str) -> Any:
        self._tell(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._tell(key)
        return super().get(key, default)


@contextmanager
def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Yield the dotted keys of the options that are read within the block, by what is not a check."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.envs.configs import PushtEnv
    from lerobot.optim import AdamWConfig, LRSchedulerConfig
    from lerobot.policies.act.configuration_act import ACTConfig

    keys: set[str] = set()
    sections = {each.name: each.type for each in fields(Config) if is_dataclass(each.type)}
    lerobots = {"policy": ACTConfig, "env": PushtEnv, "dataset": DatasetConfig, "optimizer": AdamWConfig}
    lerobots["scheduler"] = LRSchedulerConfig.get_choice_class("cosine_decay_with_warmup")
    with monkeypatch.context() as patched:
        for name, cls in {"": Config, **sections, **lerobots}.items():
            _watch(patched, cls, name, keys)

        def to_config(cfg: Any) -> Config:
            config = validation.to_config(cfg)
            for name in ("policy", "env", "dataset", "optimizer", "scheduler"):
                tell = partial(_note, keys, name)
                setattr(config, name, _Section(getattr(config, name), tell))
            return config

        for module in ("pusht_act.resolve", "pusht_act.main"):
            patched.setattr(importlib.import_module(module), "to_config", to_config)
        yield keys


def _watch(patched: pytest.MonkeyPatch, cls: Any, section: str, keys: set[str]) -> None:
    names = {each.name for each in fields(cls)}

    def read(self: Any, name: str) -> Any:
        if name in names:
            _note(keys, section, name)
        return object.__getattribute__(self, name)

    patched.setattr(cls, "__getattribute__", read, raising=False)


def _note(keys: set[str], section: str, name: str) -> None:
    """Note that the caller's caller reads an option, unless that is a check."""
    frame: FrameType | None = sys._getframe(2)
    assert frame is not None
    is_whole = frame.f_globals["__name__"] == "dataclasses"
    while frame is not None and frame.f_globals["__name__"] == "dataclasses":
        frame = frame.f_back
    assert frame is not None
    module, function = frame.f_globals["__name__"], frame.f_code.co_name
    # A section is read as a whole to be written down, but LeRobot hands its optimizer's to torch so.
    is_check = not module.startswith("lerobot.optim") if is_whole else module.startswith(CHECKS)
    if function in APPLYING or not (is_check or function == "__post_init__"):
        keys.add(f"{section}.{name}".lstrip("."))
