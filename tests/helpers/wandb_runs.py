"""W&B without an account: what it has written, read back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import wandb
from wandb.apis import InternalApi
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined] # made as it is imported
from wandb.sdk.internal.datastore import DataStore

from pusht_act.config.schema import Config
from pusht_act.config.validation import to_config
from pusht_act.main import CONFIG_DIR


def config(*overrides: str) -> Config:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        return to_config(hydra.compose("config", list(overrides)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not logged in to W&B, whoever runs the test, and no mode asked for."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    forget_settings(monkeypatch)
    yield
    wandb.teardown()


def forget_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B reads the environment once a process."""
    wandb.teardown()
    monkeypatch.setattr(wandb, "api", InternalApi())


def records(path: Path) -> list[Record]:
    """What W&B would send."""
    wandb.teardown()  # its service writes the file a moment after the run's end
    store = DataStore()
    store.open_for_scan(str(path))  # type: ignore[no-untyped-call]
    return [Record.FromString(data) for data in iter(store.scan_data, None)]


def history(path: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in records(path) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]
