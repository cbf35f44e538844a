"""Where metrics go: metrics.jsonl in the run directory, and W&B when it is enabled."""

import json
import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, urlopen

from pusht_act.config.schema import Config
from pusht_act.runs.run_dir import RunDir

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Somewhere metrics go."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take `values` of one step."""

    def close(self, failed: bool) -> None:
        """Finish writing; `failed`: the run ended in an exception."""


class JsonlLogger:
    """metrics.jsonl: one JSON object a line, {"step": 200, "train/loss": 0.61, ...}, each step's group once.

    The line of an evaluation in the background comes after those of later steps. What a full disk does not take is
    kept, and written when it does.
    """

    def __init__(self, path: Path, resumed_at: int, pending: int | None = None, rollbacks: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewind(path, resumed_at, pending, rollbacks)
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


def _rewind(path: Path, resumed_at: int, pending: int | None, rollbacks: int) -> None:
    """Drop what the resumed run writes again, lines past its step and the evaluation that is `pending`; torn ones too.

    That evaluation may have been logged between its run's last checkpoint and its end; so may roll-backs to this step.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            again = values["step"] == pending and "eval/pc_success" in values
            if values["step"] <= resumed_at and not again and values.get("rollback/number", 0) <= rollbacks:
                kept.append(line + "\n")
        except ValueError:
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(path)


JSON = {"Content-Type": "application/json"}
WANDB_INIT_S, WANDB_FINISH_S = 30.0, 60.0
"""Seconds that W&B's server gets to take a run in, and to take the rest of its data at the end."""


class Wandb:
    """A W&B run; what keeps it from its server puts it offline, and never stops the training or asks anything.

    W&B writes a run to a file of its own first and sends that from another process, so that a server that fails, is
    slow or goes away does not hold up a step; what was not sent in the end stays in that file.
    Its rows are the lines of metrics.jsonl; steps that a resumed run does again are there twice.
    """

    def __init__(self, config: Config, run: RunDir, run_id: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # its own banner; what matters is logged below
        # Reports of its own faults to another host, which warn of each attempt where there is no network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run_id, self._failed = run_id, True

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
            "settings": wandb.Settings(
                init_timeout=WANDB_INIT_S, finish_timeout=WANDB_FINISH_S, finish_timeout_raises=True
            ),
        }  # fmt: skip
        run.path.mkdir(parents=True, exist_ok=True)
        if reason is None:
            try:
                self._run = wandb.init(**options, mode="online")
            except Exception as error:  # such as a login that the server does not know
                reason = _said_by(error)
        if reason is not None:
            log.info("W&B: %s, so the run is kept here; `wandb sync %s/wandb/offline-run-*` sends it", reason, run.path)
            try:
                self._run = wandb.init(**options, mode="offline")
            except Exception as error:  # such as W&B's own process that does not start
                log.warning("W&B: %s: the run goes on without it, metrics.jsonl has all of it", _said_by(error))
                return
        self.run_id, self._failed = self._run.id, False
        self._files = Path(self._run.settings.sync_dir)
        # W&B's own step only goes up; an evaluation in the background comes after later steps.
        for group in ("train", "eval", "rollback"):
            self._run.define_metric(f"{group}/*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:  # noqa: D102
        if not self._failed:
            self._try(lambda: self._run.log({"step": step, **values}))

    def close(self, failed: bool) -> None:  # noqa: D102
        if not self._failed:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], None]) -> None:
        """Do `call`, if that is possible; the first failure is a line, and the last thing W&B is asked for."""
        try:
            call()
        except Exception as error:  # wandb's own, and those of the process it talks to
            self._failed = True
            log.warning(
                "W&B: %s: what it did not get is in %s (`wandb sync` sends that), metrics.jsonl has all of it",
                _said_by(error), self._files,
            )  # fmt: skip


def _said_by(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
        # A server may take a connection and say nothing, or only errors: wandb.init would wait for it without an end.
        question = Request(f"{url.geturl().rstrip('/')}/graphql", b'{"query": "{ __typename }"}', JSON)
        with urlopen(question, timeout=5):
            return None
    except HTTPError as error:  # any other is an answer, such as that a login is needed
        return f"{url.netloc} answers {error.code}" if error.code >= 500 else None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else f"{url.netloc} cannot be reached ({reason})"


class Metrics:
    """All sinks of a run, as a context manager."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        resumed_at: int,
        wandb_run_id: str | None,
        pending: int | None = None,
        rollbacks: int = 0,
    ) -> None:
        self.wandb_run_id = wandb_run_id
        self._path = run.metrics
        self._sinks: list[Logger] = [JsonlLogger(self._path, resumed_at, pending, rollbacks)]
        if config.wandb.enable and _wandb_mode(config) != "disabled":
            wandb = Wandb(config, run, wandb_run_id)
            self.wandb_run_id = wandb.run_id
            self._sinks.append(wandb)

    def log(self, group: str, values: dict[str, float], step: int) -> None:
        """`values` under `group/`, such as train/loss or eval/pc_success."""
        for sink in self._sinks:
            sink.log({f"{group}/{key}": value for key, value in values.items()}, step)

    def rolled_back(self, step: int, pending: int | None, number: int, diverged_at: int) -> None:
        """Drop the lines of steps that are done again after `step`, and log roll-back `number`."""
        self._sinks[0].close(failed=False)
        self._sinks[0] = JsonlLogger(self._path, step, pending, number - 1)
        self.log("rollback", {"number": number, "diverged_at": diverged_at}, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks:
            sink.close(failed=kind is not None)
