"""Which checkpoint a job resumes: the one that mode=resume names, or with resume.auto=true that of the same job.

Imports neither torch nor lerobot.
"""

import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pusht_act.checkpoints.checkpoint import (
    EMA_DIR,
    Checkpoint,
    find_checkpoint,
    last_checkpoint,
    latest_valid,
    verify,
)
from pusht_act.checkpoints.manifest import ALL_FILES
from pusht_act.checkpoints.merge_config import STOCK_FILE
from pusht_act.config.aliases import rename_config
from pusht_act.config.lerobot_fields import lerobot_fields
from pusht_act.config.overrides import flatten, is_output_dir_typed
from pusht_act.config.schema import (
    AUTOMATIC,
    OUR_SECTIONS,
    TRAIN_MODES,
    TRAINING,
    Config,
    Mode,
    to_dict,
)
from pusht_act.runs.commands import resume_command
from pusht_act.runs.run_dir import RunDir, ensure_unused
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.stored import read_json

log = logging.getLogger(__name__)

RESULT_NEUTRAL_KEYS = (
    *("output_dir", "job_name", "overwrite", "log_freq", "save_freq", "wandb.", "checkpoints.", "train.profile"),
    *("eval.n_videos", "eval.workers", "eval.background"),
    *("policy.push_to_hub", "policy.repo_id", "demos.repo_id", "resume.", "sweep.", "cluster.", "mode", "steps"),
    "dataset.allow_change",
)
"""Beginnings of keys that may differ when resume.auto resumes a run: they do not affect its results."""


def resolve_run_dir(cfg: DictConfig, overrides: list[str]) -> Path:
    """Return the run directory of a job that trains: for mode=resume that of the checkpoint it names, if it has one."""
    if cfg.mode is Mode.resume and cfg.resume.path is not None and not is_output_dir_typed(overrides):
        checkpoint = find_checkpoint(cfg.resume.path, "resume.path")
        if checkpoint.run_dir is not None:
            return checkpoint.run_dir
    return Path(cfg.output_dir)


def checkpoint_to_resume(cfg: DictConfig, output_dir: Path) -> Checkpoint:
    """Return the checkpoint that mode=resume resumes in `output_dir`.

    Raises:
        UserError: it is damaged, or its run has later checkpoints.
        FileNotFoundError: there is none.
        FileExistsError: it belongs to another run, and `output_dir` is in use.
    """
    # Without a path: the last one of the run directory.
    if cfg.resume.path is None:
        return last_checkpoint(RunDir(output_dir))
    checkpoint = find_checkpoint(cfg.resume.path, "resume.path")
    # The optimizer's moments are those of the weights themselves.
    if checkpoint.model_dir.name == EMA_DIR:
        raise UserError(
            f"resume.path={cfg.resume.path} is an average of the weights, which nothing trains: give "
            f"{checkpoint.directory}, or start from it with +policy.pretrained_path={checkpoint.model_dir}"
        )
    verify(checkpoint, f"resume.path={cfg.resume.path}", ALL_FILES)

    # Resuming a run from before its last checkpoint would mix two histories in one directory.
    if checkpoint.run_dir == output_dir.resolve():
        last, _ = latest_valid(RunDir(output_dir))
        if last is not None and last.step > checkpoint.step:
            raise UserError(
                f"resume.path={cfg.resume.path} is at step {checkpoint.step}, its run has reached {last.step}: "
                "give output_dir=NEW to branch off, or leave out resume.path to resume from the last one"
            )
    else:
        ensure_unused(output_dir, cfg.overwrite, remedy="give another output_dir=")
    return checkpoint


def auto_resume_checkpoint(config: Config, run: RunDir) -> Checkpoint | None:
    """Return the checkpoint that resume.auto=true resumes in `run`.

    Returns:
        The checkpoint, or None to start from scratch: there is none, or overwrite=true moves another run aside.

    Raises:
        UserError: it has another configuration, or none is valid.
    """
    if not run.has_checkpoints():
        return None
    checkpoint = last_checkpoint(run, remedy="start afresh with overwrite=true")
    # Of a checkpoint that this project did not write, nothing is known.
    was = rename_config(record.config) if (record := checkpoint.record) is not None else {}
    if was.get("mode") not in [mode.value for mode in TRAINING]:
        if config.overwrite:
            return None
        raise UserError(
            f"{checkpoint.directory} was not written by this project, so resume.auto=true cannot tell whether it is "
            "the same run: use mode=resume, or give another output_dir= or job_name="
        )
    _keep_decisions(was, config)
    differing = [f"{key}: was {old}, now {new}" for key, old, new in _differences(was, config, RESULT_NEUTRAL_KEYS)]
    if differing and not config.overwrite:
        raise UserError(
            f"output_dir={run.path} holds another run, so resume.auto=true cannot resume it "
            f"({'; '.join(differing)}): give the same values, another output_dir= or job_name=, or overwrite=true"
        )
    if differing:
        return None
    check_schedule(checkpoint, config, [])
    return checkpoint


def check_schedule(checkpoint: Checkpoint, config: Config, overrides: list[str]) -> None:
    """Refuse to train further than a run's learning rate schedule was made for, unless a new one is given.

    Args:
        checkpoint: The run's, which is resumed.
        config: The merged configuration.
        overrides: The command line's.

    Raises:
        UserError: with the commands that keep the schedule, and that give a new one.
    """
    # A constant rate does not depend on the number of steps.
    if config.scheduler.get("type") in (None, "constant_with_warmup"):
        return
    try:
        steps = read_json(checkpoint.model_dir / STOCK_FILE, dict[str, Any]).get("steps")
    except FileNotFoundError:
        return
    if (
        not isinstance(steps, int)
        or steps == config.steps
        or any(override.lstrip("+").startswith("scheduler.") for override in overrides)
    ):
        return
    again = ["mode=resume", f"output_dir={config.output_dir}"] if config.mode in TRAIN_MODES else overrides
    kept = [override for override in again if not override.startswith("steps=")]
    key = next(key for key in ("num_decay_steps", "num_warmup_steps", "type") if key in config.scheduler)
    value = config.steps if key == "num_decay_steps" else config.scheduler[key]
    new = shlex.join(["pusht-act", *kept, f"steps={config.steps}", f"+scheduler.{key}={value}"])
    finish = f"`{shlex.join(['pusht-act', *kept, f'steps={steps}'])}` finishes it, "
    raise UserError(
        f"steps={config.steps}: {checkpoint.directory} has a learning rate schedule for steps={steps}, and the rate "
        f"would jump: {finish if checkpoint.step < steps else 'it is complete, '}`{new}` gives a new one"
    )


def _keep_decisions(was: dict[str, Any], config: Config) -> None:
    """Give `config` what the run decided where it leaves that open; what could be had by now changes nothing."""
    for key, undecided in AUTOMATIC.items():
        section, _, name = key.partition(".")
        values = config.policy if section == "policy" else vars(getattr(config, section))
        if values.get(name) == undecided and name in was.get(section, {}):
            values[name] = was[section][name]


def describe_restart(config: Config, run: RunDir) -> str:
    """Return what to do after a run was broken off: what works depends on whether it has saved a checkpoint."""
    if run.has_checkpoints():
        command = "the same command with resume.auto=true, or " if config.mode in TRAIN_MODES else ""
        return f"to resume from the last checkpoint: {command}{resume_command(run.path, config.steps)}"
    option = "resume.auto=true" if config.mode in TRAIN_MODES else "overwrite=true"
    return f"no checkpoint was saved yet: give the same command again with {option}"


def _with_policy_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with every field of the policy that follows from nothing else.

    mode=resume takes the whole policy from LeRobot's file in the checkpoint, the other modes what was composed.
    """
    defaults = {name: field["default"] for name, field in lerobot_fields()["policy"].items() if "default" in field}
    policy = {**defaults, **config.get("policy", {})}
    # A new run takes its features from the data set.
    for name in ("input_features", "output_features"):
        policy.pop(name, None)
    return {**config, "policy": policy}


def _differences(was: dict[str, Any], config: Config, free: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, former value, present value) of every key that differs, None standing for no value.

    Args:
        was: The former configuration.
        config: The present one.
        free: Beginnings of keys that may differ.
    """
    then, now = (
        dict(pair for item in _with_policy_defaults(each).items() for pair in flatten(*item))
        for each in (was, to_dict(config))
    )
    # Version 0.1 had mode=dagger and its section.
    removed = [key for key in then if key.startswith("dagger.")]
    for key in sorted((then.keys() | now.keys()) - {*removed}):
        # A field that is newer than the run: its default is what the run was made with.
        new_field = key not in then and key.partition(".")[0] in OUR_SECTIONS
        if then.get(key) != now.get(key) and not key.startswith(free) and not new_field:
            yield key, then.get(key), now.get(key)
