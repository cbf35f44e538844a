"""The metrics of a run in Weights & Biases, which never stops the training and never asks anything."""

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, urlopen

from pusht_act.config.schema import Config
from pusht_act.runs.run_dir import RunDir

log = logging.getLogger(__name__)

JSON = {"Content-Type": "application/json"}
WANDB_INIT_S, WANDB_FINISH_S = 30.0, 60.0
"""Seconds that W&B's server gets to accept a run, and to receive the rest of its data at the end."""


class WandbLogger:
    """A W&B run, kept offline where its server cannot be reached.

    W&B writes a run to a local file first and uploads that from another process. So a server that fails, is slow or
    goes away does not delay a step, and what was not uploaded in the end stays in that file. Its rows are the lines of
    metrics.jsonl; steps that a resumed run repeats are there twice.
    """

    def __init__(self, config: Config, run: RunDir, run_id: str | None) -> None:
        # W&B's banner says nothing that is not logged below. Its crash reports go to another host and warn of every
        # attempt where there is no network.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run_id, self._failed = run_id, True
        mode = wandb_mode(config)
        reason = _why_unreachable(wandb.api) if mode == "online" else f"its mode is {mode}"
        options = _init_options(config, run, run_id)
        run.path.mkdir(parents=True, exist_ok=True)

        # Try the server only if it answered just now, and fall back to a file that can be uploaded later.
        if reason is None:
            try:
                self._run = wandb.init(**options, mode="online")
            except Exception as error:  # such as a login that the server does not know
                reason = _first_words(error)
        if reason is not None:
            log.info("W&B: %s, so the run is kept here; `wandb sync %s/wandb/offline-run-*` sends it", reason, run.path)
            try:
                self._run = wandb.init(**options, mode="offline")
            except Exception as error:  # such as W&B's own process that does not start
                log.warning("W&B: %s: the run continues without it, metrics.jsonl has all of it", _first_words(error))
                return
        self.run_id, self._failed = self._run.id, False
        self._files = Path(self._run.settings.sync_dir)

        # W&B's own step may only increase, but a background evaluation is logged after later steps.
        for group in ("train", "eval", "rollback"):
            self._run.define_metric(f"{group}/*", step_metric="step")

    def log(self, values: dict[str, Any], step: int) -> None:  # noqa: D102
        if not self._failed:
            self._try(lambda: self._run.log({"step": step, **values}))

    def close(self, failed: bool) -> None:  # noqa: D102
        if not self._failed:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], None]) -> None:
        """Run `call`. The first one that fails is a warning, and W&B is not called again."""
        try:
            call()
        except Exception as error:  # wandb's own, and those of the process it talks to
            self._failed = True
            log.warning(
                "W&B: %s: what it did not get is in %s (`wandb sync` sends that), metrics.jsonl has all of it",
                _first_words(error), self._files,
            )  # fmt: skip


def wandb_mode(config: Config) -> str:
    """Return online, offline or disabled: the option, else the environment's WANDB_MODE, else online."""
    return config.wandb.mode or os.environ.get("WANDB_MODE") or "online"


def _init_options(config: Config, run: RunDir, run_id: str | None) -> dict[str, Any]:
    """Return the arguments of wandb.init, all but the mode."""
    import wandb

    return {
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


def _why_unreachable(api: Any) -> str | None:
    """Return why W&B's server cannot be used, or None. W&B's own attempts to connect take minutes to give up."""
    if not api.api_key:
        return "no login (`wandb login`)"
    url = urlsplit(api.settings("base_url"))
    # Through a proxy a direct connection proves nothing.
    if getproxies():
        return None
    try:
        # A server may accept a connection and say nothing, or answer only errors: wandb.init would wait for ever.
        query = Request(f"{url.geturl().rstrip('/')}/graphql", b'{"query": "{ __typename }"}', JSON)
        with urlopen(query, timeout=5):
            return None
    except HTTPError as error:
        # Any other status is an answer, such as that a login is needed.
        return f"{url.netloc} answers {error.code}" if error.code >= 500 else None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else f"{url.netloc} cannot be reached ({reason})"


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
