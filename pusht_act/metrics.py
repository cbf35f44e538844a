"""Where metrics go: metrics.jsonl in the run directory, and W&B when it is enabled."""

import json
import logging
import math
import os
import socket
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import Tensor

from pusht_act.config import Config
from pusht_act.run_dir import RunDir

log = logging.getLogger(__name__)


class Window:
    """Means of a step's metrics since the last line; the sums stay on the device until somebody reads them."""

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self._sums: dict[str, Any] = dict(sums or {})

    def add(self, values: dict[str, Tensor | float]) -> None:
        """One step's values."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._sums["steps"] = self._sums.get("steps", 0) + 1

    def sums(self) -> dict[str, float]:
        """Python numbers, to be saved and given back to `Window`."""
        return {key: float(value) for key, value in self._sums.items()}

    def means(self) -> dict[str, float]:
        """The mean of each; empty before the first step."""
        sums = self.sums()
        steps = sums.pop("steps", 0)
        return {key: value / steps for key, value in sums.items()} if steps else {}

    def check_finite(self, step: int) -> None:
        """Stop before weights that have broken are logged as progress or saved.

        Raises:
            ValueError: the loss became NaN or infinite since the last check.
        """
        loss = self.means().get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} by step {step}: lower policy.optimizer_lr and go on with mode=resume from the "
                "last checkpoint, which is sound"
            )


class Sink(Protocol):
    """Somewhere metrics go."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take `values` of one step."""

    def close(self, failed: bool) -> None:
        """Finish writing; `failed`: the run ended in an exception."""


class JsonLines:
    """metrics.jsonl: one JSON object a line, {"step": 200, "train/loss": 0.61, ...}, each step's group once.

    The line of an evaluation in the background comes after those of later steps. What a full disk does not take is
    kept, and written when it does.
    """

    def __init__(self, path: Path, resumed_at: int, pending: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewind(path, resumed_at, pending)
        self._file = path.open("ab", buffering=0)  # a buffer that could not be written would be lost on closing
        self._unwritten = b""

    def log(self, values: dict[str, float], step: int) -> None:  # noqa: D102
        unwritten = self._unwritten
        self._unwritten += json.dumps({"step": step, **values}).encode() + b"\n"
        try:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not unwritten:
                log.warning("%s cannot be written (%s): its lines wait", self._file.name, error.strerror)

    def close(self, failed: bool = False) -> None:  # noqa: ARG002, D102
        try:
            self._file.write(self._unwritten)
        except OSError as error:
            log.warning("%s lacks its last lines (%s)", self._file.name, error.strerror)
        self._file.close()


def _rewind(path: Path, resumed_at: int, pending: int | None) -> None:
    """Drop what the resumed run writes again, lines past its step and the evaluation that is `pending`; torn ones too.

    That evaluation may have been logged between its run's last checkpoint and its end.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= resumed_at and not (values["step"] == pending and "eval/pc_success" in values):
                kept.append(line + "\n")
        except ValueError:
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(path)


class Wandb:
    """A W&B run; what keeps it from its server puts it offline, and never stops the training or asks anything.

    Its rows are the lines of metrics.jsonl; steps that a resumed run does again are there twice.
    """

    def __init__(self, config: Config, run: RunDir, run_id: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # its own banner; what matters is logged below
        import wandb

        mode = _wandb_mode(config)
        reason = _unreachable(wandb.api) if mode == "online" else f"its mode is {mode}"
        options: dict[str, Any] = {
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "name": config.job_name,
            "notes": config.wandb.notes,
            "dir": run.path,
            "id": run_id,
            "resume": "allow" if run_id else None,
            "config": {"policy": config.policy, "dataset": config.dataset, "env": config.env, "seed": config.seed,
                       "steps": config.steps, "batch_size": config.batch_size},
            "job_type": "train_eval",
            "save_code": False,
        }  # fmt: skip
        run.path.mkdir(parents=True, exist_ok=True)
        if reason is None:
            try:
                self._run = wandb.init(**options, mode="online")
            except wandb.Error as error:  # such as a login that the server does not know
                reason = " ".join(str(error).split())
        if reason is not None:
            log.info("W&B: %s, so the run is kept here; `wandb sync %s/wandb/offline-run-*` sends it", reason, run.path)
            self._run = wandb.init(**options, mode="offline")
        self.run_id: str = self._run.id
        # W&B's own step only goes up; an evaluation in the background comes after later steps.
        self._run.define_metric("train/*", step_metric="step")
        self._run.define_metric("eval/*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:  # noqa: D102
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:  # noqa: D102
        self._run.finish(exit_code=int(failed))


def _wandb_mode(config: Config) -> str:
    return config.wandb.mode or os.environ.get("WANDB_MODE") or "online"


def _unreachable(api: Any) -> str | None:
    """Why W&B cannot be logged to from here; its own attempts to connect take minutes to give up."""
    if not api.api_key:
        return "no login (`wandb login`)"
    url = urlsplit(api.settings("base_url"))
    if getproxies():
        return None
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        with socket.create_connection((url.hostname, port), timeout=5):
            return None
    except OSError as error:
        return f"{url.netloc} cannot be reached ({error})"


class Metrics:
    """All sinks of a run, as a context manager."""

    def __init__(
        self, config: Config, run: RunDir, resumed_at: int, wandb_run_id: str | None, pending: int | None = None
    ) -> None:
        self.wandb_run_id = wandb_run_id
        self._sinks: list[Sink] = [JsonLines(run.metrics, resumed_at, pending)]
        if config.wandb.enable and _wandb_mode(config) != "disabled":
            wandb = Wandb(config, run, wandb_run_id)
            self.wandb_run_id = wandb.run_id
            self._sinks.append(wandb)

    def log(self, group: str, values: dict[str, float], step: int) -> None:
        """`values` under `group/`, such as train/loss or eval/pc_success."""
        for sink in self._sinks:
            sink.log({f"{group}/{key}": value for key, value in values.items()}, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks:
            sink.close(failed=kind is not None)
