"""Resolve a job once: its validated configuration, the checkpoint that it starts from, its locked run directory.

Imports neither torch nor lerobot.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pusht_act.checkpoints.checkpoint import MODEL_DIR, Checkpoint, find_checkpoint, verify
from pusht_act.checkpoints.manifest import EVAL_FILES, sha256
from pusht_act.checkpoints.merge_config import blamed_on, inherit_choices, merge_checkpoint_config
from pusht_act.checkpoints.resume import (
    auto_resume_checkpoint,
    check_schedule,
    checkpoint_to_resume,
    resolve_run_dir,
)
from pusht_act.checkpoints.safe_loading import check_safe_to_load
from pusht_act.config.overrides import check_typed_values, is_output_dir_typed
from pusht_act.config.schema import TRAIN_MODES, Config, Mode
from pusht_act.config.validation import check_target, to_config
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import Lock, locked
from pusht_act.training.extensions import Extensions

if TYPE_CHECKING:
    from pusht_act.training.result import Report


@dataclass(frozen=True)
class ResolvedJob:
    """A job about which nothing is left to be decided."""

    config: Config
    """Validated; that of mode=resume and mode=eval is merged with the checkpoint's."""
    start: Checkpoint | None
    """The checkpoint that it continues or evaluates."""
    run: RunDir
    lock: Lock | None
    """Of the run directory, held; None in the modes that do not train."""
    overrides: list[str]
    """The command line that it came from."""
    choices: dict[str, str | None]
    """The chosen option of each configuration group."""
    report: "Report | None" = None
    """Told the evaluations in training, which it may end early."""
    extensions: Extensions = dataclasses.field(default_factory=Extensions)
    """A loss and transforms in place of the defaults."""

    @property
    def auto_resumes(self) -> bool:
        """Whether it continues the same job's work if there is any."""
        return self.config.mode in TRAIN_MODES and self.config.resume.auto


@contextmanager
def resolve(cfg: DictConfig, overrides: list[str], choices: dict[str, str | None]) -> Iterator[ResolvedJob]:
    """Decide all that a job needs, and hold the lock of its run directory if it trains.

    Its configuration is validated once: at once where it is complete, else when the checkpoint's is merged with it.
    """
    match cfg.mode:
        case Mode.eval:
            yield _resolve_evaluation(cfg, overrides, choices)
        case Mode.demos:
            config = to_config(cfg)
            yield ResolvedJob(config, None, RunDir(Path(config.output_dir)), None, overrides, choices)
        case _:
            complete = to_config(cfg) if cfg.mode in TRAIN_MODES else None
            if complete is None:
                check_typed_values(cfg, overrides)
            run = RunDir(resolve_run_dir(cfg, overrides))
            # From here to the end of training no other process may choose a checkpoint of this run, or write one.
            with nullcontext() if cfg.print_lerobot_command else locked(run.path) as lock:
                config, start = _resolve_training(cfg, complete, run, overrides, choices)
                if cfg.mode is Mode.resume and start is not None:
                    choices = inherit_choices(choices, start)
                yield ResolvedJob(config, start, run, lock, overrides, choices)


def _resolve_evaluation(cfg: DictConfig, overrides: list[str], choices: dict[str, str | None]) -> ResolvedJob:
    check_typed_values(cfg, overrides)
    check_target(cfg.mode, cfg.checkpoint, None)
    checkpoint = _resolve_checkpoint(cfg.checkpoint, "checkpoint")
    # A model folder that is named is evaluated as it is; of a run or a step, what its own evaluations run.
    if Path(cfg.checkpoint).name != MODEL_DIR:
        checkpoint = checkpoint.evaluated
        check_safe_to_load(checkpoint.model_dir)
    with blamed_on(checkpoint, overrides):
        config = to_config(merge_checkpoint_config(cfg, checkpoint, overrides, choices, resume=False))
    run = Path(config.output_dir) if is_output_dir_typed(overrides) else checkpoint.run_dir
    if run is None:
        run = Path("outputs/evaluations") / _model_name(cfg.checkpoint, checkpoint)
    return ResolvedJob(config, checkpoint, RunDir(run), None, overrides, choices)


def _model_name(named: str, checkpoint: Checkpoint) -> str:
    """Return the name of a model that belongs to no run, with the beginning of its digest: there may be another one."""
    folder = checkpoint.directory if checkpoint.is_of_training else checkpoint.model_dir
    name = folder.name if Path(named).exists() else named.replace("/", "--")
    return f"{name}-{sha256(checkpoint.model_dir / 'model.safetensors')[:8]}"


def _resolve_training(
    cfg: DictConfig, complete: Config | None, run: RunDir, overrides: list[str], choices: dict[str, str | None]
) -> tuple[Config, Checkpoint | None]:
    """Return the configuration of a job that trains in `run`, and the checkpoint that it continues.

    `complete` is the configuration of mode=test or mode=full; mode=resume takes it from the checkpoint.
    """
    if complete is None:
        cfg.output_dir = str(run.path)
        checkpoint = checkpoint_to_resume(cfg, run.path)
        # First: a model alone, such as one of the Hub, has nothing to be resumed from.
        step = checkpoint.step
        check_safe_to_load(checkpoint.model_dir)
        with blamed_on(checkpoint, overrides):
            config = to_config(merge_checkpoint_config(cfg, checkpoint, overrides, choices, resume=True))
        if is_finished(checkpoint, config):
            raise UserError(f"steps={config.steps}: {checkpoint.directory} is at step {step} already; give more steps=")
        check_schedule(checkpoint, config, overrides)
        return config, checkpoint
    if name := complete.policy.get("pretrained_path"):
        complete.policy["pretrained_path"] = str(_resolve_checkpoint(str(name), "policy.pretrained_path").model_dir)
    if not complete.resume.auto or complete.print_lerobot_command:
        return complete, None
    start = auto_resume_checkpoint(complete, run)
    if start is not None:
        check_safe_to_load(start.model_dir)
    return complete, start


def _resolve_checkpoint(name: str, key: str) -> Checkpoint:
    """Return the checkpoint that option `key` names: a path, or else a model on the Hub."""
    # USER/NAME could be a relative path, too: what exists here comes first.
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).exists() or not looks_like_hub:
        checkpoint = find_checkpoint(name, key)
        verify(checkpoint, f"{key}={name}", EVAL_FILES)
    else:
        from pusht_act.checkpoints.hub import download

        checkpoint = Checkpoint(download(name, key))
    check_safe_to_load(checkpoint.model_dir)
    return checkpoint


def is_finished(checkpoint: Checkpoint, config: Config) -> bool:
    """Return whether `checkpoint` is the end of the run that `config` describes, its evaluations included."""
    return checkpoint.step >= config.steps and not checkpoint.pending
