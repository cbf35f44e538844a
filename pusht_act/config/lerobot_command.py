"""Print the stock LeRobot command line that does what a job of ours does."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from pusht_act.config.schema import AUTO, EMBEDDED_REPO_ID, OUR_DATASET_KEYS, Config, Mode
from pusht_act.runtime.errors import UserError

NO_EQUIVALENT = {
    "freeze_backbone_at": None,
    "mirror": 0.0,
    "random_shift": 0,
    "state_noise": 0.0,
    "chunk_discount": 1.0,
}
"""Options of `train` that stock does not have, and the value that means without."""
WANDB_FIELDS = ("project", "entity", "mode", "notes", "run_id", "add_tags", "disable_artifact")
RESTORED = ("policy.optimizer_lr", "policy.optimizer_lr_backbone", "policy.optimizer_weight_decay")
"""What stock takes from the optimizer's saved state on a resume, whatever its command line says."""


def lerobot_command(config: Config, model_dir: Path | None = None) -> str:
    """Return the `lerobot-train` or `lerobot-eval` command for `config`, one flag a line, ready to paste.

    `model_dir` is that of the checkpoint which mode=resume or mode=eval found. LeRobot has one seed for training and
    evaluation, no episode seeds of its own: lerobot-eval gets eval.start_seed as --seed, and stock training evaluates
    on seeds from --seed up.

    Raises:
        UserError: stock LeRobot cannot do this job.
    """
    match config.mode:
        case Mode.eval:
            assert model_dir is not None
            program, flags = "lerobot-eval", _eval_flags(config, model_dir)
        case Mode.resume:
            assert model_dir is not None
            program, flags = "lerobot-train", _resume_flags(config, model_dir)
        case Mode.test | Mode.full:
            program, flags = "lerobot-train", _train_flags(config) | _optimizer_flags(config)
        case Mode.demos:
            raise UserError("print_lerobot_command=true: LeRobot makes no demonstrations of PushT, leave it out")
    # Quoted for a shell; a backslash at each line's end makes it one command.
    words = [f"--{key}={_text(value)}" for key, value in flags.items()]
    return " \\\n  ".join([program, *map(shlex.quote, words)])


def _train_flags(config: Config) -> dict[str, Any]:
    """All of a training job but optimizer and schedule."""
    if config.dataset["repo_id"] == EMBEDDED_REPO_ID:
        raise UserError(
            f"dataset.repo_id={EMBEDDED_REPO_ID} is embedded in this package, lerobot-train cannot read it: "
            "give dataset=pusht or dataset.root=PATH"
        )
    if path := config.policy.get("pretrained_path"):
        raise UserError(
            f"policy.pretrained_path={path} has no equivalent: lerobot-train takes the statistics of the data set in "
            "place of the checkpoint's; leave it out"
        )
    if (observations := config.dataset.get("observations")) is not None:
        raise UserError(
            f"dataset.observations={observations} has no equivalent: lerobot-train reads all that a data set has; "
            "leave it out"
        )
    if config.rename_map:
        raise UserError(
            f"rename_map={config.rename_map} has no equivalent: lerobot-train renames for a pretrained policy only; "
            "leave it out"
        )
    _check_step(config)
    dataset = {key: value for key, value in config.dataset.items() if key not in OUR_DATASET_KEYS}
    # Named one by one: what stock LeRobot does not know must not reach its command line.
    wandb = config.wandb
    return {
        **_section("dataset", {"video_backend": "pyav", **_given(dataset)}),
        **_section("env", config.env),
        **_section("policy", _policy(config)),
        "seed": config.seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "log_freq": config.log_freq,
        "env_eval_freq": config.eval_freq,
        "eval_steps": config.eval_steps,
        "save_checkpoint": config.save_checkpoint,
        "save_freq": config.save_freq,
        "eval.n_episodes": config.eval.n_episodes,
        "eval.batch_size": config.eval.batch_size,
        "eval.use_async_envs": False,
        "output_dir": config.output_dir,
        "job_name": config.job_name,
        "wandb.enable": wandb.enable,
        **_section("wandb", _given({key: getattr(wandb, key) for key in WANDB_FIELDS})),
    }


def _check_step(config: Config) -> None:
    """Refuse a step that stock does not take."""
    train, policy = config.train, config.policy
    if train.precision in ("bf16", AUTO) and not policy.get("use_amp"):
        raise UserError(
            f"train.precision={train.precision} has no equivalent: lerobot-train evaluates as it trains; give "
            "policy.use_amp=true"
        )
    from_scratch = policy.get("pretrained_backbone_weights", AUTO) is None and "pixels" in config.env["obs_type"]
    if (train.backbone_norm or ("batch" if from_scratch else "frozen")) == "batch":
        raise UserError(
            "train.backbone_norm=batch, which is also what random weights have, has no equivalent: lerobot-train's "
            "norms are frozen; give train.backbone_norm=frozen"
        )
    if config.ema.enable:
        raise UserError("ema.enable=true has no equivalent in LeRobot 0.6: give ema.enable=false")
    for name, none in NO_EQUIVALENT.items():
        if (value := getattr(train, name)) != none:
            raise UserError(f"train.{name}={value} has no equivalent in lerobot-train: give train.{name}={none}")


def _optimizer_flags(config: Config) -> dict[str, Any]:
    """Stock takes the policy's preset, or else an optimizer and a schedule both given in full."""
    if not config.optimizer and not config.scheduler:
        return {}
    from pusht_act.config.lerobot import decode  # takes seconds, but the defaults are LeRobot's

    # The command may be for elsewhere.
    here = dataclasses.replace(config, policy={**_policy(config), "device": "cpu"})
    constant = {"type": "constant_with_warmup", "num_warmup_steps": 0}
    return {
        "use_policy_training_preset": False,
        **_section("optimizer", {"type": "adamw", **dataclasses.asdict(decode(here).optimizer)}),
        **_section("scheduler", config.scheduler or constant),
    }


def _resume_flags(config: Config, model_dir: Path) -> dict[str, Any]:
    """The checkpoint's own configuration, and what verify_manifest from it."""
    path = model_dir / "train_config.json"
    saved = json.loads(path.read_text())
    sections = {"optimizer": config.optimizer, "scheduler": config.scheduler}
    wanted = _train_flags(config) | {f"{name}.{k}": v for name in sections for k, v in sections[name].items()}
    changed = _changed(wanted, saved)
    # Stock LeRobot restores these with the optimizer's state and ignores the flag: a command that lies is refused.
    for key, value in changed.items():
        if key in RESTORED or (key.startswith(("optimizer.", "scheduler.")) and key != "optimizer.grad_clip_norm"):
            raise UserError(
                f"{key}={value} has no equivalent: lerobot-train restores the checkpoint's own when it resumes; "
                f"leave {key} out"
            )
    return {"config_path": path, "resume": True} | changed


def _eval_flags(config: Config, model_dir: Path) -> dict[str, Any]:
    saved = {"policy": json.loads((model_dir / "config.json").read_text())}
    # A name that is no path here is a model on the Hub, which stock LeRobot fetches by itself.
    on_hub = not Path(str(config.checkpoint)).exists()
    return {
        "policy.path": config.checkpoint if on_hub else model_dir,
        **_section("env", config.env),
        **_changed(_section("policy", _policy(config)), saved),
        "eval.n_episodes": config.eval.n_episodes,
        "eval.batch_size": config.eval.batch_size,
        "eval.use_async_envs": False,
        "seed": config.eval.start_seed,
    }


def _policy(config: Config) -> dict[str, Any]:
    """Without what is automatic: stock then takes a GPU where there is one, and ImageNet's weights."""
    return {key: value for key, value in config.policy.items() if value != AUTO}


def _changed(flags: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The flags whose value is not the one in `saved`, a tree of sections."""

    def at(tree: Any, keys: list[str]) -> Any:
        return at(tree.get(keys[0]), keys[1:]) if keys and isinstance(tree, dict) else tree

    return {key: value for key, value in flags.items() if at(saved, key.split(".")) != value}


def _given(section: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls, where null is LeRobot's default as well."""
    return {key: value for key, value in section.items() if value is not None}


def _section(name: str, section: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in section.items()}


def _text(value: Any) -> str:
    """As LeRobot's parser, which reads YAML, gives it back."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str):
        return json.dumps(value)
    # A text such as "1e3" or "null" would be read as something else.
    try:
        return value if yaml.safe_load(value) == value else _quoted(value)
    except yaml.YAMLError:
        return _quoted(value)


def _quoted(value: str) -> str:
    return yaml.safe_dump(value, default_style='"', width=len(value) * 8 + 8, allow_unicode=True).strip()
