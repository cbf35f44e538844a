"""From a composed configuration to a checked `Config`: what can be refused without importing torch is refused here."""

import math
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pusht_act.config.schema import EMBEDDED_REPO_ID, MAX_DEMOS, PROFILED_STEPS, TRAIN_MODES, Config, Mode
from pusht_act.config.secrets_check import refuse_tokens
from pusht_act.runtime.errors import UserError

POSITIVE = (
    *("steps", "batch_size", "eval.n_episodes", "eval.batch_size"),
    *(f"policy.{key}" for key in ("chunk_size", "n_action_steps", "dim_model", "n_heads", "dim_feedforward")),
    *(f"policy.{key}" for key in ("latent_dim", "n_encoder_layers", "n_decoder_layers", "n_vae_encoder_layers")),
    *("env.episode_length", "env.fps", "env.visualization_width", "env.visualization_height"),
    *("scheduler.num_decay_steps", "sweep.max_tries"),
)
NOT_NEGATIVE = (
    *("seed", "log_freq", "eval_freq", "eval_steps", "save_freq", "eval.start_seed"),
    *("eval.n_videos", "eval.workers"),
    *("checkpoints.keep_last", "checkpoints.keep_every", "train.max_nonfinite"),
    *("train.max_rollbacks", "status.every"),
    *("demos.start_seed", "demos.workers"),
    *(f"policy.{key}" for key in ("optimizer_lr", "optimizer_lr_backbone", "optimizer_weight_decay", "kl_weight")),
    *("optimizer.grad_clip_norm", "optimizer.eps", "scheduler.decay_lr"),
)
PRECISIONS = (None, "fp32", "bf16")
WANDB_MODES = (None, "online", "offline", "disabled")


def to_config(cfg: DictConfig) -> Config:
    """StepResult a composed configuration into a checked `Config`; below this nothing sees a `DictConfig`.

    Raises:
        UserError: an unknown key, a wrong type or an impossible value, named with its remedy; or a token.
    """
    if unknown := [str(key) for key in cfg if str(key) not in {f.name for f in fields(Config)}]:
        raise UserError(f"{unknown[0]} is unknown: --cfg job shows the keys there are")
    try:
        untyped = OmegaConf.create(OmegaConf.to_container(cfg))  # so that no objection to a type shows the value
        refuse_tokens("", OmegaConf.to_container(untyped, resolve=True))
        merged = OmegaConf.merge(OmegaConf.structured(Config), cfg)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: give {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise UserError(str(error.msg or error).splitlines()[0]) from error
    assert isinstance(config, Config)
    _check(config, merged)
    return config


def check_processes(mode: Mode, profile: bool, processes: int) -> None:
    """What one process does is refused to several.

    Raises:
        UserError: naming what it is.
    """
    if processes == 1:
        return
    if mode not in (Mode.test, Mode.full, Mode.resume):
        raise UserError(f"mode={mode.value} is for one process, and these are {processes}: give it without torchrun")
    if profile:
        raise UserError(f"train.profile=true is for one process, and these are {processes}: leave it out")


def check_share(batch_size: int, processes: int) -> None:
    """Each of several processes takes the same number of a batch's samples.

    Raises:
        UserError: that is no whole number.
    """
    if batch_size % processes:
        more = -(-batch_size // processes) * processes
        raise UserError(
            f"batch_size={batch_size} is that of a whole step and cannot be shared by {processes} processes: give a "
            f"multiple of {processes}, such as batch_size={more}"
        )


def _check(config: Config, cfg: Any) -> None:
    """Refuse what can be refused without importing torch."""
    for keys, lowest in ((POSITIVE, 1), (NOT_NEGATIVE, 0)):
        for key in keys:
            _check_number(key, OmegaConf.select(cfg, key, default=lowest), lowest)
    _check_mode(config)
    _check_precision(config)
    _check_dataset(config)
    chunk, replan = config.policy.get("chunk_size"), config.policy.get("n_action_steps")
    if chunk is not None and replan is not None and replan > chunk:
        raise UserError(
            f"policy.n_action_steps={replan} exceeds policy.chunk_size={chunk}: "
            f"give policy.n_action_steps={chunk} or less"
        )
    if config.policy.get("type") != "act":
        raise UserError(f"policy.type={config.policy.get('type')} is not trained here: give policy.type=act")
    if config.policy.get("n_obs_steps", 1) != 1:
        raise UserError(f"policy.n_obs_steps={config.policy['n_obs_steps']}: ACT looks at one step, leave it out")
    if config.policy.get("push_to_hub") and not config.save_checkpoint:
        raise UserError("save_checkpoint=false leaves nothing for policy.push_to_hub=true to upload: give one of them")
    if config.checkpoints.keep_every and not config.checkpoints.keep_last:
        raise UserError(
            f"checkpoints.keep_every={config.checkpoints.keep_every}: all are kept with checkpoints.keep_last=0; "
            "give checkpoints.keep_last=3, say, or leave it out"
        )
    if config.wandb.mode not in WANDB_MODES:
        raise UserError(f"wandb.mode={config.wandb.mode} is unknown: give online, offline or disabled")
    peak = config.scheduler.get("peak_lr", 1)
    if not isinstance(peak, int | float) or not 0 < peak < math.inf:  # LeRobot divides by it
        raise UserError(f"scheduler.peak_lr={peak} is no rate: give one above 0, such as that of policy.optimizer_lr")
    for key in ("output_dir", "job_name"):
        if not getattr(config, key):
            raise UserError(f"{key}= is empty: give {key}=NAME, or leave it out")


def _check_number(key: str, value: Any, lowest: int) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{key}={value} is not a number: give {lowest} or more")
    if key in POSITIVE and not isinstance(value, int):
        raise UserError(f"{key}={value}: give a whole number, {lowest} or more")
    if not math.isfinite(value):
        raise UserError(f"{key}={value} is no finite number: give {lowest} or more")
    if value < lowest:
        raise UserError(f"{key}={value} is too small: give {lowest} or more")


def _check_mode(config: Config) -> None:
    """Each mode has its own way of naming a checkpoint; one that would be ignored is refused."""
    if config.mode is Mode.eval and not config.checkpoint:
        raise UserError("mode=eval needs a checkpoint: give checkpoint=PATH_OR_HUB_ID")
    if config.mode is not Mode.eval and config.checkpoint:
        raise UserError(f"checkpoint={config.checkpoint} is for mode=eval: give mode=eval, or resume.path= to train on")
    if config.mode is Mode.status and not config.dir:
        raise UserError("mode=status needs a folder: give dir=DIR, that of a sweep or a run directory")
    if config.mode is not Mode.resume and config.resume.path:
        raise UserError(f"resume.path={config.resume.path} is for mode=resume: give mode=resume too, or leave it out")
    if config.mode is Mode.demos and config.demos.n_episodes < 1:
        raise UserError(f"demos.n_episodes={config.demos.n_episodes} is too small: give 1 or more")
    if config.mode is Mode.demos and config.policy.get("push_to_hub"):
        raise UserError("policy.push_to_hub=true: mode=demos makes a data set, give demos.push_to_hub=true to push it")
    if config.mode in (Mode.eval, Mode.resume) and (path := config.policy.get("pretrained_path")):
        raise UserError(
            f"policy.pretrained_path={path} begins a new run: mode={config.mode.value} has a checkpoint of its own, "
            "leave it out"
        )
    if config.mode in TRAIN_MODES and (given := {"input_features", "output_features"} & {*config.policy}):
        key = min(given)
        raise UserError(f"policy.{key}={config.policy[key]}: features are taken from the data set, leave it out")
    if config.mode in TRAIN_MODES and config.train.profile and config.steps < PROFILED_STEPS:
        raise UserError(f"steps={config.steps} are too few for train.profile=true: give {PROFILED_STEPS} or more")


def _check_precision(config: Config) -> None:
    precision = config.train.precision
    if precision not in PRECISIONS:
        raise UserError(f"train.precision={precision} is unknown: give fp32 or bf16")
    if precision == "fp32" and config.policy.get("use_amp"):
        raise UserError("train.precision=fp32 contradicts policy.use_amp=true, which is bf16: leave one of them out")
    if config.train.fast_dropout and config.train.compile:
        raise UserError("train.fast_dropout=true: what is compiled has a dropout of its own, give train.compile=false")


def _check_dataset(config: Config) -> None:
    dataset = config.dataset
    if not isinstance(dataset.get("repo_id"), str):
        raise UserError(f"dataset.repo_id={dataset.get('repo_id')} is no name: give one such as lerobot/pusht")
    if dataset["repo_id"] == EMBEDDED_REPO_ID:
        for key in ("root", "revision"):
            if dataset.get(key):
                raise UserError(
                    f"dataset.{key}={dataset[key]} means nothing for the embedded demonstrations: "
                    "leave it out, or give dataset=pusht or pusht_keypoints with it"
                )
    episodes = dataset.get("episodes")
    if episodes is not None and not _are_numbers(episodes):
        raise UserError(
            f"dataset.episodes={episodes} is no list of different numbers: give one such as [0,1,2], or leave it out"
        )
    split = dataset.get("eval_split", 0.0)
    if not isinstance(split, int | float) or not 0 <= split < 1:
        raise UserError(f"dataset.eval_split={split} is not a fraction: give one from 0 up to, not including, 1")
    if config.eval_steps and not split:
        raise UserError(f"eval_steps={config.eval_steps} needs held-out episodes: give dataset.eval_split=0.1, say")
    if config.mode is not Mode.demos and not 1 <= config.demos.n_episodes <= MAX_DEMOS:
        raise UserError(f"demos.n_episodes={config.demos.n_episodes} is out of range: give 1 to {MAX_DEMOS}")


def _are_numbers(episodes: Any) -> bool:
    return (
        isinstance(episodes, list)
        and all(isinstance(episode, int) and episode >= 0 for episode in episodes)
        and 0 < len(set(episodes)) == len(episodes)
    )
