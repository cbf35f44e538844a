"""Build what training needs: data, policy, optimizer and the loop's state, fresh or from a checkpoint."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from torch import Tensor

from pusht_act.checkpoints import checkpoint_io as checkpoints
from pusht_act.checkpoints.checkpoint import Checkpoint, latest_valid
from pusht_act.checkpoints.checkpoint_io import TrainComponents, TrainerState
from pusht_act.config.lerobot import LeRobotConfig
from pusht_act.config.schema import Config
from pusht_act.data.dataset import normalization_stats, open_dataset, policy_features, split_episodes
from pusht_act.data.loader import BatchLoader
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.policy.act import (
    Processors,
    bf16_is_emulated,
    load_policy,
    load_processors,
    make_policy,
    make_processors,
)
from pusht_act.policy.fast_dropout import Dropout, build_dropout
from pusht_act.policy.optim import make_optimizer, override_restored_hparams
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.distributed import Word, rank, tell, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.malloc import keep_freed_memory
from pusht_act.runtime.seeding import seed_initialisation, seed_training_noise
from pusht_act.training.async_evaluation import Report, unevaluated
from pusht_act.training.nan_guard import DivergedError
from pusht_act.training.train_step import Loss, TrainStep, build_graph_backend, build_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """Everything the loop needs, made once."""

    objects: TrainComponents
    data: BatchLoader
    order: EpisodeSampler
    loss: Loss
    dropout: Dropout
    held_out: Tensor
    """Frame numbers of the validation samples; empty without dataset.eval_split."""
    state: TrainerState
    start: Checkpoint | None = None
    """Where `state` stood when this was made; None: the beginning."""
    unevaluated: Path | None = None
    """The weights of step `state.pending`, whose evaluation was cut short."""
    report: Report | None = None
    """Is told of each evaluation, and whether to go on."""


def build_trainer(config: Config, lerobot: LeRobotConfig, start: Checkpoint | None) -> Setup:
    """Data, policy, optimizer and the loop's state: fresh, or as they stood at checkpoint `start`.

    A fresh policy begins with the weights and the processors in `policy.pretrained_path`, if there is one: the
    statistics that its weights were trained with stay with them. Writes nothing but the cache.

    Raises:
        UserError: a configuration that does not fit the data or the checkpoint.
    """
    frames = open_dataset(config, lerobot)
    train_episodes, eval_episodes = split_episodes(frames, lerobot.dataset.episodes, lerobot.dataset.eval_split)
    inputs, outputs = policy_features(frames)
    pretrained = lerobot.policy.pretrained_path
    loaded = start.model_dir if start is not None else Path(pretrained) if pretrained is not None else None
    if loaded is not None:
        _check_fits(loaded, lerobot.policy, frames.repo_id, inputs, outputs)
    lerobot.policy.input_features, lerobot.policy.output_features = inputs, outputs
    order = EpisodeSampler(frames, train_episodes, config.seed)
    seed_initialisation(config.seed)
    if loaded is None:
        policy = make_policy(lerobot.policy)
        stats = normalization_stats(frames, lerobot.dataset.use_imagenet_stats)
        processors = make_processors(lerobot.policy, stats)
    else:
        policy = load_policy(lerobot.policy, loaded)
        processors = load_processors(lerobot.policy, loaded)
    if start is None:
        seed_training_noise(config.seed, rank())
    objects = _with_optimizer(config, lerobot, policy, processors)
    state = TrainerState() if start is None else _resumed_state(config, lerobot, start, objects, order)
    held_out = torch.cat(
        [torch.arange(*frames.episodes[e]) for e in eval_episodes] or [torch.empty(0, dtype=torch.long)]
    )
    data = BatchLoader(frames, lerobot.policy.chunk_size, str(lerobot.policy.device))
    log.info(
        "%s: %d episodes, %d frames%s; ACT with %.1f M parameters on %s%s",
        frames.repo_id, len(train_episodes), len(order),
        f" ({len(eval_episodes)} episodes held out)" if eval_episodes else "",
        sum(p.numel() for p in policy.parameters()) / 1e6, lerobot.policy.device,
        _ranks(config),
    )  # fmt: skip
    if bf16_is_emulated(lerobot.policy, config.train.precision):
        log.warning(
            "this CPU has no bf16 arithmetic and emulates it, many times slower than fp32: train.precision=fp32"
        )
    cut_short = unevaluated(start, state, config.steps) if start is not None else None
    loss = build_loss(config.train, torch.device(str(lerobot.policy.device)))
    dropout = build_dropout(config.train, lerobot.policy)
    return Setup(objects, data, order, loss, dropout, held_out, state, start, cut_short)


def _ranks(config: Config) -> str:
    """Say how many ranks share a batch, if there are several."""
    n = world_size()
    return f", on {n} ranks with {config.batch_size // n} samples of a batch each" if n > 1 else ""


def roll_back(config: Config, lerobot: LeRobotConfig, setup: Setup, run: RunDir, diverged: DivergedError) -> Setup:
    """`setup` as it stood at the newest sound checkpoint of its run, with another order of the data from there on.

    Raises:
        DivergedError: there is none, or this would be once more than train.max_rollbacks.
    """
    number, most = setup.state.rollbacks + 1, config.train.max_rollbacks
    checkpoint = latest_valid(run, diverged.step)[0] or setup.start
    remedy = "lower policy.optimizer_lr, or see whether the data set has values that are no numbers"
    if checkpoint is None:
        message = f"{diverged}, and there is no checkpoint to go back to: {remedy}"
        raise DivergedError(message, diverged.step) from diverged
    if number > most:
        sound = f"{checkpoint.directory} is sound, mode=resume goes on from it"
        message = f"{diverged}, after train.max_rollbacks={most} roll-backs: {remedy}; {sound}"
        raise DivergedError(message, diverged.step) from diverged
    log.warning(
        "%s: going back to step %d, %s, and on with the data in another order (%d of train.max_rollbacks=%d)",
        diverged, checkpoint.step, checkpoint.directory, number, most,
    )  # fmt: skip
    tell(Word.ROLL_BACK, (checkpoint, number))
    return back_at(config, lerobot, setup, checkpoint, number)


def back_at(config: Config, lerobot: LeRobotConfig, setup: Setup, checkpoint: Checkpoint, number: int) -> Setup:
    """`setup` after roll-back `number`, to `checkpoint`."""
    policy = load_policy(lerobot.policy, checkpoint.model_dir)
    processors = load_processors(lerobot.policy, checkpoint.model_dir)
    objects = _with_optimizer(config, lerobot, policy, processors)
    state = _resumed_state(config, lerobot, checkpoint, objects, setup.order)
    state.rollbacks, state.skipped = number, 0
    setup.order.load_state_dict(setup.order.state_dict(), number)
    cut_short = unevaluated(checkpoint, state, config.steps)
    return replace(setup, objects=objects, state=state, start=checkpoint, unevaluated=cut_short)


def _with_optimizer(
    config: Config, lerobot: LeRobotConfig, policy: ACTPolicy, processors: Processors
) -> TrainComponents:
    optimizer = make_optimizer(policy, lerobot.optimizer)
    scheduler = lerobot.scheduler.build(optimizer, config.steps) if lerobot.scheduler else None
    return TrainComponents(policy, processors, optimizer, scheduler)


def _check_fits(model: Path, policy: ACTConfig, repo_id: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Refuse a checkpoint that observes something else than the data set, or normalizes otherwise than `policy` says.

    Its processors are loaded as they are, so another `policy.normalization_mapping` would do nothing.
    """
    try:
        saved = json.loads((model / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{model / 'config.json'} is damaged ({error}): give another checkpoint") from error
    has = {key: [feature.type.name, list(feature.shape)] for key, feature in (inputs | outputs).items()}
    features = (saved.get("input_features") or {}) | (saved.get("output_features") or {})
    if {key: [feature["type"], feature["shape"]] for key, feature in features.items()} != has:
        raise UserError(
            f"dataset {repo_id} has {', '.join(has)}, the checkpoint's policy was made for {', '.join(features)}: "
            "give a data set that fits it"
        )
    mapping = {key: mode.name for key, mode in policy.normalization_mapping.items()}
    if mapping != saved.get("normalization_mapping", mapping):
        given, its = (json.dumps(each).replace('"', "") for each in (mapping, saved["normalization_mapping"]))
        raise UserError(
            f"policy.normalization_mapping={given}, but {model} was trained with its own: "
            f"give '+policy.normalization_mapping={its}'"
        )


def _resumed_state(
    config: Config, lerobot: LeRobotConfig, start: Checkpoint, objects: TrainComponents, order: EpisodeSampler
) -> TrainerState:
    state = checkpoints.load(start, objects)
    override_restored_hparams(objects.optimizer, objects.scheduler, lerobot.optimizer, lerobot.policy)
    if rank() and not checkpoints.load_rng_state(start, rank()):
        seed_training_noise(config.seed, rank())
    if rank() == 0 and (then := checkpoints.saved_world_size(start)) != world_size():
        log.warning(
            "processes: %d, the checkpoint's were %d: the data order goes on where it was, dropout and VAE noise are "
            "others", world_size(), then,
        )  # fmt: skip
    batch_size, processes = checkpoints.saved_batch_size_and_world(start)
    if batch_size not in (None, config.batch_size) and rank() == 0:
        log.warning(
            "batch_size=%d, the checkpoint's was %d: the data order goes on where it was", config.batch_size, batch_size
        )
    position = state.sampler or order.state_at(state.step, batch_size or config.batch_size, processes)
    order.load_state_dict(position, state.rollbacks)
    return state


def make_step(config: Config, lerobot: LeRobotConfig, setup: Setup) -> TrainStep:
    """The step of the loop, on the objects of `setup`."""
    keep_freed_memory()
    recorder = build_graph_backend(config.train, torch.device(str(lerobot.policy.device)))
    clip, precision = lerobot.optimizer.grad_clip_norm, config.train.precision
    return TrainStep(
        setup.objects,
        setup.data,
        config.batch_size // world_size(),
        clip,
        precision,
        setup.loss,
        recorder,
        setup.dropout,
    )
