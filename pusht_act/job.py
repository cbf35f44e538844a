"""One job from its composed configuration: check it, find its checkpoint and run directory, then do its mode.

What can be refused is refused before torch and lerobot are imported, which takes seconds.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pusht_act.checked import check_processes, check_share, config_from
from pusht_act.config import TRAINING_AFRESH, Config, Mode, plain
from pusht_act.distributed import Lost, Word, size, tell, together, told
from pusht_act.going_on import directory, newest_of_same, resumed, stopped_before_its_first_checkpoint
from pusht_act.inherit import inherit
from pusht_act.integrity import MODEL
from pusht_act.lerobot_command import lerobot_command
from pusht_act.lerobot_imports import import_policies
from pusht_act.lock import Lock, locked
from pusht_act.overrides import check_overrides
from pusht_act.pruning import Report
from pusht_act.retention import settle
from pusht_act.run_dir import (
    Checkpoint,
    RunDir,
    check_sound,
    check_unused,
    command_line,
    find_checkpoint,
    log_file,
    move_aside,
    write_provenance,
)
from pusht_act.signals import Stopped, listening
from pusht_act.status import show
from pusht_act.vet import vet

log = logging.getLogger(__name__)


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
    pruned: bool = False
    """Whether training ended early, as a trial not worth going on with."""

    @property
    def objective(self) -> float | None:
        """What a sweep compares jobs by."""
        return self.metrics.get("pc_success")


def execute(
    cfg: DictConfig, overrides: list[str], choices: dict[str, str | None], report: Report | None = None
) -> Result:
    """Do the job that `cfg` describes; its evaluations in training are told to `report`, which may end that early.

    Raises:
        ValueError, OSError: the user's to mend; nothing was written.
    """
    check_overrides(cfg, overrides)
    checked = config_from(cfg)
    if checked.mode is Mode.status and checked.dir is not None:
        show(Path(checked.dir).expanduser(), checked.status.every)
        return Result(Path(checked.dir))
    if cfg.print_lerobot_command:
        print(lerobot_command(*_decided(cfg, overrides, choices)))
        return Result(Path(cfg.output_dir))
    check_processes(cfg.mode, cfg.train.profile, size())
    if cfg.mode is Mode.eval:
        return _evaluate(*_decided(cfg, overrides, choices), overrides)
    if cfg.mode is Mode.demos:
        return _demonstrate(checked, overrides)
    with locked(directory(cfg, overrides)) as lock:
        config, start = _decided(cfg, overrides, choices)
        return _train(config, start, overrides, choices, lock, report)


def follow() -> None:
    """What every process of a job but the first does: it trains along, if there is something to train."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger().setLevel(logging.WARNING)  # a launcher has configured it
    with listening():
        _, (config, start) = told()

        import_policies()
        from pusht_act.following import set_up_together, train_along
        from pusht_act.lerobot_config import decode

        with together():
            lerobot = decode(config)
        train_along(config, lerobot, set_up_together(config, lerobot, start))


def _decided(cfg: DictConfig, overrides: list[str], choices: dict[str, str | None]) -> tuple[Config, Checkpoint | None]:
    """The job's configuration, and the checkpoint that mode=resume or mode=eval was given."""
    if cfg.mode is Mode.eval:
        checkpoint = _found(cfg.checkpoint, "checkpoint")
        return config_from(inherit(cfg, checkpoint, overrides, choices, resume=False)), checkpoint
    if cfg.mode is Mode.resume:
        cfg.output_dir = str(directory(cfg, overrides))
        checkpoint = resumed(cfg, Path(cfg.output_dir))
        vet(checkpoint.model)
        config = config_from(inherit(cfg, checkpoint, overrides, choices, resume=True))
        if _is_finished(checkpoint, config):
            raise ValueError(
                f"steps={config.steps}: {checkpoint.directory} is at step {checkpoint.step} already; give more steps="
            )
        return config, checkpoint
    config = config_from(cfg)
    if cfg.mode in TRAINING_AFRESH and (name := config.policy.get("pretrained_path")):
        config.policy["pretrained_path"] = str(_found(str(name), "policy.pretrained_path").model)
    return config, None


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


def _train(
    config: Config,
    start: Checkpoint | None,
    overrides: list[str],
    choices: dict[str, str | None],
    lock: Lock,
    report: Report | None,
) -> Result:
    run = RunDir(Path(config.output_dir))
    again = config.mode is not Mode.resume and config.resume.auto
    if again and (start := newest_of_same(config, run)) is not None and _is_finished(start, config):
        return _finished(config, run, start)
    check_share(config.batch_size, size())
    _check_can_push(config)
    branches_off = start is None or start.run != run.path.resolve()
    if again and stopped_before_its_first_checkpoint(run):
        branches_off = False
    if branches_off:
        check_unused(run.path, config.overwrite)

    import_policies()
    from pusht_act.following import set_up_together
    from pusht_act.lerobot_config import decode
    from pusht_act.train import train

    tell(Word.TRAIN, (config, start))
    with together():
        lerobot = decode(config)
    record: dict[str, Any] = {"config": plain(config), "choices": choices}
    setup = dataclasses.replace(set_up_together(config, lerobot, start), report=report)
    # The run directory is touched when nothing is left that could be refused.
    if branches_off and (moved := move_aside(run.path)):
        lock.take_again(moved)
    write_provenance(run, plain(config), overrides)
    with log_file(run):
        if start is not None:
            log.info("going on from %s", start.directory)
        try:
            training = train(config, lerobot, setup, run, record)
        except Stopped as stopped:
            _say_how_to_go_on(stopped, config, run, overrides)
            raise
        except Lost as lost:
            lost.told = True
            log.error("%s", lost)  # train.log has it, too
            raise
    evaluation = training.evaluation
    if training.checkpoint is not None and not training.gave_up:
        _push(config, training.checkpoint, evaluation.metrics if evaluation else {}, overrides)
    _say_what_next(config, run, overrides, evaluation.film_strip if evaluation else None)
    return Result(
        output_dir=run.path,
        step=training.step,
        metrics=training.metrics | (evaluation.metrics if evaluation else {}),
        checkpoint=training.checkpoint.directory if training.checkpoint else None,
        episodes=evaluation.episodes if evaluation else [],
        video_paths=evaluation.video_paths if evaluation else [],
        pruned=training.gave_up,
    )


def _is_finished(checkpoint: Checkpoint, config: Config) -> bool:
    return checkpoint.step >= config.steps and checkpoint.pending is None


def _finished(config: Config, run: RunDir, checkpoint: Checkpoint) -> Result:
    """What the run that ended with `checkpoint` came to."""
    settle(run, config, checkpoint)
    log.info("%s is finished: step %d; more steps= would go on", run.path, checkpoint.step)
    return Result(run.path, checkpoint.step, run.metrics_of(checkpoint.step), checkpoint.directory)


def _say_how_to_go_on(stopped: Stopped, config: Config, run: RunDir, overrides: list[str]) -> None:
    """In a line, which train.log has too."""
    stopped.told = True
    if stopped.checkpoint is None:
        log.warning("%s, no checkpoint was written", stopped)
        return
    wandb = ["wandb.enable=true"] if config.wandb.enable else []
    again = ["mode=resume", f"output_dir={run.path}", f"steps={config.steps}", *wandb]
    if _is_finished(Checkpoint(stopped.checkpoint / "pretrained_model"), config):
        log.warning("%s, the last: the run is finished, in %s", stopped, stopped.checkpoint)
    else:
        command = command_line(overrides if config.resume.auto else again)
        log.warning("%s, saved %s; to go on: %s", stopped, stopped.checkpoint, command)


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


def _evaluate(config: Config, checkpoint: Checkpoint | None, overrides: list[str]) -> Result:
    assert checkpoint is not None
    from pusht_act.environments import environments

    step = checkpoint.step if checkpoint.training.is_dir() else 0
    given = any(override.startswith("output_dir=") for override in overrides)
    run = RunDir(Path(config.output_dir) if given or checkpoint.run is None else checkpoint.run)
    directory = run.evaluation(step, config.eval.start_seed, config.eval.n_episodes)
    with environments(config.eval) as envs:  # their processes start while torch is imported
        import_policies()
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
