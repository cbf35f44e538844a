"""Where metrics go: metrics.jsonl in the run directory, and W&B when it is enabled."""

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from pusht_act.config.schema import Config
from pusht_act.runs.run_dir import RunDir, parse_metrics
from pusht_act.runs.wandb_logger import open_wandb
from pusht_act.runtime.atomic import write_text
from pusht_act.runtime.stored import read_text

log = logging.getLogger(__name__)


class Logger(Protocol):
    """A destination of metrics."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log `values` of one step."""

    def close(self, failed: bool) -> None:
        """Finish writing; `failed`: the run ended in an exception."""


class JsonlLogger:
    """Writes metrics.jsonl: one JSON object a line, {"step": 200, "train/loss": 0.61, ..., "time": 1767225600.123}.

    train/*      Trainer.log_metrics: the loss and its parts, the gradient's norm, the learning rate, times
    eval/*       Evaluation.metrics of the environment; eval/loss is the validation loss
    rollback/*   a roll-back after training diverged
    time         when the line was logged, in seconds since the epoch; elapsed_s: training time until then; device

    Each step has one line for each group of metrics. The line of a background evaluation comes after those of later
    steps. Lines that a full disk does not take are kept, and written as soon as there is room.
    """

    def __init__(self, path: Path, resumed_at: int, pending: Collection[int] = (), rollbacks: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewind(path, resumed_at, pending, rollbacks)
        # Unbuffered: a buffer that could not be written would be lost when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def log(self, values: dict[str, Any], step: int) -> None:  # noqa: D102
        unwritten = self._unwritten
        line = {"step": step, **values, "time": round(time.time(), 3)}
        self._unwritten += json.dumps(line).encode() + b"\n"
        # write() may take only a part, and the rest begins the next line's write.
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


def _rewind(path: Path, resumed_at: int, pending: Collection[int], rollbacks: int) -> None:
    """Drop the lines that the resumed run will write again, and those that a crash has torn.

    Args:
        path: The file; it may be missing.
        resumed_at: The step of the checkpoint. Lines of later steps go.
        pending: Steps whose evaluations are repeated. They may have been logged after the checkpoint was written.
        rollbacks: How many roll-backs the checkpoint knows of. Later ones to this step may have been logged, too.
    """
    if not path.exists():
        return
    kept, foreign = [], 0
    for line in read_text(path, errors="replace").splitlines():
        values = parse_metrics(line)
        if values is None:
            # What is no JSON was torn by a crash in the middle of a write.
            foreign += (stays := _is_json(line))
        else:
            is_repeated = values["step"] in pending and "eval/pc_success" in values
            newer = values["step"] > resumed_at or values.get("rollback/number", 0) > rollbacks
            stays = not is_repeated and not newer
        if stays:
            kept.append(line + "\n")
    if foreign:
        log.warning("%s has %d lines that are no metrics of this run: they stay, and are not read", path, foreign)
    write_text(path, "".join(kept))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class LoggerCollection:
    """All loggers of a run, as a context manager."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        resumed_at: int,
        wandb_run_id: str | None,
        pending: Collection[int] = (),
        rollbacks: int = 0,
    ) -> None:
        self.context: Callable[[], dict[str, Any]] = dict
        """Returns what each line holds beside its group's values, such as elapsed_s."""
        self.wandb_run_id = wandb_run_id
        self._path = run.metrics
        self._loggers: list[Logger] = [JsonlLogger(self._path, resumed_at, pending, rollbacks)]
        self._wandb = open_wandb(config, run, wandb_run_id)
        if self._wandb is not None:
            # Where W&B could not be started at all, a later resume still finds the run by its former id.
            self.wandb_run_id = self._wandb.run_id
            self._loggers.append(self._wandb)
        self._logs_checkpoints = not config.wandb.disable_artifact

    def log(self, group: str, values: dict[str, float], step: int) -> None:
        """Log `values` as `group/NAME`, such as train/loss or eval/pc_success."""
        line = {f"{group}/{key}": value for key, value in values.items()} | self.context()
        for logger in self._loggers:
            logger.log(line, step)

    def log_videos(self, group: str, videos: Sequence[Path], film_strip: Path | None, step: int) -> None:
        """Send the videos of an evaluation and its film strip to W&B, if it is on."""
        if self._wandb is not None:
            self._wandb.log_videos(group, videos, film_strip, step)

    def log_checkpoint(self, model_dir: Path, step: int) -> None:
        """Send the weights and processors of a checkpoint to W&B, if it is on and takes artifacts."""
        if self._wandb is not None and self._logs_checkpoints:
            self._wandb.log_checkpoint(model_dir, step)

    def rewind(self, step: int, pending: Collection[int], number: int, diverged_at: int) -> None:
        """Drop the lines of steps after `step`, which are repeated, and log roll-back `number`."""
        # Only the file can be rewound: W&B keeps what it was sent.
        self._loggers[0].close(failed=False)
        self._loggers[0] = JsonlLogger(self._path, step, pending, number - 1)
        self.log("rollback", {"number": number, "diverged_at": diverged_at}, step)

    def __enter__(self) -> "LoggerCollection":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for logger in self._loggers:
            logger.close(failed=kind is not None)
