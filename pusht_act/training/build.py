"""Build a trainer: data, policy, optimizer and the loop's state, fresh or from a checkpoint."""

import logging
from pathlib import Path

import torch

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.checkpoints.state import TrainerState
from pusht_act.config.lerobot import LeRobotConfig
from pusht_act.config.schema import Config
from pusht_act.data.cache import FrameDataset
from pusht_act.data.loader import BatchLoader
from pusht_act.data.open_dataset import normalization_stats, open_dataset, policy_features, split_episodes
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.policy.act import bf16_is_emulated, make_policy, make_processors
from pusht_act.policy.fast_dropout import build_dropout
from pusht_act.runtime.distributed import (
    broadcast_parameters,
    init_gradient_group,
    raise_on_any_rank,
    rank,
    world_size,
)
from pusht_act.runtime.seeding import seed_initialisation, seed_training_noise
from pusht_act.training.async_evaluation import find_pending
from pusht_act.training.augmentation import build_augmentation
from pusht_act.training.backbone_features import check_freezing
from pusht_act.training.extension_checks import check_extensions
from pusht_act.training.extensions import Extensions
from pusht_act.training.restore import build_components, check_compatible, load_components, restore_state
from pusht_act.training.train_step import StepOptions, bind_loss, compile_loss
from pusht_act.training.trainer import Trainer

log = logging.getLogger(__name__)


def build_trainer(config: Config, lerobot: LeRobotConfig, start: Checkpoint | None, extensions: Extensions) -> Trainer:
    """Build the trainer on every rank, from the same weights; write nothing but the cache.

    Args:
        config: the job's.
        lerobot: LeRobot's view of it; gets the data set's features.
        start: the checkpoint to resume from; None for a new run.
        extensions: a loss and transforms in place of the defaults.

    Raises:
        UserError: a configuration that does not fit the data or the checkpoint, on any rank.
        OSError: a file cannot be read, or the ranks' devices cannot reach each other.
    """
    with raise_on_any_rank():
        trainer = _build(config, lerobot, start, extensions)
    with raise_on_any_rank():
        init_gradient_group(str(lerobot.policy.device))
        broadcast_parameters(trainer.components.policy.state_dict().values())
    return trainer


def _build(config: Config, lerobot: LeRobotConfig, start: Checkpoint | None, extensions: Extensions) -> Trainer:
    if start is not None:
        extensions.check_same(start)
    # The features follow from the data set, and a checkpoint must have been trained on the same ones.
    frames = open_dataset(config, lerobot)
    train_episodes, eval_episodes = split_episodes(frames, lerobot.dataset.episodes, lerobot.dataset.eval_split)
    inputs, outputs = policy_features(frames)
    pretrained = lerobot.policy.pretrained_path
    model_dir = start.model_dir if start is not None else Path(pretrained) if pretrained is not None else None
    if model_dir is not None:
        check_compatible(model_dir, lerobot.policy, frames.repo_id, inputs | outputs)
    lerobot.policy.input_features, lerobot.policy.output_features = inputs, outputs
    sampler = EpisodeSampler(frames, train_episodes, config.seed)

    # A fresh policy begins with the weights and the processors in policy.pretrained_path, if there is one: the
    # statistics that its weights were trained with stay with them.
    seed_initialisation(config.seed)
    if model_dir is not None:
        components = load_components(config, lerobot, model_dir)
    else:
        policy = make_policy(lerobot.policy, str(config.train.backbone_norm))
        stats = normalization_stats(frames, lerobot.dataset.use_imagenet_stats, config.train.mirror > 0)
        components = build_components(config, lerobot, policy, make_processors(lerobot.policy, stats))
    # The optimizer is loaded in place, then the random streams, the last to be touched.
    if start is None:
        seed_training_noise(config.seed, rank())
        state = TrainerState(dataset=frames.key)
    else:
        state = restore_state(config, lerobot, start, components, sampler)

    # The caller's loss and transforms are tried on a batch before anything is written.
    loader = BatchLoader(frames, lerobot.policy.chunk_size, str(lerobot.policy.device))
    if extensions.metadata():
        rows = torch.arange(config.batch_size // world_size()) % len(sampler)
        check_extensions(extensions, components, loader.batch(rows), config.train.precision)
    held_out = [torch.arange(*frames.episodes[episode]) for episode in eval_episodes]
    trainer = Trainer(
        config=config,
        lerobot=lerobot,
        components=components,
        state=state,
        loader=loader,
        sampler=sampler,
        held_out=torch.cat(held_out) if held_out else torch.empty(0, dtype=torch.long),
        extensions=extensions,
        options=_step_options(config, lerobot, extensions, frames),
        start=start,
        pending_models=find_pending(start, state, config) if start is not None else {},
    )
    log.info(
        "%s: %d episodes, %d frames%s; %s",
        frames.repo_id, len(train_episodes), len(sampler),
        f" ({len(eval_episodes)} episodes held out)" if eval_episodes else "",
        _describe(config, components),
    )  # fmt: skip
    if bf16_is_emulated(lerobot.policy, config.train.precision):
        log.warning(
            "this CPU has no bf16 arithmetic and emulates it, many times slower than fp32: train.precision=fp32"
        )
    return trainer


def _step_options(config: Config, lerobot: LeRobotConfig, extensions: Extensions, frames: FrameDataset) -> StepOptions:
    """Choose how a step is taken; refuse before anything is written what cannot be."""
    check_freezing(config.train, frames, extensions.transforms)
    augmentation = build_augmentation(config.train, frames)
    loss = bind_loss(extensions.loss, config.train.chunk_discount)
    return StepOptions(
        grad_clip_norm=lerobot.optimizer.grad_clip_norm,
        precision=config.train.precision,
        loss=loss,
        full_batch_loss=compile_loss(loss, config.train, torch.device(str(lerobot.policy.device))),
        dropout=build_dropout(config.train, lerobot.policy),
        transforms=[*augmentation, *extensions.transforms],
    )


def _describe(config: Config, components: TrainComponents) -> str:
    """Say how large the policy is, where it lies and how many ranks share a batch."""
    policy, ranks = components.policy, world_size()
    size = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    shared = f", on {ranks} ranks with {config.batch_size // ranks} samples of a batch each" if ranks > 1 else ""
    return f"ACT with {size:.1f} M parameters on {policy.config.device}{shared}"
