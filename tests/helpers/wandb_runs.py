"""W&B without an account: what it has written, read back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.apis import InternalApi
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined] # made as it is imported
from wandb.sdk.internal.datastore import DataStore

from pusht_act.runs.loggers import LoggerCollection
from pusht_act.runs.run_dir import RunDir
from tests.helpers.config import config


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log out of W&B, whoever runs the test, and ask for no mode."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    forget_settings(monkeypatch)
    yield
    wandb.teardown()


def forget_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have W&B read the environment again, which it does once a process."""
    wandb.teardown()
    monkeypatch.setattr(wandb, "api", InternalApi())


def records(path: Path) -> list[Record]:
    """Return what W&B would send."""
    wandb.teardown()  # its service writes the file a moment after the run's end
    store = DataStore()
    store.open_for_scan(str(path))  # type: ignore[no-untyped-call]
    return [Record.FromString(data) for data in iter(store.scan_data, None)]


def history(path: Path) -> list[dict[str, Any]]:
    """Return the metrics W&B would send, a row a call of `log`."""
    rows = [record.history for record in records(path) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def offline_runs(run: Path) -> list[Path]:
    """Return the files of the W&B runs that are kept in a run directory, oldest first."""
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def log_once(run: Path, *overrides: str) -> str | None:
    """Log a step to W&B and return the run's id there."""
    with LoggerCollection(config("wandb.enable=true", *overrides), RunDir(run), 0, None) as metrics:
        metrics.log("train", {"loss": 0.5}, 1)
    return metrics.wandb_run_id
