"""One job from its composed configuration: check it, find its checkpoint and run directory, then do its mode.

What can be refused is refused before torch and lerobot are imported, which takes seconds.
"""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pusht_act.config import (
    EMBEDDED_REPO_ID,
    PLANNER_OPTIONS,
    TRAINING_AFRESH,
    Config,
    Mode,
    config_from,
    plain,
)
from pusht_act.inherit import inherit, parsed
from pusht_act.integrity import EVERYTHING, MODEL
from pusht_act.lerobot_command import lerobot_command
from pusht_act.run_dir import (
    Checkpoint,
    RunDir,
    check_sound,
    check_unused,
    command_line,
    find_checkpoint,
    last_checkpoint,
    log_file,
    move_aside,
    newest_sound,
    write_provenance,
)
from pusht_act.vet import vet

log = logging.getLogger(__name__)

FREE_IN_DAGGER = (
    *("output_dir", "job_name", "overwrite", "log_freq", "save_freq", "wandb.", "checkpoints.", "train.profile"),
    *("eval.n_videos", "eval.workers", "eval.background", "dagger.rounds", "dagger.workers"),
    *("policy.push_to_hub", "policy.repo_id"),
)
"""Keys that a mode=dagger may go on with another value of: none decides what a round comes to."""


@dataclass(frozen=True)
class Result:
    """What a job returns to Python."""

    output_dir: Path
    step: int | None = None
    """The step trained to, or that of the checkpoint evaluated."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Training means and, if there was an evaluation, its metrics."""
    checkpoint: Path | None = None
    episodes: list[Any] = dataclasses.field(default_factory=list)
    """Records of the last evaluation (evaluate.Episode)."""
    video_paths: list[Path] = dataclasses.field(default_factory=list)

    @property
    def objective(self) -> float | None:
        """What a sweep compares jobs by."""
        return self.metrics.get("pc_success")


def execute(cfg: DictConfig, overrides: list[str], choices: dict[str, str | None]) -> Result:
    """Do the job that `cfg` describes.

    Raises:
        ValueError, OSError: the user's to mend; nothing was written.
    """
    mode = cfg.mode
    _check_overrides(cfg, overrides)
    if mode is Mode.eval:
        checkpoint = _found(str(config_from(cfg).checkpoint), "checkpoint")
        config = config_from(inherit(cfg, checkpoint, overrides, choices, resume=False))
    elif mode is Mode.resume:
        config_from(cfg)
        checkpoint, cfg.output_dir = _resumed(cfg, overrides)
        vet(checkpoint.model)
        config = config_from(inherit(cfg, checkpoint, overrides, choices, resume=True))
        if checkpoint.step >= config.steps:
            raise ValueError(
                f"steps={config.steps}: {checkpoint.directory} is at step {checkpoint.step} already; give more steps="
            )
    else:
        checkpoint, config = None, config_from(cfg)
        if mode in TRAINING_AFRESH and (name := config.policy.get("pretrained_path")):
            config.policy["pretrained_path"] = str(_found(str(name), "policy.pretrained_path").model)
    if config.print_lerobot_command:
        print(lerobot_command(config, checkpoint))
        return Result(Path(config.output_dir))
    if mode is Mode.eval:
        assert checkpoint is not None
        return _evaluate(config, checkpoint, overrides)
    if mode is Mode.demos:
        return _demonstrate(config, overrides)
    if mode is Mode.dagger:
        return _dagger(config, overrides, choices)
    return _train(config, checkpoint, overrides, choices)


def _check_overrides(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuse what only the command line shows: an option that this job would ignore, a number taken for true."""
    read = [override for override in parsed(overrides) if not override.is_delete()]
    given = dict(pair for override in read for pair in _flat(override.key_or_group, override.value()))
    for key, value in given.items():
        section, _, name = key.partition(".")
        if section == "demos":
            _check_used(name, value, cfg)
        trains = cfg.mode is Mode.resume or cfg.mode in TRAINING_AFRESH
        if section == "dagger" and cfg.mode is not Mode.dagger and not (name == "labels" and trains):
            raise ValueError(f"{key}={value} is for mode=dagger: give that too, or leave it out")
        if section == "train" and not trains:
            raise ValueError(f"{key}={value} is for training, which mode={cfg.mode.value} does not do: leave it out")
        if type(value) is int and value not in (0, 1) and isinstance(OmegaConf.select(cfg, key), bool):
            raise ValueError(f"{key}={value}: give true or false")
    starts = OmegaConf.select(cfg, "demos.starts")
    if "demos.start_seed" in given and starts is not None:
        raise ValueError(
            f"demos.start_seed={given['demos.start_seed']} and demos.starts={starts} both say where to start: "
            "leave one of them out"
        )


def _check_used(name: str, value: Any, cfg: DictConfig) -> None:
    """Refuse the option `name` of demos where nothing would read it."""
    users = ["mode=demos"]
    if name in PLANNER_OPTIONS:
        users.append("mode=dagger")
    if name == "n_episodes":
        users.append("dataset=demos")
        if cfg.mode is Mode.resume or OmegaConf.select(cfg, "dataset.repo_id") == EMBEDDED_REPO_ID:
            return  # a resumed run's data set is not known yet
    if f"mode={cfg.mode.value}" not in users:
        raise ValueError(f"demos.{name}={value} is for {' or '.join(users)}: give that too, or leave it out")


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """demos={speed: 9} -> demos.speed, 9."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(f"{key}.{name}", inner)


def _resumed(cfg: DictConfig, overrides: list[str]) -> tuple[Checkpoint, str]:
    """The checkpoint to resume, and the run directory to go on in."""
    given = any(override.startswith("output_dir=") for override in overrides)
    if cfg.resume.path is None:
        return last_checkpoint(RunDir(Path(cfg.output_dir))), cfg.output_dir
    checkpoint = find_checkpoint(cfg.resume.path, "resume.path")
    check_sound(checkpoint, f"resume.path={cfg.resume.path}", EVERYTHING)
    output_dir = Path(cfg.output_dir) if given or checkpoint.run is None else checkpoint.run
    if checkpoint.run == output_dir.resolve():
        last, _ = newest_sound(RunDir(output_dir))
        if last is not None and last.step > checkpoint.step:
            raise ValueError(
                f"resume.path={cfg.resume.path} is at step {checkpoint.step}, its run went on to {last.step}: "
                "give output_dir=NEW to branch off, or leave resume.path out to go on from the last"
            )
    else:
        check_unused(output_dir, cfg.overwrite)
    return checkpoint, str(output_dir)


def _found(name: str, key: str) -> Checkpoint:
    """The checkpoint that option `key` names: a path, or else a model on the Hub."""
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).exists() or not looks_like_hub:
        checkpoint = find_checkpoint(name, key)
        check_sound(checkpoint, f"{key}={name}", MODEL)
    else:
        from pusht_act.hub import download

        checkpoint = Checkpoint(download(name, key))
    vet(checkpoint.model)
    return checkpoint


def _train(config: Config, start: Checkpoint | None, overrides: list[str], choices: dict[str, str | None]) -> Result:
    _check_can_push(config)
    run = RunDir(Path(config.output_dir))
    branches_off = start is None or start.run != run.path.resolve()
    if branches_off:
        check_unused(run.path, config.overwrite)

    from pusht_act.lerobot_config import decode
    from pusht_act.train import set_up, train

    lerobot = decode(config)
    record: dict[str, Any] = {"config": plain(config), "choices": choices}
    setup = set_up(config, lerobot, start)
    # The run directory is touched when nothing is left that could be refused.
    if branches_off:
        move_aside(run.path)
    write_provenance(run, plain(config), overrides)
    with log_file(run):
        if start is not None:
            log.info("going on from %s", start.directory)
        training = train(config, lerobot, setup, run, record)
    evaluation = training.evaluation
    if training.checkpoint is not None:
        _push(config, training.checkpoint, evaluation.metrics if evaluation else {}, overrides)
    _say_what_next(config, run, overrides, evaluation.film_strip if evaluation else None)
    return Result(
        output_dir=run.path,
        step=training.step,
        metrics=training.metrics | (evaluation.metrics if evaluation else {}),
        checkpoint=training.checkpoint.directory if training.checkpoint else None,
        episodes=evaluation.episodes if evaluation else [],
        video_paths=evaluation.video_paths if evaluation else [],
    )


def _say_what_next(config: Config, run: RunDir, overrides: list[str], film_strip: Path | None) -> None:
    """After the last step: where to look, and three commands to try; a sweep's jobs keep quiet."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return
    if film_strip is not None:
        log.info("to look at: %s and the videos beside it", film_strip)
    if config.save_checkpoint:
        log.info("500 episodes on fresh seeds: pusht-act mode=eval checkpoint=%s", run.path)
        if config.scheduler:  # its rate has come to an end
            again = [o for o in overrides if not o.startswith(("steps=", "job_name="))]
            longer = [*again, f"steps={2 * config.steps}", f"job_name={config.job_name}_longer"]
            log.info("twice as long: %s", command_line(longer))
        else:
            log.info("on from here: pusht-act mode=resume output_dir=%s steps=%d", run.path, 2 * config.steps)
    if config.mode is Mode.resume:
        return
    several = ["-m", *(o for o in overrides if not o.startswith(("seed=", "output_dir="))), "seed=1,2,3"]
    log.info("how much is luck: %s", command_line(several))


def _check_can_push(config: Config) -> None:
    if config.policy.get("push_to_hub"):
        from pusht_act.hub import check_can_push

        check_can_push(config.policy.get("repo_id"))


def _push(config: Config, checkpoint: Checkpoint, metrics: dict[str, float], overrides: list[str]) -> None:
    if config.policy.get("push_to_hub"):
        from pusht_act.hub import push

        log.info("pushed to %s", push(config, checkpoint.directory, metrics, command_line(overrides)))


def _dagger(config: Config, overrides: list[str], choices: dict[str, str | None]) -> Result:
    _check_can_push(config)
    run = RunDir(Path(config.output_dir))
    fresh = not _goes_on(config, run)
    if fresh:
        check_unused(run.path, config.overwrite, remedy="give another job_name= or output_dir=")
    from pusht_act.demos.collect import planner_options

    options = planner_options(config.demos)
    from pusht_act.dagger import dagger

    last = dagger(config, options, overrides, choices, fresh)[-1]
    _push(config, last.checkpoint, last.metrics, overrides)
    return Result(run.path, config.steps, last.metrics, last.checkpoint.directory)


def _goes_on(config: Config, run: RunDir) -> bool:
    """Whether `run` is a mode=dagger of this very configuration, as far as that decides the result.

    Raises:
        ValueError: it is one of another configuration.
    """
    begun, now = run.configuration(), plain(config)
    if begun.get("mode") != Mode.dagger.value:
        return False
    was, given = (dict(pair for item in each.items() for pair in _flat(*item)) for each in (begun, now))
    for key in sorted(was.keys() | given.keys()):
        if was.get(key) != given.get(key) and not key.startswith(FREE_IN_DAGGER):
            if config.overwrite:
                return False
            raise ValueError(
                f"{key}={given.get(key)}: the rounds in output_dir={run.path} were made with {key}={was.get(key)}; "
                f"give {key}={was.get(key)}, another output_dir=, or overwrite=true to move them aside"
            )
    return True


def _evaluate(config: Config, checkpoint: Checkpoint, overrides: list[str]) -> Result:
    from pusht_act.environments import environments

    step = checkpoint.step if checkpoint.training.is_dir() else 0
    given = any(override.startswith("output_dir=") for override in overrides)
    run = RunDir(Path(config.output_dir) if given or checkpoint.run is None else checkpoint.run)
    directory = run.evaluation(step, config.eval.start_seed, config.eval.n_episodes)
    with environments(config.eval) as envs:  # their processes start while torch is imported
        from pusht_act.evaluate import evaluate
        from pusht_act.lerobot_config import decode_env, decode_policy
        from pusht_act.policy import load_policy, load_processors

        policy_config, env = decode_policy(config.policy), decode_env(config.env)
        policy = load_policy(policy_config, checkpoint.model)
        processors = load_processors(policy_config, checkpoint.model)
        evaluation = evaluate(policy, processors, envs, env, config.eval, directory=directory)
    log.info("%s: %s", checkpoint.directory, evaluation)
    log.info("written to %s", directory)
    return Result(
        directory, step, evaluation.metrics, checkpoint.directory, list(evaluation.episodes), evaluation.video_paths
    )


def _demonstrate(config: Config, overrides: list[str]) -> Result:
    check_unused(Path(config.output_dir), config.overwrite, remedy="give another output_dir=")
    if config.demos.push_to_hub:
        from pusht_act.hub import check_can_push

        check_can_push(config.demos.repo_id, "demos")
    from pusht_act.demos.collect import planner_options
    from pusht_act.demos.starts import starts_of

    options, starts = planner_options(config.demos), starts_of(config.demos)
    from pusht_act.demos.dataset import write_demos

    written = write_demos(config, options, starts, overrides)
    return Result(written.path, metrics=written.metrics, video_paths=[written.video])
