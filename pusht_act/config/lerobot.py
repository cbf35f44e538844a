"""The bridge to LeRobot's own configuration classes: the only module that knows draccus.

Each section of our configuration is decoded on its own, so that an error names section, key and reason. The import of
LeRobot's configuration takes seconds, which is why nothing that answers at once imports this module.

Import it before any other part of LeRobot: it spares the process a second of imports.
"""

# ruff: noqa: E402

import dataclasses
import difflib
import importlib.util
import inspect
import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from lerobot.utils import import_utils

# LeRobot's package of policies imports every policy, which registers "act". GR00T's processors import LeRobot's data
# sets, with them Hugging Face's `datasets` and pandas, if these are installed. Training and evaluating ACT has no use
# for them, so for this once they are not. data/sampler.py imports LeRobot's sampler late for the same reason.
_installed = import_utils._datasets_available
import_utils._datasets_available = False
try:
    import lerobot.policies  # noqa: F401
finally:
    import_utils._datasets_available = _installed

import draccus
import torch
import torchvision
from draccus.utils import DraccusException
from lerobot.configs.default import DatasetConfig, EvalConfig, WandBConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.envs.configs import EnvConfig, PushtEnv
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from lerobot.policies.act.configuration_act import ACTConfig

from pusht_act.config.lerobot_fields import FIELDS_FILE
from pusht_act.config.schema import OUR_DATASET_KEYS, Config
from pusht_act.runtime.errors import UserError, join_some, shorten

# Classes of LeRobot that other rooms take from here, so that each room imports LeRobot in one place.
__all__ = ["DatasetConfig", "PushtEnv", "TrainPipelineConfig"]

log = logging.getLogger(__name__)

DATASET_KEYS = ("repo_id", "root", "episodes", "revision", "use_imagenet_stats", "eval_split")
"""The fields of LeRobot's DatasetConfig that mean something here; any other would do nothing and is refused."""
ACTIVATIONS = ("relu", "gelu", "glu")
POLICY_REFUSED = {
    "use_peft": "adapters are not trained here: leave it false",
    "pretrained_revision": "the newest of the Hub is taken, leave it out",
}
ENV_REFUSED = {
    "observation_width": "the image size is taken from the data set, leave it out",
    "observation_height": "the image size is taken from the data set, leave it out",
    "render_mode": "frames are always rgb_array, leave it out",
    "features": "what there is follows from env.obs_type, leave it out",
    "features_map": "LeRobot's names are fixed, leave it out",
    "max_parallel_tasks": "PushT is one task, leave it out",
    "disable_env_checker": "the environment is known to be sound, leave it out",
}


@dataclasses.dataclass(frozen=True)
class LeRobotConfig:
    """LeRobot's view of a job."""

    policy: ACTConfig
    env: PushtEnv
    dataset: DatasetConfig
    optimizer: AdamWConfig
    scheduler: LRSchedulerConfig | None


def decode(config: Config) -> LeRobotConfig:
    """Decode LeRobot's sections of `config`.

    Raises:
        UserError: naming the section's key, its value and the reason LeRobot gives.
    """
    policy = decode_policy(config.policy)
    return LeRobotConfig(
        policy=policy,
        env=decode_env(config.env),
        dataset=_decode_dataset(config.dataset),
        optimizer=_decode_optimizer(policy, config.optimizer),
        scheduler=_decode_scheduler(config.scheduler) if config.scheduler else None,
    )


def decode_policy(section: dict[str, Any]) -> ACTConfig:
    """`section` as LeRobot's ACTConfig, its device resolved by `resolve_device`."""
    _refuse("policy", section, POLICY_REFUSED)
    policy = _decode("policy", PreTrainedConfig, {**section, "device": resolve_device(section.get("device", "auto"))})
    assert isinstance(policy, ACTConfig)
    _check_architecture(policy)
    return policy


def _check_architecture(policy: ACTConfig) -> None:
    """What torch and torchvision object to when ACT is made, without naming the key."""
    # Sizes and names of the transformer.
    if policy.dim_model % policy.n_heads:
        raise UserError(
            f"policy.dim_model={policy.dim_model} is not a multiple of policy.n_heads={policy.n_heads}: "
            f"give policy.dim_model={policy.dim_model // policy.n_heads * policy.n_heads or policy.n_heads}, say"
        )
    if missing := [kind for kind in ("VISUAL", "STATE", "ACTION") if kind not in policy.normalization_mapping]:
        raise UserError(
            f"policy.normalization_mapping={dict(policy.normalization_mapping)} says nothing of {', '.join(missing)}, "
            "which would stay as they are: give all of VISUAL, STATE, ENV, ACTION"
        )
    if policy.feedforward_activation not in ACTIVATIONS:
        raise UserError(
            f"policy.feedforward_activation={policy.feedforward_activation} is unknown: give {', '.join(ACTIVATIONS)}"
        )
    if not 0 <= policy.dropout < 1:
        raise UserError(f"policy.dropout={policy.dropout} is out of range: give a number in [0, 1)")
    # The backbone and its weights, by torchvision's names.
    if policy.vision_backbone not in (backbones := torchvision.models.list_models(include="resnet*")):
        raise UserError(f"policy.vision_backbone={policy.vision_backbone} is unknown: give {', '.join(backbones)}")
    weights = [str(weights) for weights in torchvision.models.get_model_weights(policy.vision_backbone)]
    if policy.pretrained_backbone_weights not in (None, *weights, *(name.split(".")[1] for name in weights)):
        raise UserError(
            f"policy.pretrained_backbone_weights={policy.pretrained_backbone_weights} is not of "
            f"policy.vision_backbone={policy.vision_backbone}: give {', '.join(weights)} or null"
        )


def decode_env(section: dict[str, Any]) -> PushtEnv:
    """`section` as LeRobot's PushtEnv."""
    _refuse("env", section, ENV_REFUSED)
    env = _decode("env", EnvConfig, section)
    if not isinstance(env, PushtEnv):
        raise UserError(f"env.type={section.get('type')} is not evaluated here: give env.type=pusht")
    if env.task != PushtEnv.task:
        raise UserError(f"env.task={env.task} is not in gym-pusht: give env.task={PushtEnv.task}")
    if env.obs_type not in ("pixels_agent_pos", "environment_state_agent_pos"):
        raise UserError(
            f"env.obs_type={env.obs_type} gives ACT nothing to look at: give pixels_agent_pos (env=pusht) or "
            "environment_state_agent_pos (env=pusht_keypoints)"
        )
    return env


def resolve_device(name: str) -> str:
    """`auto` is cuda when there is one, else cpu; a device asked for by name must be there.

    LeRobot itself switches to the CPU with a warning, which costs the user a night.
    """
    # Chosen by us, so it is said.
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        _say_device(name)
        return name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"policy.device={name} is not on this machine: give policy.device=cpu, or auto to take what there is"
        ) from error
    return name


@cache
def _say_device(name: str) -> None:
    """Log the device that was chosen, once for all the jobs of a process."""
    log.info("device: %s", name)


def observation_keys(env: PushtEnv) -> set[str]:
    """The policy's names of what `env` observes, such as observation.image and observation.state."""
    return {env.features_map[key] for key in env.features if key != "action"}


def check_observations(policy: ACTConfig, env: PushtEnv) -> None:
    """Refuse an environment that does not observe what `policy` was trained to look at.

    Raises:
        UserError: naming both.
    """
    needs, has = set(policy.input_features or {}), observation_keys(env)
    if not needs <= has:
        fitting = "pusht_keypoints" if policy.env_state_feature is not None else "pusht"
        raise UserError(
            f"env.obs_type={env.obs_type} observes {', '.join(sorted(has))}, the checkpoint's policy looks at "
            f"{', '.join(sorted(needs))}: leave it out, or give the values of env={fitting}"
        )


def train_pipeline_config(config: Config, lerobot: LeRobotConfig, wandb_run_id: str | None) -> TrainPipelineConfig:
    """The job as stock `lerobot-train` would write it into a checkpoint, so that it can go on from ours."""
    # Only what stock reads: our own sections are in the metadata of the checkpoint.
    return TrainPipelineConfig(
        dataset=lerobot.dataset,
        env=lerobot.env,
        policy=lerobot.policy,
        output_dir=Path(config.output_dir),
        job_name=config.job_name,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=config.steps,
        env_eval_freq=config.eval_freq,
        log_freq=config.log_freq,
        eval_steps=config.eval_steps,
        save_checkpoint=config.save_checkpoint,
        save_freq=config.save_freq,
        optimizer=lerobot.optimizer,
        scheduler=lerobot.scheduler,
        rename_map=config.rename_map or {},
        # PushT's environments are registered by an import, which stock's worker processes do not have.
        eval=EvalConfig(config.eval.n_episodes, config.eval.batch_size, use_async_envs=False),
        wandb=WandBConfig(
            enable=config.wandb.enable,
            project=config.wandb.project,
            entity=config.wandb.entity,
            notes=config.wandb.notes,
            mode=config.wandb.mode,
            run_id=wandb_run_id,
            add_tags=config.wandb.add_tags,
            disable_artifact=config.wandb.disable_artifact,
        ),
    )


def _decode_dataset(section: dict[str, Any]) -> DatasetConfig:
    for key, value in section.items():
        if key not in DATASET_KEYS and key in {f.name for f in dataclasses.fields(DatasetConfig)}:
            raise UserError(f"dataset.{key}={value} is not supported: leave it out")
    stock = {key: value for key, value in section.items() if key not in OUR_DATASET_KEYS}
    dataset: DatasetConfig = _decode("dataset", DatasetConfig, {"video_backend": "pyav", **stock})
    return dataset


def _decode_optimizer(policy: ACTConfig, section: dict[str, Any]) -> AdamWConfig:
    preset = policy.get_optimizer_preset()
    if section.get("type", preset.type) != preset.type:
        raise UserError(f"optimizer.type={section['type']} is not used here: give {preset.type} or leave it out")
    for key in ("lr", "weight_decay"):
        if key in section:
            raise UserError(f"optimizer.{key}={section[key]} belongs to the policy: give policy.optimizer_{key}=")
    options = {key: value for key, value in section.items() if key != "type"}
    optimizer: AdamWConfig = _decode("optimizer", AdamWConfig, dataclasses.asdict(preset) | options)
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise UserError(f"optimizer.betas={list(optimizer.betas)}: give two numbers in [0, 1)")
    return optimizer


def _decode_scheduler(section: dict[str, Any]) -> LRSchedulerConfig:
    if section.get("type") == "diffuser" and importlib.util.find_spec("diffusers") is None:
        raise UserError("scheduler.type=diffuser needs the package diffusers: install it, or give another type")
    scheduler: LRSchedulerConfig = _decode("scheduler", LRSchedulerConfig, section)
    return scheduler


def _refuse(name: str, section: dict[str, Any], refused: dict[str, str]) -> None:
    for key, reason in refused.items():
        if section.get(key) not in (None, False):
            raise UserError(f"{name}.{key}={section[key]}: {reason}")


def _decode(name: str, cls: Any, section: dict[str, Any]) -> Any:
    """draccus.decode, its error as one line; draccus keeps the reason in `__cause__`.

    ACTConfig itself raises NotImplementedError at temporal ensembling with n_action_steps above 1.
    """
    try:
        return draccus.decode(cls, section)
    except (DraccusException, NotImplementedError) as error:
        target = cls
        # One of several, by its `type`.
        if inspect.isabstract(cls):
            choices = cls.get_known_choices()
            kind = section.get("type")
            if kind not in choices:
                raise UserError(f"{name}.type={kind} is unknown: give one of {', '.join(sorted(choices))}") from error
            target = choices[kind]
        known = [f.name for f in dataclasses.fields(target) if f.init]
        for key in section:
            if key not in [*known, "type"]:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {name}.{near[0]}?" if near else f"{target.__name__} has {join_some(known)}"
                raise UserError(f"{name}.{key} is unknown: {hint}") from error
        raise UserError(_reason(name, error, section)) from error


def _reason(name: str, error: Exception, section: dict[str, Any]) -> str:
    """What LeRobot objects to, with the key and the value given."""
    text = str(error)
    if error.__cause__ is not None and "Couldn't instantiate" in text:
        text = str(error.__cause__)
    text = shorten(" ".join(text.split()))
    key = next((word for word in re.findall(r"`(\w+)`", text) if word in section), None)
    if missing := re.findall(r"`(\w+)`", text) if text.startswith("Missing required field") else []:
        return f"{name}.{missing[0]} has no value: give {', '.join(f'+{name}.{field}=VALUE' for field in missing)}"
    if key is None:
        return f"{name}: {text}"
    if wanted := re.search(r"of type (.+)\. Underlying error", text):
        text = f"give a {wanted[1]}"
    return f"{name}.{key}={section[key]}: {text.removeprefix(f'`{key}`: ')}"


def describe_fields() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the type and the default of each field of LeRobot's, by section and name, as lerobot_fields.json has them.

    A field without a default has none there.
    """
    classes = {"policy": ACTConfig, "env": PushtEnv, "dataset": DatasetConfig, "optimizer": AdamWConfig}
    return {section: {f.name: _describe_field(f) for f in dataclasses.fields(cls)} for section, cls in classes.items()}


def _describe_field(field: dataclasses.Field[Any]) -> dict[str, Any]:
    described = {"type": field.type.__name__ if isinstance(field.type, type) else str(field.type)}
    if field.default is not dataclasses.MISSING:
        return described | {"default": draccus.encode(field.default)}
    if field.default_factory is not dataclasses.MISSING:
        return described | {"default": draccus.encode(field.default_factory())}
    return described


if __name__ == "__main__":
    FIELDS_FILE.write_text(json.dumps(describe_fields(), indent=2) + "\n")
