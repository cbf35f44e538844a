"""One job from its composed configuration: check it, find its checkpoint and run directory, then do its mode.

What can be refused is refused before torch and lerobot are imported, which takes seconds.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pusht_act.checkpoints.checkpoint import Checkpoint, find_checkpoint, verify
from pusht_act.checkpoints.manifest import EVAL_FILES
from pusht_act.checkpoints.merge_config import merge_checkpoint_config
from pusht_act.checkpoints.resume import (
    auto_resume_checkpoint,
    checkpoint_to_resume,
    has_no_checkpoint_yet,
    resolve_run_dir,
)
from pusht_act.checkpoints.retention import finish_cleanup
from pusht_act.checkpoints.safe_loading import check_safe_to_load
from pusht_act.config.lerobot_command import lerobot_command
from pusht_act.config.lerobot_imports import import_policies
from pusht_act.config.overrides import check_overrides
from pusht_act.config.schema import TRAIN_MODES, Config, Mode, to_dict
from pusht_act.config.validation import check_processes, check_share, to_config
from pusht_act.runs.provenance import command_line, log_file, write_provenance
from pusht_act.runs.run_dir import RunDir, ensure_unused, move_aside
from pusht_act.runtime.distributed import PeerLostError, Word, raise_on_any_rank, tell, told, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import Lock, locked
from pusht_act.runtime.signals import StopSignal, handle_signals

if TYPE_CHECKING:
    from pusht_act.training.async_evaluation import Report

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


def run_job(
    cfg: DictConfig, overrides: list[str], choices: dict[str, str | None], report: "Report | None" = None
) -> Result:
    """Do the job that `cfg` describes; its evaluations in training are told to `report`, which may end that early.

    Raises:
        UserError, OSError: the user's to mend; nothing was written.
    """
    check_overrides(cfg, overrides)
    checked = to_config(cfg)
    if cfg.print_lerobot_command:
        config, start = _resolve_config(cfg, overrides, choices)
        print(lerobot_command(config, start.model_dir if start is not None else None))
        return Result(Path(cfg.output_dir))
    check_processes(cfg.mode, cfg.train.profile, world_size())
    if cfg.mode is Mode.eval:
        return _evaluate(*_resolve_config(cfg, overrides, choices), overrides)
    if cfg.mode is Mode.demos:
        return _generate_demos(checked, overrides)
    with locked(resolve_run_dir(cfg, overrides)) as lock:
        config, start = _resolve_config(cfg, overrides, choices)
        return _train(config, start, overrides, choices, lock, report)


def follow() -> None:
    """What every process of a job but the first does: it trains along, if there is something to train."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger().setLevel(logging.WARNING)  # a launcher has configured it
    with handle_signals():
        _, (config, start) = told()

        import_policies()
        from pusht_act.config.lerobot import decode
        from pusht_act.training.worker_loop import set_up_together, train_along

        with raise_on_any_rank():
            lerobot = decode(config)
        train_along(config, lerobot, set_up_together(config, lerobot, start))


def _resolve_config(
    cfg: DictConfig, overrides: list[str], choices: dict[str, str | None]
) -> tuple[Config, Checkpoint | None]:
    """The job's configuration, and the checkpoint that mode=resume or mode=eval was given."""
    if cfg.mode is Mode.eval:
        checkpoint = _resolve_checkpoint(cfg.checkpoint, "checkpoint")
        return to_config(merge_checkpoint_config(cfg, checkpoint, overrides, choices, resume=False)), checkpoint
    if cfg.mode is Mode.resume:
        cfg.output_dir = str(resolve_run_dir(cfg, overrides))
        checkpoint = checkpoint_to_resume(cfg, Path(cfg.output_dir))
        check_safe_to_load(checkpoint.model_dir)
        config = to_config(merge_checkpoint_config(cfg, checkpoint, overrides, choices, resume=True))
        if _is_finished(checkpoint, config):
            raise UserError(
                f"steps={config.steps}: {checkpoint.directory} is at step {checkpoint.step} already; give more steps="
            )
        return config, checkpoint
    config = to_config(cfg)
    if cfg.mode in TRAIN_MODES and (name := config.policy.get("pretrained_path")):
        config.policy["pretrained_path"] = str(_resolve_checkpoint(str(name), "policy.pretrained_path").model_dir)
    return config, None


def _resolve_checkpoint(name: str, key: str) -> Checkpoint:
    """The checkpoint that option `key` names: a path, or else a model on the Hub."""
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).exists() or not looks_like_hub:
        checkpoint = find_checkpoint(name, key)
        verify(checkpoint, f"{key}={name}", EVAL_FILES)
    else:
        from pusht_act.checkpoints.hub import download

        checkpoint = Checkpoint(download(name, key))
    check_safe_to_load(checkpoint.model_dir)
    return checkpoint


def _train(
    config: Config,
    start: Checkpoint | None,
    overrides: list[str],
    choices: dict[str, str | None],
    lock: Lock,
    report: "Report | None",
) -> Result:
    run = RunDir(Path(config.output_dir))
    again = config.mode is not Mode.resume and config.resume.auto
    if again and (start := auto_resume_checkpoint(config, run)) is not None and _is_finished(start, config):
        return _finished_result(config, run, start)
    check_share(config.batch_size, world_size())
    _check_can_push(config)
    branches_off = start is None or start.run_dir != run.path.resolve()
    if again and has_no_checkpoint_yet(run):
        branches_off = False
    if branches_off:
        ensure_unused(run.path, config.overwrite)

    import_policies()
    from pusht_act.config.lerobot import decode
    from pusht_act.training.trainer import train
    from pusht_act.training.worker_loop import set_up_together

    tell(Word.TRAIN, (config, start))
    with raise_on_any_rank():
        lerobot = decode(config)
    record: dict[str, Any] = {"config": to_dict(config), "choices": choices}
    setup = dataclasses.replace(set_up_together(config, lerobot, start), report=report)
    # The run directory is touched when nothing is left that could be refused.
    if branches_off and (moved := move_aside(run.path)):
        lock.take_again(moved)
    write_provenance(run, to_dict(config), overrides)
    with log_file(run):
        if start is not None:
            log.info("going on from %s", start.directory)
        try:
            training = train(config, lerobot, setup, run, record)
        except StopSignal as stopped:
            _print_how_to_resume(stopped, config, run, overrides)
            raise
        except PeerLostError as lost:
            lost.reported = True
            log.error("%s", lost)  # train.log has it, too
            raise
    evaluation = training.evaluation
    if training.checkpoint is not None and not training.gave_up:
        _push(config, training.checkpoint, evaluation.metrics if evaluation else {}, overrides)
    _print_next_steps(config, run, overrides, evaluation.film_strip if evaluation else None)
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


def _finished_result(config: Config, run: RunDir, checkpoint: Checkpoint) -> Result:
    """What the run that ended with `checkpoint` came to."""
    finish_cleanup(run, config, checkpoint)
    log.info("%s is finished: step %d; more steps= would go on", run.path, checkpoint.step)
    return Result(run.path, checkpoint.step, run.metrics_of(checkpoint.step), checkpoint.directory)


def _print_how_to_resume(stopped: StopSignal, config: Config, run: RunDir, overrides: list[str]) -> None:
    """In a line, which train.log has too."""
    stopped.reported = True
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


def _print_next_steps(config: Config, run: RunDir, overrides: list[str], film_strip: Path | None) -> None:
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
        from pusht_act.checkpoints.hub import check_can_push

        check_can_push(config.policy.get("repo_id"))


def _push(config: Config, checkpoint: Checkpoint, metrics: dict[str, float], overrides: list[str]) -> None:
    if config.policy.get("push_to_hub"):
        from pusht_act.checkpoints.hub import push

        log.info("pushed to %s", push(config, checkpoint.directory, metrics, command_line(overrides)))


def _evaluate(config: Config, checkpoint: Checkpoint | None, overrides: list[str]) -> Result:
    assert checkpoint is not None
    from pusht_act.envs.vector_env import make_vector_envs

    step = checkpoint.step if checkpoint.training_dir.is_dir() else 0
    given = any(override.startswith("output_dir=") for override in overrides)
    run = RunDir(Path(config.output_dir) if given or checkpoint.run_dir is None else checkpoint.run_dir)
    resolve_run_dir = run.evaluation(step, config.eval.start_seed, config.eval.n_episodes)
    with make_vector_envs(config.eval) as envs:  # their processes start while torch is imported
        import_policies()
        from pusht_act.config.lerobot import decode_env, decode_policy
        from pusht_act.evaluation.evaluate import evaluate
        from pusht_act.evaluation.rollout import Actor
        from pusht_act.policy.act import load_policy, load_processors

        policy_config, env = decode_policy(config.policy), decode_env(config.env)
        policy = load_policy(policy_config, checkpoint.model_dir)
        processors = load_processors(policy_config, checkpoint.model_dir)
        evaluation = evaluate(Actor(policy, processors), envs, env, config.eval, directory=resolve_run_dir)
    log.info("%s: %s", checkpoint.directory, evaluation)
    log.info("written to %s", resolve_run_dir)
    return Result(
        resolve_run_dir,
        step,
        evaluation.metrics,
        checkpoint.directory,
        list(evaluation.episodes),
        evaluation.video_paths,
    )


def _generate_demos(config: Config, overrides: list[str]) -> Result:
    ensure_unused(Path(config.output_dir), config.overwrite, remedy="give another output_dir=")
    if config.demos.push_to_hub:
        from pusht_act.checkpoints.hub import check_can_push

        check_can_push(config.demos.repo_id, "demos")
    from pusht_act.demos.collect import planner_options
    from pusht_act.demos.initial_states import initial_states

    options, starts = planner_options(config.demos), initial_states(config.demos)
    from pusht_act.demos.generate import write_demos

    written = write_demos(config, options, starts, overrides)
    return Result(written.path, metrics=written.metrics, video_paths=[written.video])
