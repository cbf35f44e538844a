"""A run in Weights & Biases, which never stops the training and never asks anything.

train/*, eval/*, rollback/*           the lines of metrics.jsonl
eval/video, eval/film_strip           of the evaluations in training
test/*                                mode=eval of one of the run's checkpoints
model-RUN_ID, an artifact             a version for each checkpoint of save_freq, with the alias step-N
config                                the whole configuration, and what started the run last (runs.jsonl)
"""

import logging
import os
import shlex
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, urlopen

from pusht_act.config.schema import Config, Mode, to_dict
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
            # A resumed run has several parts. Without --append each would take the place of the one before.
            log.info(
                "W&B: %s, so the run is kept here; `wandb sync --append %s/wandb/offline-run-*` sends it",
                reason, shlex.quote(str(run.path)),
            )  # fmt: skip
            try:
                self._run = wandb.init(**options, mode="offline")
            except Exception as error:  # such as W&B's own process that does not start
                log.warning("W&B: %s: the run continues without it, metrics.jsonl has all of it", _first_words(error))
                return
        self.run_id, self._failed = self._run.id, False
        self._files = Path(self._run.settings.sync_dir)
        if reason is None:
            log.info("W&B: %s", self._run.url)

        # W&B's own step may only increase, but a background evaluation is logged after later steps.
        for group in ("train", "eval", "rollback", "test"):
            self._run.define_metric(f"{group}/*", step_metric="step")

    def log(self, values: dict[str, Any], step: int) -> None:  # noqa: D102
        if not self._failed:
            self._try(lambda: self._run.log({"step": step, **values}))

    def log_videos(self, group: str, videos: Sequence[Path], film_strip: Path | None, step: int) -> None:
        """Log the videos of an evaluation and its film strip as GROUP/video and GROUP/film_strip."""
        from wandb import Image, Video

        media: dict[str, Any] = {}
        if videos:
            media[f"{group}/video"] = [Video(str(path), format="mp4") for path in videos]
        if film_strip is not None:
            media[f"{group}/film_strip"] = Image(str(film_strip))
        if media:
            self.log(media, step)

    def log_checkpoint(self, model_dir: Path, step: int) -> None:
        """Upload the folder of a checkpoint's weights as a version of the run's model artifact."""
        if self._failed:
            return
        from wandb import Artifact

        artifact = Artifact(f"model-{self.run_id}", type="model", metadata={"step": step})
        self._try(lambda: artifact.add_dir(str(model_dir)))
        if not self._failed:
            self._try(lambda: self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"]))

    def close(self, failed: bool) -> None:  # noqa: D102
        if not self._failed:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], object]) -> None:
        """Run `call`. The first one that fails is a warning, and W&B is not called again."""
        try:
            call()
        except Exception as error:  # wandb's own, and those of the process it talks to
            self._failed = True
            log.warning(
                "W&B: %s: what it did not get is in %s (`wandb sync` sends that), metrics.jsonl has all of it",
                _first_words(error), self._files,
            )  # fmt: skip


def open_wandb(config: Config, run: RunDir, run_id: str | None) -> WandbLogger | None:
    """Open the W&B run of a job, if W&B is enabled.

    Args:
        config: The job's.
        run: Where W&B keeps its files.
        run_id: The W&B run to continue; wandb.run_id comes before it, and with neither the run is a new one.
    """
    is_on = config.wandb.enable and wandb_mode(config) != "disabled"
    return WandbLogger(config, run, config.wandb.run_id or run_id) if is_on else None


def wandb_mode(config: Config) -> str:
    """Return online, offline or disabled: the option, else the environment's WANDB_MODE, else online."""
    return config.wandb.mode or os.environ.get("WANDB_MODE") or "online"


def _init_options(config: Config, run: RunDir, run_id: str | None) -> dict[str, Any]:
    """Return the arguments of wandb.init, all but the mode."""
    import wandb

    options = config.wandb
    described = {
        "project": options.project,
        "entity": options.entity,
        "name": (options.name or config.job_name)[:128],
        "group": options.group,
        "notes": options.notes,
        "tags": [*(_tags(config) if options.add_tags else []), *options.tags],
        "config": {**to_dict(config), "started": run.last_start()},
        "job_type": "train_eval",
    }
    # What evaluates a checkpoint of a run adds to the run, and describes only one of its own.
    if config.mode is Mode.eval and run_id is not None:
        described = {"project": options.project, "entity": options.entity}
    return {
        **described,
        "dir": run.path,
        "id": run_id,
        "resume": "allow" if run_id else None,
        "save_code": False,
        "settings": wandb.Settings(
            init_timeout=WANDB_INIT_S, finish_timeout=WANDB_FINISH_S, finish_timeout_raises=True
        ),
    }


def _tags(config: Config) -> list[str]:
    """Return LeRobot's tags; W&B takes 64 characters of each."""
    tags = [f"policy:{config.policy['type']}", f"seed:{config.seed}", f"dataset:{config.dataset['repo_id']}"]
    return [tag[:64] for tag in (*tags, f"env:{config.env['type']}")]


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
