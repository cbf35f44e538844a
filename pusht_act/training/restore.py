"""Restore a training run from a checkpoint: weights, optimizer, learning rates, random streams, data order.

Which option counts where checkpoint and command line differ is decided in checkpoints/merge_config.py.
"""

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pusht_act.checkpoints import checkpoint_io
from pusht_act.checkpoints.checkpoint import EMA_DIR, Checkpoint, latest_valid
from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.checkpoints.state import TrainerState
from pusht_act.config.lerobot import LeRobotConfig
from pusht_act.config.schema import Config
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.policy.act import Processors, load_policy, load_processors
from pusht_act.policy.ema import EMA
from pusht_act.policy.lerobot import ACTConfig, ACTPolicy, AdamWConfig
from pusht_act.policy.optim import make_optimizer
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.distributed import is_main, rank, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.seeding import seed_training_noise
from pusht_act.training.nan_guard import DivergedError

log = logging.getLogger(__name__)


def build_components(
    config: Config, lerobot: LeRobotConfig, policy: ACTPolicy, processors: Processors
) -> TrainComponents:
    """Give `policy` a fresh optimizer and schedule, and rank 0 an average of its weights if that is asked for."""
    optimizer = make_optimizer(policy, lerobot.optimizer)
    scheduler = lerobot.scheduler.build(optimizer, config.steps) if lerobot.scheduler else None
    ema = EMA(policy, config.ema) if config.ema.enable and is_main() else None
    return TrainComponents(policy, processors, optimizer, scheduler, ema)


def load_components(config: Config, lerobot: LeRobotConfig, model_dir: Path) -> TrainComponents:
    """Load policy and processors from `model_dir`, with a fresh optimizer and schedule.

    Raises:
        UserError: the checkpoint is damaged or holds another policy.
    """
    policy = load_policy(lerobot.policy, model_dir, str(config.train.backbone_norm))
    return build_components(config, lerobot, policy, load_processors(lerobot.policy, model_dir))


def restore_state(
    config: Config, lerobot: LeRobotConfig, start: Checkpoint, components: TrainComponents, sampler: EpisodeSampler
) -> TrainerState:
    """Load optimizer, schedule and random streams into `components`, move `sampler` to its position; return the state.

    Raises:
        UserError: a file is missing or damaged, or the data set has other content than the checkpoint's.
    """
    state = checkpoint_io.load(start, components)
    check_dataset(config, start, state.dataset, sampler.dataset)
    state.dataset = sampler.dataset
    override_restored_hparams(components.optimizer, components.scheduler, lerobot.optimizer, lerobot.policy)
    if components.ema is not None:
        _load_average(start, components.ema)

    # Each rank has noise of its own; a rank that the checkpoint knows nothing of starts afresh.
    if not is_main() and not checkpoint_io.load_rng_state(start, rank()):
        seed_training_noise(config.seed, rank())
    if (saved_ranks := checkpoint_io.saved_world_size(start)) != world_size():
        log.warning(
            "ranks: %d, the checkpoint's were %d: the data order continues where it was, dropout and VAE noise differ",
            world_size(), saved_ranks,
        )  # fmt: skip

    # Stock LeRobot's checkpoints do not record the position, which then follows from the step.
    batch_size, processes = checkpoint_io.saved_batch_size_and_world(start)
    if batch_size not in (None, config.batch_size):
        log.warning(
            "batch_size=%d, the checkpoint's was %d: the data order continues where it was",
            config.batch_size, batch_size,
        )  # fmt: skip
    position = state.sampler or sampler.state_at(state.step, batch_size or config.batch_size, processes)
    sampler.load_state_dict(position, state.rollbacks)
    return state


def check_dataset(config: Config, start: Checkpoint, trained_on: str | None, content: str) -> None:
    """Compare the data set with the one that a checkpoint was trained on.

    Args:
        config: The job's.
        start: The checkpoint.
        trained_on: Hash of its data set; None if it does not record it.
        content: Hash of the data set that the job has.

    Raises:
        UserError: They differ, and `dataset.allow_change` is not given.
    """
    named = " ".join(f"dataset.{key}={config.dataset[key]}" for key in ("repo_id", "root") if config.dataset.get(key))
    if trained_on is None:
        log.info("%s: its data set is not recorded; %s is normalized by its statistics", start.directory, named)
    elif trained_on == content:
        return
    elif not config.dataset.get("allow_change"):
        raise UserError(
            f"{named} has other content than what {start.directory} was trained on: give the same data set, or "
            "dataset.allow_change=true to go on with this one, normalized by the old statistics"
        )
    else:
        log.warning("%s has other content than the checkpoint's data set; the old statistics stay", named)


def _load_average(start: Checkpoint, ema: EMA) -> None:
    weights = start.directory / EMA_DIR / "model.safetensors"
    if not weights.exists():
        log.warning("%s has no average of the weights: it begins with those of step %d", start.directory, start.step)
        return
    try:
        load_model(ema.policy, weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{weights} is damaged ({error}): resume from another checkpoint") from error


def override_restored_hparams(
    optimizer: Optimizer, scheduler: LRScheduler | None, config: AdamWConfig, policy: ACTConfig
) -> None:
    """Apply the configured learning rates and options to an optimizer whose state was loaded from a file.

    PyTorch restores the saved learning rate together with the moments, so a new one given on resume would do nothing.

    Args:
        optimizer: The optimizer, with its loaded state.
        scheduler: The learning rate schedule with its loaded state, if there is one.
        config: Options of AdamW.
        policy: Holds the learning rates of the two parameter groups.
    """
    for i, (group, rate) in enumerate(
        zip(optimizer.param_groups, (policy.optimizer_lr, policy.optimizer_lr_backbone), strict=True)
    ):
        group.update(betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
        if scheduler is None:
            group["lr"] = rate
        elif rate != scheduler.base_lrs[i]:
            # The schedule multiplies its base rate: replace that, and scale the present rate by as much.
            group["lr"] *= rate / scheduler.base_lrs[i]
            group["initial_lr"] = scheduler.base_lrs[i] = rate


def rollback_target(
    config: Config, run: RunDir, start: Checkpoint | None, error: DivergedError, number: int, given: str = ""
) -> Checkpoint:
    """Return the checkpoint that roll-back `number` goes to: the latest valid one of the run, or where it started.

    `given` names the caller's loss and transforms, which may be the cause.

    Raises:
        DivergedError: there is none, or this would be once more than train.max_rollbacks.
    """
    # A later checkpoint than the step that broke would be of a run that went another way.
    limit = config.train.max_rollbacks
    checkpoint = latest_valid(run, error.step)[0] or start
    remedy = "lower policy.optimizer_lr, or see whether the data set has values that are not numbers"
    remedy += f", and whether {given} gives some" if given else ""
    # Nothing to go back to, or it has not helped.
    if checkpoint is None:
        message = f"{error}, and there is no checkpoint to go back to: {remedy}"
        raise DivergedError(message, error.step) from error
    if number > limit:
        hint = f"{checkpoint.directory} is valid, mode=resume resumes from it"
        message = f"{error}, after train.max_rollbacks={limit} roll-backs: {remedy}; {hint}"
        raise DivergedError(message, error.step) from error
    log.warning(
        "%s: going back to step %d, %s, and on with the data in another order (%d of train.max_rollbacks=%d)",
        error, checkpoint.step, checkpoint.directory, number, limit,
    )  # fmt: skip
    return checkpoint


def check_compatible(model_dir: Path, policy: ACTConfig, repo_id: str, features: dict[str, Any]) -> None:
    """Refuse a checkpoint that observes something else than the data set, or normalizes otherwise than `policy` says.

    Its processors are loaded as they are, so another `policy.normalization_mapping` would do nothing.

    Raises:
        UserError: naming both.
    """
    try:
        saved = json.loads((model_dir / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{model_dir / 'config.json'} is damaged ({error}): give another checkpoint") from error
    # The shapes and kinds of what is observed, by name.
    has = {key: [feature.type.name, list(feature.shape)] for key, feature in features.items()}
    saved_features = (saved.get("input_features") or {}) | (saved.get("output_features") or {})
    if {key: [feature["type"], feature["shape"]] for key, feature in saved_features.items()} != has:
        raise UserError(
            f"dataset {repo_id} has {', '.join(has)}, the checkpoint's policy was made for "
            f"{', '.join(saved_features)}: give a data set that fits it"
        )
    # The normalization is part of the saved processors.
    mapping = {key: mode.name for key, mode in policy.normalization_mapping.items()}
    if mapping != saved.get("normalization_mapping", mapping):
        given, its = (json.dumps(each).replace('"', "") for each in (mapping, saved["normalization_mapping"]))
        raise UserError(
            f"policy.normalization_mapping={given}, but {model_dir} was trained with its own: "
            f"give '+policy.normalization_mapping={its}'"
        )
