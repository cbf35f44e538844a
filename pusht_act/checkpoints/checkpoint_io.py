"""Checkpoints in LeRobot's directory layout, safetensors and JSON only, each complete or not there at all.

<run>/checkpoints/
  005000/pretrained_model/  config.json  model.safetensors  policy_{pre,post}processor*  train_config.json
                            pusht_act.json      our configuration and the group choices it was composed of
  005000/training_state/    optimizer, scheduler, random streams, step (LeRobot's files)
                            rng_state_1.safetensors ...    the random streams of further processes
                            pusht_act.json      TrainerState: what LeRobot does not keep
  005000/manifest.json      size and SHA-256 of every file above (integrity.py)
  last -> 005000            the newest
  best -> 005000            the best by evaluation
"""

import copy
import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lerobot.common.train_utils import (
    get_step_identifier,
    load_training_batch_size,
    load_training_num_processes,
    load_training_state,
    save_training_step,
)
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim.optimizers import save_optimizer_state
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.utils.constants import RNG_STATE, SCHEDULER_STATE
from lerobot.utils.io_utils import write_json
from lerobot.utils.random_utils import deserialize_rng_state, serialize_rng_state
from lerobot.utils.utils import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.manifest import size_of, write_manifest
from pusht_act.checkpoints.retention import mark_deleted, remove_temp_files, resolve_symlink, set_symlink
from pusht_act.config.schema import METADATA_FILE
from pusht_act.policy.act import Processors
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.distributed import gather_to_main
from pusht_act.runtime.errors import UserError

MARGIN = 1_000_000
"""Bytes of a checkpoint beside its tensors, generously."""


@dataclass
class TrainerState:
    """The training loop's own state at a step, every piece of it by name."""

    step: int = 0
    sampler: dict[str, int] | None = None
    """EpisodeSampler.state_dict(); None after a checkpoint of stock LeRobot, which does not record it."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the metrics since the last line that was logged, and their number."""
    skipped: int = 0
    """How many steps were skipped since their loss or gradient was not finite, after the last roll-back."""
    rollbacks: int = 0
    """How many times training diverged and went back to a checkpoint; each changes the order of the data."""
    best: dict[str, Any] | None = None
    """The best evaluation so far: {"step": int, "score": [pc_success, avg_max_reward]}."""
    pending: int | None = None
    """The step whose evaluation is under way."""
    spare: list[int] = field(default_factory=list)
    """Checkpoints written for their evaluation alone, or where a signal stopped the run; each goes at a later save, the
    best one excepted and that of `pending`."""
    wandb_run_id: str | None = None


@dataclass(frozen=True)
class TrainComponents:
    """What a checkpoint is written from and, all but the processors, loaded into."""

    policy: ACTPolicy
    processors: Processors
    optimizer: Optimizer
    scheduler: LRScheduler | None


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint has of the moment it was taken."""

    objects: TrainComponents
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    random: list[dict[str, Tensor]]
    """The states of each process's random streams, as LeRobot writes them."""
    state: TrainerState


def snapshot(objects: TrainComponents, state: TrainerState, apart: bool) -> Snapshot:
    """The present moment; `apart`: copied to the host's memory, so that training can go on while it is written.

    The processors are not copied: those of `objects` must not be the training's.
    """
    policy, optimizer = objects.policy, objects.optimizer.state_dict()
    if apart:
        policy = copy.deepcopy(policy).to("cpu")
        moments = {
            index: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
            for index, values in optimizer["state"].items()
        }
        optimizer = {"state": moments, "param_groups": copy.deepcopy(optimizer["param_groups"])}
    return Snapshot(
        replace(objects, policy=policy),
        optimizer,
        copy.deepcopy(objects.scheduler.state_dict()) if objects.scheduler is not None else None,
        rng_states(),
        copy.deepcopy(state),
    )


def rng_states() -> list[dict[str, Tensor]]:
    """Return the states of every rank's random number generators on rank 0; the other ranks hand theirs in.

    A collective: all ranks call it.
    """
    return gather_to_main(flatten_dict(serialize_rng_state()))


def save(
    run: RunDir,
    snapshot: Snapshot,
    train_config: TrainPipelineConfig,
    record: dict[str, Any],
) -> Checkpoint:
    """Write the checkpoint of `snapshot` and point `last` at it; a crash leaves the old `last` and no half of one.

    Raises:
        OSError: there is no room for it or it cannot be written; what was there before is as it was.
    """
    name = get_step_identifier(snapshot.state.step, train_config.steps)
    final = run.checkpoints / name
    part = run.checkpoints / f".{name}.part"
    needed = 0
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_temp_files(run)
        needed = _bytes_needed(run, snapshot.objects.policy)
        if needed > shutil.disk_usage(run.checkpoints).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(part, snapshot, train_config, record)
        _replace(part, final)
        _fsync(run.checkpoints)
        set_symlink(run, "last", name)
        _fsync(run.checkpoints)  # before others are removed
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(_cannot_save(final, error, needed)) from error
    return Checkpoint(final / "pretrained_model")


def _write(
    part: Path,
    snapshot: Snapshot,
    train_config: TrainPipelineConfig,
    record: dict[str, Any],
) -> None:
    """All files of a checkpoint, on the disk when this returns."""
    model, training = part / "pretrained_model", part / "training_state"
    objects, state = snapshot.objects, snapshot.state
    model.mkdir(parents=True)
    training.mkdir()
    objects.policy.save_pretrained(model)
    objects.processors.pre.save_pretrained(model)
    objects.processors.post.save_pretrained(model)
    train_config.save_pretrained(model)
    (model / METADATA_FILE).write_text(json.dumps(record, indent=2))
    # LeRobot's `save_training_state`, of the snapshot in place of the present.
    save_training_step(state.step, training, num_processes=1, batch_size=train_config.batch_size)
    for process, streams in enumerate(snapshot.random):
        save_file(streams, training / _random_of(process))
    save_optimizer_state(objects.optimizer, training, optim_state_dict=snapshot.optimizer)
    if snapshot.scheduler is not None:
        write_json(snapshot.scheduler, training / SCHEDULER_STATE)
    (training / METADATA_FILE).write_text(json.dumps(asdict(state), indent=2))
    write_manifest(part)
    for path in [*part.rglob("*"), part]:
        _fsync(path)


def _bytes_needed(run: RunDir, policy: ACTPolicy) -> int:
    """What a checkpoint takes: as much as the last one, and no less than weights and the optimizer's two moments."""
    weights: int = sum(parameter.nbytes for parameter in policy.parameters())
    last = resolve_symlink(run, "last")
    return max(3 * weights, size_of(last) if last is not None else 0) + MARGIN


def _cannot_save(final: Path, error: Exception, needed: int) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
    try:
        free = f"{shutil.disk_usage(final.parent).free / 1e6:.1f} MB are free"
    except OSError:
        free = "its folder is not there"
    takes = f", a checkpoint takes {needed / 1e6:.1f} MB" if needed else ""
    return f"{final} cannot be saved ({reason}): {free}{takes}; make room or see that the folder can be written to"


def load(checkpoint: Checkpoint, objects: TrainComponents) -> TrainerState:
    """Load optimizer, scheduler and random streams in place, and return the loop's state.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        # A run begun without a schedule has none to load: a schedule given on resume starts afresh.
        scheduler = objects.scheduler if (checkpoint.training_dir / "scheduler_state.json").exists() else None
        step, _, _ = load_training_state(checkpoint.directory, objects.optimizer, scheduler)
        path = checkpoint.training_dir / METADATA_FILE
        if path.exists():
            return TrainerState(**json.loads(path.read_text()))
        train_config = json.loads((checkpoint.model_dir / "train_config.json").read_text())
        return TrainerState(step=step, wandb_run_id=(train_config.get("wandb") or {}).get("run_id"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint.training_dir} is missing or damaged ({reason}): resume from another one"
        ) from error


def load_rng_state(checkpoint: Checkpoint, process: int) -> bool:
    """Load the random streams that `process`, not the first, had; False where the checkpoint has none of it.

    Raises:
        UserError: their file is damaged.
    """
    path = checkpoint.training_dir / _random_of(process)
    if not path.exists():
        return False
    try:
        deserialize_rng_state(unflatten_dict(load_file(path)))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}): resume from another checkpoint") from error
    return True


def saved_world_size(checkpoint: Checkpoint) -> int:
    """How many processes have their random streams in it."""
    return len(list(checkpoint.training_dir.glob(f"{Path(RNG_STATE).stem}*")))


def _random_of(process: int) -> str:
    """The file's name: LeRobot's for the first process, which is all that stock LeRobot reads."""
    name = Path(RNG_STATE)
    return f"{name.stem}_{process}{name.suffix}" if process else name.name


def saved_batch_size_and_world(checkpoint: Checkpoint) -> tuple[int | None, int]:
    """(batch size, number of processes) that the checkpoint's steps were made with."""
    return load_training_batch_size(checkpoint.directory), load_training_num_processes(checkpoint.directory) or 1


def _replace(part: Path, final: Path) -> None:
    """Move `part` to `final`, which may exist when a run was resumed from an earlier step."""
    old = mark_deleted(final) if os.path.lexists(final) else None
    try:
        part.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
