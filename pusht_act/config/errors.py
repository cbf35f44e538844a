"""Errors in one line for the user: what, where, the value given and what to do.

A misspelt key is refused by Hydra, which knows the fields that schema.py declares and what is in conf/; with a + before
it by validation.py, and in LeRobot's sections by lerobot.py. Here it is answered with the key that was meant.
"""

import difflib
import errno
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from pusht_act.config.aliases import RENAMED
from pusht_act.config.lerobot_fields import lerobot_fields
from pusht_act.config.validation import TEXT_OPTIONS
from pusht_act.runtime.errors import UserError, shorten

RATE = "policy.optimizer_lr"
CLIPPING = "+optimizer.grad_clip_norm"
WEIGHT_DECAY = "+policy.optimizer_weight_decay"
EPOCHS = "steps (one epoch is the number of frames / batch_size)"
# Names that have never been ours: of older LeRobots, of LeRobot's command line, of the ACT paper's code, and of other
# frameworks. They are not accepted, since what they mean there is not always what ours means.
HINTS = {
    "policy.hidden_dim": "policy.dim_model",
    "policy.dim_feedforward_network": "policy.dim_feedforward",
    "policy.lr": "policy.optimizer_lr",
    "policy.name": "policy.type",
    "env_eval_freq": "eval_freq",
    "lr": "policy.optimizer_lr",
    "chunk_size": "policy.chunk_size",
    "device": "policy.device",
    "dataset_repo_id": "dataset.repo_id",
    "training.steps": "steps",
    "training.offline_steps": "steps",
    "training.batch_size": "batch_size",
    "training.lr": "policy.optimizer_lr",
    "training.eval_freq": "eval_freq",
    "training.save_freq": "save_freq",
    "eval.seed": "eval.start_seed",
    "resume": "mode=resume",
    "config_path": "resume.path",
    "checkpoint.keep_last": "checkpoints.keep_last",
    "checkpoint.keep_every": "checkpoints.keep_every",
    "checkpoint.background": "checkpoints.background",
    "policy.path": "checkpoint (mode=eval), resume.path (mode=resume) or +policy.pretrained_path (fine-tuning)",
    **dict.fromkeys(("max_steps", "num_train_steps", "train_steps", "train.steps", "max_train_steps"), "steps"),
    **dict.fromkeys(("num_steps", "n_steps", "total_steps", "training_steps", "max_iters", "iterations"), "steps"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs", "train.epochs"), EPOCHS),
    **dict.fromkeys(("bs", "train_batch_size", "per_device_train_batch_size", "train.batch_size"), "batch_size"),
    **dict.fromkeys(("learning_rate", "train.lr", "optimizer.lr", "train.learning_rate"), RATE),
    **dict.fromkeys(("weight_decay", "train.weight_decay", "optimizer.weight_decay"), WEIGHT_DECAY),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "lr_warmup_steps"), "+scheduler.num_warmup_steps"),
    **dict.fromkeys(("lr_scheduler", "scheduler_type", "lr_scheduler_type"), "+scheduler.type"),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision", "precision"), "train.precision"),
    **dict.fromkeys(("num_envs", "n_envs", "eval_batch_size"), "eval.batch_size"),
    **dict.fromkeys(("num_episodes", "n_episodes"), "eval.n_episodes or demos.n_episodes"),
    **dict.fromkeys(("run_name", "exp_name", "experiment_name"), "job_name"),
    **dict.fromkeys(("save_dir", "log_dir", "out_dir", "outdir", "run_dir", "logging_dir"), "output_dir"),
    **dict.fromkeys(("dropout", "train.dropout"), "+policy.dropout"),
    **dict.fromkeys(("use_wandb", "wandb.enabled"), "wandb.enable"),
    **dict.fromkeys(("resume_from", "resume_from_checkpoint"), "resume.path (mode=resume)"),
    **dict.fromkeys(("lr_backbone", "train.lr_backbone"), "policy.optimizer_lr_backbone"),
    **dict.fromkeys(("grad_clip", "grad_clip_norm", "gradient_clip", "max_grad_norm", "train.grad_clip"), CLIPPING),
    "num_workers": "eval.workers or demos.workers",
    **dict.fromkeys(("save_interval", "save_every", "save_steps"), "save_freq"),
    **dict.fromkeys(("log_interval", "log_every", "logging_steps"), "log_freq"),
    **dict.fromkeys(("eval_interval", "eval_every"), "eval_freq"),
    **dict.fromkeys(("ckpt_path", "checkpoint_path"), "checkpoint (mode=eval) or resume.path (mode=resume)"),
    "wandb_project": "wandb.project",
    **dict.fromkeys(("dataset.rename", "dataset.rename_map", "policy.rename_map"), "rename_map"),
    **dict.fromkeys(("observations", "dataset.features", "policy.observations"), "dataset.observations"),
    "allow_change": "dataset.allow_change",
    **RENAMED,
}
"""What to give in place of a name that is not there."""
REMOVED = {
    "mode=dagger": "mode=dagger was removed: mode=full trains on demonstrations, dataset=demos on the built-in ones",
    "dagger": "dagger.* was removed together with mode=dagger: leave it out",
}
"""What to say of a choice or a section that there is no more."""


LEROBOT_SECTIONS = ("policy", "env", "dataset", "optimizer", "scheduler")
SEVERAL = "{0} gives several values: add -m to sweep over them{1}"
HYDRA_SAYS = {
    r"Ambiguous value for argument '(.+)'": SEVERAL,
    r"Sweep parameters '(.+)' requires --multirun": SEVERAL,
    r"(BasicSweeper) does not support sweep type : INTERVAL_SWEEP": (
        "interval(...) has values without end: give hydra/sweeper=optuna too, or list the values"
    ),
    r"An item is already at '(.+)'": "+{0}: {0} is there already, leave the + out",
    r"(\S+) appears more than once in the final defaults list": "+{0}: {0} is chosen already, leave the + out",
    r"Multiple values for (\S+)\. To override": "+{0}: {0} is chosen already, leave the + out",
    r"Could not delete(?: from config\.)? '(.+)'": "~{0}: there is no {0} to remove, leave it out",
}
"""What Hydra's messages mean here, by a pattern of them."""
TYPE_WANTED = {
    "converted to Integer": "give a whole number",
    "converted to Float": "give a number",
    "not a valid bool": "give true or false",
    "to string": "give one text",
    "is not Optional": "it must have a value",
    "Invalid type assigned": "it is a section, give one of its keys; --cfg job shows them",
}
"""The remedy, by a part of OmegaConf's objection to a value."""


def explain(error: BaseException, config_dir: str) -> str:
    """Return `error` as one line."""
    # A value in the message may be a whole file's text.
    text = shorten(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename} cannot be written: " if error.filename else ""
        return f"{where}{error.strerror}: make room, then give the same command again"
    # One of Hydra's errors is an OSError, too.
    is_ours = isinstance(error, UserError | OSError) and not isinstance(error, HydraException)
    return " ".join(text.split()) if is_ours else _explain_hydra(error, text, config_dir)


def _explain_hydra(error: BaseException, text: str, config_dir: str) -> str:
    """Return an error of Hydra's or OmegaConf's: they raise one class for many causes, so their words have to tell."""
    if isinstance(error, OverrideParseException):
        wanted = _quoted(error.override) or "KEY=VALUE, a value of special characters in quotes"
        return f"{error.override!r} cannot be read: give {wanted}"
    if (said := _explain_override(error, config_dir)) is not None:
        return said
    if (said := _explain_choice(error, config_dir)) is not None:
        return said
    for pattern, meaning in HYDRA_SAYS.items():
        if match := re.search(pattern, text):
            quoted = _quoted(match[1])
            return meaning.format(match[1], f", or give {quoted} for one text" if quoted else ", or give one of them")
    return " ".join(text.partition("\nSee https")[0].split())


def _explain_override(error: BaseException, config_dir: str) -> str | None:
    """Return what to say of a key or a value that Hydra cannot merge; None for any other error."""
    text, cause = str(error), str(error.__cause__)
    if match := re.search(r"Could not override '([^']+)'", text):
        # Of a whole section, such as eval={n_episode:3}, the key that is not there.
        inner = re.search(r"full_key: (\S+)", cause)
        key = inner[1] if inner and inner[1].startswith(f"{match[1]}.") else match[1]
        return explain_unknown(key, lambda: _known_keys(config_dir))
    if match := re.search(r"Error merging override ((\S+?)=.*)", text):
        if inner := re.search(r"Key '(\w+)' not in", cause):
            return explain_unknown(f"{match[2].lstrip('+')}.{inner[1]}", lambda: _known_keys(config_dir))
        return _wrong_value(match[1], match[2], cause)
    return None


def explain_unknown(key: str, known_keys: Callable[[], list[str]]) -> str:
    """Return what to say of a key that is not there, and which one was meant.

    Args:
        key: The dotted key.
        known_keys: Returns the keys that there are.
    """
    if (section := key.partition(".")[0]) in REMOVED:
        return REMOVED[section]
    if key in HINTS:
        return f"{key} is unknown: did you mean {HINTS[key]}?"
    if key.startswith("hydra.sweeper."):
        return f"{key} is unknown: hydra/sweeper=optuna has options, see conf/hydra/sweeper/optuna.yaml"
    # Composing takes half a second, which only somebody who mistyped a key waits for.
    known = known_keys()
    section, _, leaf = key.rpartition(".")
    if section in LEROBOT_SECTIONS:
        siblings = [k for k in known if k.rpartition(".")[0] == section]
        others = [f"{section}.{name}" for name in lerobot_fields().get(section, {})]
        named = {**{k: f"+{k}" for k in others}, **{k: k for k in siblings}}
        near = [] if key in named else difflib.get_close_matches(key, named, n=1, cutoff=0.85)
        near = [named[k] for k in near] or [k for k in known if k == leaf]
        hint = f"did you mean {near[0]}?" if near else f"+{key}=VALUE reaches LeRobot's other fields"
        return f"{key} is not in conf/: {hint}"
    # The same name in another section is nearer than a similar one.
    near = [k for k in known if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"{key} is unknown: " + (f"did you mean {near[0]}?" if near else "--cfg job shows the keys there are")


def explain_dashes(given: str, name: str, value: str, config_dir: str) -> str:
    """Return what to say of `given`, an option with dashes that has a name and a value."""
    if name in HINTS and " " in HINTS[name]:
        return f"{given}: did you mean {HINTS[name]}? Options have no dashes here"
    key = HINTS.get(name, name)
    section, _, leaf = key.rpartition(".")
    known = _known_keys(config_dir)
    # A choice, such as mode=resume, has its value already.
    if "=" in key:
        return f"{given}: options have no dashes here, give {key}"
    if key.lstrip("+") in known or leaf in lerobot_fields().get(section.lstrip("+"), {}):
        prefix = "" if key in known or key.startswith("+") else "+"
        return f"{given}: options have no dashes here, give {shlex.quote(f'{prefix}{key}={value}')}"
    return f"{given}: options have no dashes here, and {explain_unknown(name, lambda: known)}"


def _quoted(override: str) -> str:
    """Return `override` for a shell with its value in quotes; empty if its value is no text."""
    key, equals, value = override.partition("=")
    if key.lstrip("+") not in TEXT_OPTIONS:
        return ""
    text = value.strip("'\"")
    for quoted in (f'{key}="{text}"', f"{key}='{text}'"):
        try:
            read = OverridesParser.create().parse_override(quoted)
        except OverrideParseException:
            continue
        if equals and text and read.value() == text:
            return shlex.quote(quoted)
    return ""


def _wrong_value(given: str, key: str, objection: str) -> str:
    if key in HINTS:
        return f"{given}: did you mean {HINTS[key]}?"
    wanted = next((remedy for part, remedy in TYPE_WANTED.items() if part in objection), objection.splitlines()[0])
    return f"{given}: {wanted}"


def _explain_choice(error: BaseException, config_dir: str) -> str | None:
    """Return what to say of a group's choice that is not there; None for any other error."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (match := re.search(r"Could not find '(.+)/([^/']+)'", text)):
        # The choice may have a slash, such as lerobot/pusht, which Hydra takes for one of the group's name.
        group, _, rest = match[1].partition("/")
        if (Path(config_dir) / group).is_dir() and not (Path(config_dir) / match[1]).is_dir():
            available = sorted(path.stem for path in (Path(config_dir) / group).glob("*.yaml"))
            return _unknown_choice(group, "/".join(filter(None, (rest, match[2]))), available)
        # Hydra lists the choices, each on a line of its own after a tab.
        return _unknown_choice(match[1], match[2], re.findall(r"^\t(\w+)$", text, flags=re.MULTILINE))
    if match := re.search(r"Config group override must be a string or a list.*: \+*([^=]+)=(.*)", text):
        choices = sorted(path.stem for path in (Path(config_dir) / match[1]).glob("*.yaml"))
        return _unknown_choice(match[1], match[2], choices)
    return None


def _unknown_choice(group: str, choice: str, available: list[str]) -> str:
    if (removed := REMOVED.get(f"{group}={choice}")) is not None:
        return removed
    near = [f"{group}={each}" for each in difflib.get_close_matches(choice.rpartition("/")[2], available, n=1)]
    if group == "dataset" and "/" in choice:
        near.append(f"dataset.repo_id={choice}")
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{group}={choice} does not exist: {hint}there is {', '.join(available) or 'nothing in that group'}"


def _known_keys(config_dir: str) -> list[str]:
    """Every key and group of the default configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=config_dir, version_base="1.3"):
        cfg = compose("config", return_hydra_config=True)
    groups = [group for group in cfg.hydra.runtime.choices if not group.startswith("hydra/")]
    return groups + [key for key in _paths(cfg) if not key.startswith("hydra.")]


def _paths(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key):
            continue
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_interpolation(cfg, key) and isinstance(cfg[key], DictConfig):
            keys += _paths(cfg[key], f"{prefix}{key}.")
    return keys
