"""Checkpoints in LeRobot's directory layout, safetensors and JSON only, each complete or not there at all.

<run>/checkpoints/
  005000/pretrained_model/  config.json  model.safetensors  policy_{pre,post}processor*  train_config.json
                            pusht_act.json      our configuration and the group choices it was composed of
  005000/training_state/    optimizer, scheduler, random streams, step (LeRobot's files)
                            pusht_act.json      LoopState: what LeRobot does not keep
  last -> 005000            the newest
  best -> 005000            the best by evaluation
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lerobot.common.train_utils import (
    get_step_identifier,
    load_training_batch_size,
    load_training_num_processes,
    load_training_state,
    save_training_state,
)
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from safetensors import SafetensorError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pusht_act.policy import Processors
from pusht_act.run_dir import OURS, Checkpoint, RunDir


@dataclass
class LoopState:
    """The training loop's own state at a step, every piece of it by name."""

    step: int = 0
    sampler: dict[str, int] | None = None
    """SampleOrder.state_dict(); None after a checkpoint of stock LeRobot, which does not record it."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the metrics since the last line that was logged, and their number."""
    best: dict[str, Any] | None = None
    """The best evaluation so far: {"step": int, "score": [pc_success, avg_max_reward]}."""
    wandb_run_id: str | None = None


@dataclass(frozen=True)
class TrainingObjects:
    """What a checkpoint is written from and, all but the processors, loaded into."""

    policy: ACTPolicy
    processors: Processors
    optimizer: Optimizer
    scheduler: LRScheduler | None


def save(
    run: RunDir,
    objects: TrainingObjects,
    state: LoopState,
    train_config: TrainPipelineConfig,
    record: dict[str, Any],
) -> Checkpoint:
    """Write the checkpoint of `state.step` and point `last` at it; a crash leaves the old `last` and no half of one."""
    name = get_step_identifier(state.step, train_config.steps)
    final = run.checkpoints / name
    part = run.checkpoints / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    model, training = part / "pretrained_model", part / "training_state"
    model.mkdir(parents=True)
    objects.policy.save_pretrained(model)
    objects.processors.pre.save_pretrained(model)
    objects.processors.post.save_pretrained(model)
    train_config.save_pretrained(model)
    (model / OURS).write_text(json.dumps(record, indent=2))
    save_training_state(
        part,
        state.step,
        objects.optimizer,
        objects.scheduler,
        num_processes=1,
        batch_size=train_config.batch_size,
    )
    (training / OURS).write_text(json.dumps(asdict(state), indent=2))
    for path in [*part.rglob("*"), part]:
        _fsync(path)
    _replace(part, final)
    _fsync(run.checkpoints)
    link(run, "last", name)
    return Checkpoint(final / "pretrained_model")


def mark_best(run: RunDir, checkpoint: Checkpoint, previous: Path | None) -> None:
    """Point `best` at `checkpoint`; `previous`, if given, was kept for being best only and is removed."""
    link(run, "best", checkpoint.directory.name)
    if previous is not None and previous != checkpoint.directory:
        shutil.rmtree(previous)


def link(run: RunDir, name: str, target: str) -> None:
    """Switch the symbolic link `name` atomically."""
    new = run.checkpoints / f".{name}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(run.checkpoints / name)


def load(checkpoint: Checkpoint, objects: TrainingObjects) -> LoopState:
    """Load optimizer, scheduler and random streams in place, and return the loop's state.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        # A run begun without a schedule has none to load: a schedule given on resume starts afresh.
        scheduler = objects.scheduler if (checkpoint.training / "scheduler_state.json").exists() else None
        step, _, _ = load_training_state(checkpoint.directory, objects.optimizer, scheduler)
        path = checkpoint.training / OURS
        if path.exists():
            return LoopState(**json.loads(path.read_text()))
        train_config = json.loads((checkpoint.model / "train_config.json").read_text())
        return LoopState(step=step, wandb_run_id=(train_config.get("wandb") or {}).get("run_id"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint.training} is missing or damaged ({reason}): resume from another one") from error


def written_with(checkpoint: Checkpoint) -> tuple[int | None, int]:
    """(batch size, number of processes) that the checkpoint's steps were made with."""
    return load_training_batch_size(checkpoint.directory), load_training_num_processes(checkpoint.directory) or 1


def _replace(part: Path, final: Path) -> None:
    """Move `part` to `final`, which may exist when a run was resumed from an earlier step."""
    if not final.exists():
        part.rename(final)
        return
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    part.rename(final)
    shutil.rmtree(old)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
