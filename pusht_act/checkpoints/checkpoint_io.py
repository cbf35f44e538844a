"""Save and load checkpoints in LeRobot's directory layout, in safetensors and JSON only.

<run>/checkpoints/
  005000/pretrained_model/  config.json  model.safetensors  policy_{pre,post}processor*  train_config.json
                            pusht_act.json      our configuration and the group choices that composed it
  005000/pretrained_model_ema/                  the same with the average of the weights, if ema.enable
  005000/training_state/    optimizer, scheduler, random states, step (LeRobot's files)
                            rng_state_1.safetensors ...    the random states of further ranks
                            pusht_act.json      TrainerState: what LeRobot does not save
  005000/manifest.json      size and SHA-256 of every file above (manifest.py)
  last -> 005000            the one saved last
  best -> 005000            the best by evaluation

A checkpoint is complete or not there at all: it is written under a hidden name, synced, and renamed.
"""

import copy
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lerobot.common.train_utils import (
    get_step_identifier,
    load_training_batch_size,
    load_training_num_processes,
    save_training_step,
)
from lerobot.configs.train import TrainPipelineConfig
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from lerobot.optim.schedulers import load_scheduler_state
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.utils.constants import OPTIMIZER_PARAM_GROUPS, OPTIMIZER_STATE, RNG_STATE, SCHEDULER_STATE
from lerobot.utils.io_utils import write_json
from lerobot.utils.random_utils import deserialize_rng_state, serialize_rng_state
from lerobot.utils.random_utils import load_rng_state as load_rng_state_file
from lerobot.utils.utils import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pusht_act.checkpoints.checkpoint import EMA_DIR, MODEL_DIR, Checkpoint
from pusht_act.checkpoints.manifest import MANIFEST, size_of, write_manifest
from pusht_act.checkpoints.retention import remove_temp_files, resolve_pointer, set_pointer
from pusht_act.checkpoints.state import TrainerState, read_trainer_state
from pusht_act.checkpoints.tensor_file import find_damage
from pusht_act.config.schema import METADATA_FILE
from pusht_act.policy.act import Processors
from pusht_act.policy.ema import EMA
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.atomic import fsync, part_path, replace_dir
from pusht_act.runtime.distributed import gather_to_main
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.stored import check_is_file, read_json

NON_TENSOR_BYTES = 1_000_000
"""What a checkpoint takes beside its tensors, generously."""


@dataclass(frozen=True)
class TrainComponents:
    """What a checkpoint is saved from. All but the processors is also loaded from it in place."""

    policy: ACTPolicy
    processors: Processors
    optimizer: Optimizer
    scheduler: LRScheduler | None
    ema: EMA | None = None
    """The average of the policy's weights, on rank 0, if ema.enable."""

    @property
    def policies(self) -> dict[str, ACTPolicy]:
        """The policies of a checkpoint, by their folder there."""
        return {MODEL_DIR: self.policy} | ({EMA_DIR: self.ema.policy} if self.ema is not None else {})

    @property
    def evaluated(self) -> str:
        """The folder of the policy that evaluations run."""
        return EMA_DIR if self.ema is not None and self.ema.is_evaluated else MODEL_DIR


@dataclass(frozen=True)
class Snapshot:
    """The state of training at one moment, from which a checkpoint is written."""

    components: TrainComponents
    policies: dict[str, ACTPolicy]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    random: list[dict[str, Tensor]]
    """The state of every rank's random generators, as LeRobot writes it."""
    state: TrainerState


def step_name(step: int, steps: int) -> str:
    """Return the folder's name of a checkpoint at `step` of a run of `steps`, such as 005000."""
    return str(get_step_identifier(step, steps))


def snapshot(components: TrainComponents, state: TrainerState, to_cpu: bool) -> Snapshot:
    """Return the present state of training.

    Args:
        components: What to save. The processors are not copied, so they must not be those that training uses.
        state: The state of the loop, which is copied.
        to_cpu: Copy weights and moments to the host's memory, so that training can continue while they are written.
    """
    policies, optimizer = components.policies, components.optimizer.state_dict()
    # state_dict() returns the live tensors, which the next step changes in place.
    if to_cpu:
        policies = {folder: copy.deepcopy(policy).to("cpu") for folder, policy in policies.items()}
        moments = {
            index: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
            for index, values in optimizer["state"].items()
        }
        optimizer = {"state": moments, "param_groups": copy.deepcopy(optimizer["param_groups"])}
    # The rest is small and copied in any case.
    return Snapshot(
        components,
        policies,
        optimizer,
        copy.deepcopy(components.scheduler.state_dict()) if components.scheduler is not None else None,
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
    """Write a checkpoint and point `last` at it. A crash leaves the former `last` and no part of the new one.

    Args:
        run: The run that it belongs to.
        snapshot: What to write.
        train_config: LeRobot's configuration of the run, which it saves beside the weights.
        record: Our configuration and its group choices, saved as pretrained_model/pusht_act.json.

    Returns:
        The checkpoint, complete and on the disk.

    Raises:
        OSError: there is no room for it or it cannot be written; what was there before is unchanged.
    """
    name = step_name(snapshot.state.step, train_config.steps)
    final = run.checkpoints / name
    part = part_path(final)
    needed = 0
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        # A save that was killed may have left files under the same name.
        remove_temp_files(run)
        # Refuse before anything is written: a disk that is full in the end fails other programs, too.
        needed = _bytes_needed(run, snapshot.policies)
        if needed > shutil.disk_usage(run.checkpoints).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(part, snapshot, train_config, record)
        replace_dir(part, final)
        # Each rename must be on the disk before what depends on it: the folder before the link that points at it, and
        # the link before older checkpoints are removed.
        fsync(run.checkpoints)
        set_pointer(run, "last", name)
        fsync(run.checkpoints)
    except (OSError, SafetensorError) as error:
        # safetensors wraps the errors of the operating system in one of its own.
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(_cannot_save(final, error, needed)) from error
    return Checkpoint(final / MODEL_DIR)


def _write(
    part: Path,
    snapshot: Snapshot,
    train_config: TrainPipelineConfig,
    record: dict[str, Any],
) -> None:
    """Write all files of a checkpoint and wait until they are on the disk."""
    training = part / "training_state"
    components, state = snapshot.components, snapshot.state
    training.mkdir(parents=True)
    for folder, policy in snapshot.policies.items():
        model = part / folder
        model.mkdir()
        policy.save_pretrained(model)
        components.processors.pre.save_pretrained(model)
        components.processors.post.save_pretrained(model)
        train_config.save_pretrained(model)
        (model / METADATA_FILE).write_text(json.dumps(record, indent=2))
    # What LeRobot's `save_training_state` does, but with the values of the snapshot. It records a single process, since
    # our batch size is that of all ranks together.
    save_training_step(state.step, training, num_processes=1, batch_size=train_config.batch_size)
    for process, random_state in enumerate(snapshot.random):
        save_file(random_state, training / _rng_file(process))
    save_optimizer_state(components.optimizer, training, optim_state_dict=snapshot.optimizer)
    if snapshot.scheduler is not None:
        write_json(snapshot.scheduler, training / SCHEDULER_STATE)
    (training / METADATA_FILE).write_text(json.dumps(asdict(state), indent=2))
    # Last, since it describes all other files.
    write_manifest(part)
    # safetensors lets nobody else read its files, whatever the umask says: they get the mode of an ordinary one.
    mode = (part / MANIFEST).stat().st_mode
    for path in part.rglob("*.safetensors"):
        path.chmod(mode)
    for path in [*part.rglob("*"), part]:
        fsync(path)


def _bytes_needed(run: RunDir, policies: dict[str, ACTPolicy]) -> int:
    """Return the bytes that a checkpoint takes: as the last one, and at least weights and AdamW's two moments."""
    weights: int = sum(parameter.nbytes for parameter in policies[MODEL_DIR].parameters())
    last = resolve_pointer(run, "last")
    return max((2 + len(policies)) * weights, size_of(last) if last is not None else 0) + NON_TENSOR_BYTES


def _cannot_save(final: Path, error: Exception, needed: int) -> str:
    """Return the message for a checkpoint that could not be written, of `needed` bytes (0 if that is not known)."""
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]
    try:
        free = f"{shutil.disk_usage(final.parent).free / 1e6:.1f} MB are free"
    except OSError:
        free = "its folder is missing"
    takes = f", a checkpoint takes {needed / 1e6:.1f} MB" if needed else ""
    return f"{final} cannot be saved ({reason}): {free}{takes}; make room or see that the folder can be written to"


def load(checkpoint: Checkpoint, components: TrainComponents) -> TrainerState:
    """Load optimizer, scheduler and rank 0's random state in place, and return the state of the loop.

    The weights are not loaded: the policy was built from them.

    Raises:
        UserError: a file is missing or damaged.
    """
    folder = checkpoint.training_dir
    for path in [*folder.glob("*")]:
        check_is_file(path)
        if path.suffix == ".safetensors" and (damage := find_damage(path)) is not None:
            raise UserError(f"{path} {damage}: resume from another checkpoint")
    step = checkpoint.step
    with _named(folder / RNG_STATE):
        load_rng_state_file(folder)
    # It holds the moments and, in another file, the options of the parameter groups.
    read_json(folder / OPTIMIZER_PARAM_GROUPS, list[dict[str, Any]], "resume from another checkpoint")
    with _named(folder / OPTIMIZER_PARAM_GROUPS, folder / OPTIMIZER_STATE):
        load_optimizer_state(components.optimizer, folder)
    # A run without a schedule has none to load: one that is given on resume starts from its beginning.
    if components.scheduler is not None and (folder / SCHEDULER_STATE).exists():
        with _named(folder / SCHEDULER_STATE):
            load_scheduler_state(components.scheduler, folder)
    if (folder / METADATA_FILE).exists():
        return read_trainer_state(folder / METADATA_FILE)
    # Stock LeRobot keeps none of our state, but the W&B run in its configuration.
    wandb = read_json(checkpoint.model_dir / "train_config.json", dict[str, Any]).get("wandb") or {}
    return TrainerState(step=step, wandb_run_id=wandb.get("run_id"))


@contextmanager
def _named(*files: Path) -> Iterator[None]:
    """Name the files in an error about what is in them: LeRobot's, torch's and safetensors' do not."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        names = " or ".join(map(str, files))
        raise UserError(f"{names} is missing or damaged ({reason}): resume from another checkpoint") from error


def load_rng_state(checkpoint: Checkpoint, process: int) -> bool:
    """Load the random state of a rank other than 0; `load` does that of rank 0.

    Returns:
        Whether the checkpoint has one: it may have been written by fewer ranks.

    Raises:
        UserError: its file is damaged.
    """
    path = checkpoint.training_dir / _rng_file(process)
    if not path.exists():
        return False
    with _named(path):
        deserialize_rng_state(unflatten_dict(load_file(path)))
    return True


def saved_world_size(checkpoint: Checkpoint) -> int:
    """Return how many ranks have their random state in the checkpoint."""
    return len(list(checkpoint.training_dir.glob(f"{Path(RNG_STATE).stem}*")))


def _rng_file(process: int) -> str:
    """Return the name of a rank's file: LeRobot's own for rank 0, the only one that stock LeRobot reads."""
    name = Path(RNG_STATE)
    return f"{name.stem}_{process}{name.suffix}" if process else name.name


def saved_batch_size_and_world(checkpoint: Checkpoint) -> tuple[int | None, int]:
    """Return the batch size, None if unknown, and the number of ranks that the checkpoint was trained with."""
    return load_training_batch_size(checkpoint.directory), load_training_num_processes(checkpoint.directory) or 1
