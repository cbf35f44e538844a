"""One job: resolve its composed configuration, checkpoint and run directory once, then run its mode.

    DictConfig, overrides, choices  -> ResolvedJob  -> train, evaluate or generate demonstrations  -> Result

What can be refused is refused before torch and lerobot are imported, which takes seconds.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pusht_act.checkpoints.checkpoint import Checkpoint, find_checkpoint, verify
from pusht_act.checkpoints.manifest import EVAL_FILES, sha256
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
from pusht_act.config.overrides import check_overrides, check_typed_values, is_output_dir_typed
from pusht_act.config.schema import TRAIN_MODES, Config, Mode, to_dict
from pusht_act.config.validation import check_processes, check_share, check_target, to_config
from pusht_act.runs.provenance import command_line, log_file, write_provenance
from pusht_act.runs.run_dir import RunDir, ensure_unused, move_aside
from pusht_act.runtime.distributed import PeerLostError, broadcast_from_main, raise_on_any_rank, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import Lock, locked
from pusht_act.runtime.signals import StopSignal, signals

if TYPE_CHECKING:
    from pusht_act.evaluation.records import Evaluation, Record
    from pusht_act.training.extensions import Extensions
    from pusht_act.training.trainer import Report, Trainer

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
    """Whether training ended early, because the pruner ended the trial."""

    @property
    def objective(self) -> float | None:
        """What a sweep compares jobs by."""
        return self.metrics.get("pc_success")


@dataclass(frozen=True)
class ResolvedJob:
    """A job about which nothing is left to be decided."""

    config: Config
    """Validated; that of mode=resume and mode=eval is merged with the checkpoint's."""
    start: Checkpoint | None
    """The checkpoint that it continues or evaluates."""
    run: RunDir
    lock: Lock | None
    """Of the run directory, held; None in the modes that do not train."""
    overrides: list[str]
    """The command line that it came from."""
    choices: dict[str, str | None]
    """The chosen option of each configuration group."""
    report: "Report | None" = None
    """Told the evaluations in training, which it may end early."""
    extensions: "Extensions | None" = None
    """A loss and transforms in place of the defaults."""

    @property
    def auto_resumes(self) -> bool:
        """Whether it continues the same job's work if there is any."""
        return self.config.mode in TRAIN_MODES and self.config.resume.auto


def run_job(
    cfg: DictConfig,
    overrides: list[str],
    choices: dict[str, str | None],
    report: "Report | None" = None,
    extensions: "Extensions | None" = None,
) -> Result:
    """Run the job that `cfg` describes.

    Args:
        cfg: The composed configuration, without Hydra's own node.
        overrides: The command line that it was composed from.
        choices: The chosen option of each configuration group.
        report: Told the evaluations in training, which it may end early.
        extensions: A loss and transforms in place of the defaults.

    Raises:
        UserError, OSError: the user's to mend; nothing was written.
    """
    # What can be refused is refused before torch and lerobot are imported, which takes seconds.
    check_overrides(cfg, overrides)
    if not cfg.print_lerobot_command:
        check_processes(cfg.mode, cfg.train.profile, world_size())
    with _resolve(cfg, overrides, choices) as resolved:
        job = dataclasses.replace(resolved, report=report, extensions=extensions)
        if job.config.print_lerobot_command:
            print(lerobot_command(job.config, job.start.model_dir if job.start is not None else None))
            return Result(job.run.path)
        match job.config.mode:
            case Mode.eval:
                return _evaluate(job)
            case Mode.demos:
                return _generate_demos(job)
            case _:
                return _train(job)


def run_worker(extensions: "Extensions | None" = None) -> Result:
    """Train along on a rank other than 0, if rank 0 has something to train.

    Args:
        extensions: as for `run_job`; every rank is given the same.
    """
    # Rank 0 logs for all; a launcher may have configured logging already.
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    logging.getLogger().setLevel(logging.ERROR)
    with signals.handle():
        config, start = broadcast_from_main()
        run = RunDir(Path(config.output_dir))
        training = _build_trainer(config, start, extensions).fit(run, {})
    return Result(run.path, training.step, training.metrics)


def _build_trainer(config: Config, start: Checkpoint | None, extensions: "Extensions | None") -> "Trainer":
    """Build the trainer on every rank; the first import of torch and lerobot."""
    from pusht_act.config.lerobot import decode
    from pusht_act.training.build import DEFAULTS, build_trainer

    with raise_on_any_rank():
        lerobot = decode(config)
    return build_trainer(config, lerobot, start, extensions or DEFAULTS)


@contextmanager
def _resolve(cfg: DictConfig, overrides: list[str], choices: dict[str, str | None]) -> Iterator[ResolvedJob]:
    """Decide all that a job needs, and hold the lock of its run directory if it trains.

    Its configuration is validated once: at once where it is complete, else when the checkpoint's is merged with it.
    """
    match cfg.mode:
        case Mode.eval:
            yield _resolve_evaluation(cfg, overrides, choices)
        case Mode.demos:
            config = to_config(cfg)
            yield ResolvedJob(config, None, RunDir(Path(config.output_dir)), None, overrides, choices)
        case _:
            complete = to_config(cfg) if cfg.mode in TRAIN_MODES else None
            if complete is None:
                check_typed_values(cfg, overrides)
            run = RunDir(resolve_run_dir(cfg, overrides))
            # From here to the end of training no other process may choose a checkpoint of this run, or write one.
            with nullcontext() if cfg.print_lerobot_command else locked(run.path) as lock:
                config, start = _resolve_training(cfg, complete, run, overrides, choices)
                yield ResolvedJob(config, start, run, lock, overrides, choices)


def _resolve_evaluation(cfg: DictConfig, overrides: list[str], choices: dict[str, str | None]) -> ResolvedJob:
    check_typed_values(cfg, overrides)
    check_target(cfg.mode, cfg.checkpoint, None)
    checkpoint = _resolve_checkpoint(cfg.checkpoint, "checkpoint")
    config = to_config(merge_checkpoint_config(cfg, checkpoint, overrides, choices, resume=False))
    run = Path(config.output_dir) if is_output_dir_typed(overrides) else checkpoint.run_dir
    if run is None:
        run = Path("outputs/evaluations") / _model_name(cfg.checkpoint, checkpoint)
    return ResolvedJob(config, checkpoint, RunDir(run), None, overrides, choices)


def _model_name(named: str, checkpoint: Checkpoint) -> str:
    """Return the name of a model that belongs to no run, with the beginning of its digest: there may be another one."""
    folder = checkpoint.directory if checkpoint.model_dir.name == "pretrained_model" else checkpoint.model_dir
    name = folder.name if Path(named).exists() else named.replace("/", "--")
    return f"{name}-{sha256(checkpoint.model_dir / 'model.safetensors')[:8]}"


def _resolve_training(
    cfg: DictConfig, complete: Config | None, run: RunDir, overrides: list[str], choices: dict[str, str | None]
) -> tuple[Config, Checkpoint | None]:
    """Return the configuration of a job that trains in `run`, and the checkpoint that it continues.

    `complete` is the configuration of mode=test or mode=full; mode=resume takes it from the checkpoint.
    """
    if complete is None:
        cfg.output_dir = str(run.path)
        checkpoint = checkpoint_to_resume(cfg, run.path)
        check_safe_to_load(checkpoint.model_dir)
        config = to_config(merge_checkpoint_config(cfg, checkpoint, overrides, choices, resume=True))
        if _is_finished(checkpoint, config):
            raise UserError(
                f"steps={config.steps}: {checkpoint.directory} is at step {checkpoint.step} already; give more steps="
            )
        return config, checkpoint
    if name := complete.policy.get("pretrained_path"):
        complete.policy["pretrained_path"] = str(_resolve_checkpoint(str(name), "policy.pretrained_path").model_dir)
    resumes = complete.resume.auto and not complete.print_lerobot_command
    return complete, auto_resume_checkpoint(complete, run) if resumes else None


def _resolve_checkpoint(name: str, key: str) -> Checkpoint:
    """Return the checkpoint that option `key` names: a path, or else a model on the Hub."""
    # USER/NAME could be a relative path, too: what exists here comes first.
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).exists() or not looks_like_hub:
        checkpoint = find_checkpoint(name, key)
        verify(checkpoint, f"{key}={name}", EVAL_FILES)
    else:
        from pusht_act.checkpoints.hub import download

        checkpoint = Checkpoint(download(name, key))
    check_safe_to_load(checkpoint.model_dir)
    return checkpoint


def _train(job: ResolvedJob) -> Result:
    config, start, run = job.config, job.start, job.run
    overrides, choices, report = job.overrides, job.choices, job.report
    if job.auto_resumes and start is not None and _is_finished(start, config):
        return _finished_result(job, start)
    # A run that resumes in its own folder may write there; any other needs a folder that is not in use.
    check_share(config.batch_size, world_size())
    _check_can_push(config)
    branches_off = start is None or start.run_dir != run.path.resolve()
    if job.auto_resumes and has_no_checkpoint_yet(run):
        branches_off = False
    if branches_off:
        ensure_unused(run.path, config.overwrite)

    # From here on the other ranks take part (see run_worker).
    broadcast_from_main((config, start))
    trainer = _build_trainer(config, start, job.extensions)
    metadata: dict[str, Any] = {"config": to_dict(config), "choices": choices}
    # The run directory is touched when nothing is left that could be refused.
    if branches_off and (moved := move_aside(run.path)):
        assert job.lock is not None
        job.lock.relock(moved)
    write_provenance(run, to_dict(config), overrides)
    with log_file(run):
        if start is not None:
            log.info("resuming from %s", start.directory)
        try:
            training = trainer.fit(run, metadata, report)
        except StopSignal as stopped:
            _print_how_to_resume(stopped, job)
            raise
        except PeerLostError as lost:
            # Said here, so that train.log has it, too.
            lost.reported = True
            log.error("%s", lost)
            raise
    # A run that the pruner ended is not what anybody wants on the Hub.
    evaluation = training.evaluation
    if training.checkpoint is not None and not training.pruned:
        _push(job, training.checkpoint, evaluation.metrics if evaluation else {})
    _print_next_steps(job, evaluation.film_strip if evaluation else None)
    return Result(
        output_dir=run.path,
        step=training.step,
        metrics=training.metrics | (evaluation.metrics if evaluation else {}),
        checkpoint=training.checkpoint.directory if training.checkpoint else None,
        episodes=evaluation.episodes if evaluation else [],
        video_paths=evaluation.video_paths if evaluation else [],
        pruned=training.pruned,
    )


def _is_finished(checkpoint: Checkpoint, config: Config) -> bool:
    return checkpoint.step >= config.steps and not checkpoint.pending


def _finished_result(job: ResolvedJob, checkpoint: Checkpoint) -> Result:
    """Return the result of the run that ended with `checkpoint`."""
    run = job.run
    finish_cleanup(run, job.config, checkpoint)
    log.info("%s is finished: step %d; give more steps= to continue", run.path, checkpoint.step)
    return Result(run.path, checkpoint.step, run.metrics_of(checkpoint.step), checkpoint.directory)


def _print_how_to_resume(stopped: StopSignal, job: ResolvedJob) -> None:
    """Log the command that continues a run which a signal has stopped; train.log has the line, too."""
    config, run, overrides = job.config, job.run, job.overrides
    stopped.reported = True
    if stopped.checkpoint is None:
        log.warning("%s, no checkpoint was written", stopped)
        return
    # mode=resume leaves W&B off unless it is told otherwise.
    wandb = ["wandb.enable=true"] if config.wandb.enable else []
    again = ["mode=resume", f"output_dir={run.path}", f"steps={config.steps}", *wandb]
    if _is_finished(Checkpoint(stopped.checkpoint / "pretrained_model"), config):
        log.warning("%s, the last: the run is finished, in %s", stopped, stopped.checkpoint)
    else:
        command = command_line(overrides if config.resume.auto else again)
        log.warning("%s, saved %s; to resume: %s", stopped, stopped.checkpoint, command)


def _print_next_steps(job: ResolvedJob, film_strip: Path | None) -> None:
    """Log where to look after the last step, and three commands to try; a job of a sweep logs nothing."""
    config, run, overrides = job.config, job.run, job.overrides
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return
    if film_strip is not None:
        log.info("to look at: %s and the videos beside it", film_strip)
    if config.save_checkpoint:
        log.info("final evaluation: pusht-act mode=eval checkpoint=%s", run.path)
        # A schedule ends with its run: a longer one has to be trained from the start.
        if config.scheduler:
            again = [o for o in overrides if not o.startswith(("steps=", "job_name="))]
            longer = [*again, f"steps={2 * config.steps}", f"job_name={config.job_name}_longer"]
            log.info("to train twice as long: %s", command_line(longer))
        else:
            log.info("to continue training: pusht-act mode=resume output_dir=%s steps=%d", run.path, 2 * config.steps)
    if config.mode is Mode.resume:
        return
    several = ["-m", *(o for o in overrides if not o.startswith(("seed=", "output_dir="))), "seed=1,2,3"]
    log.info("to measure variance over seeds: %s", command_line(several))


def _check_can_push(config: Config) -> None:
    if config.policy.get("push_to_hub"):
        from pusht_act.checkpoints.hub import check_can_push

        check_can_push(config.policy.get("repo_id"))


def _push(job: ResolvedJob, checkpoint: Checkpoint, metrics: dict[str, float]) -> None:
    if job.config.policy.get("push_to_hub"):
        from pusht_act.checkpoints.hub import push

        log.info("pushed to %s", push(job.config, checkpoint.directory, metrics, command_line(job.overrides)))


def _evaluate(job: ResolvedJob) -> Result:
    from pusht_act.evaluation.identity import has_gpu, identify, model_digests
    from pusht_act.evaluation.records import Record

    config, checkpoint = job.config, job.start
    assert checkpoint is not None
    # A model that was copied without its training state tells no step.
    step = checkpoint.step if checkpoint.training_dir.is_dir() else 0
    model, device = model_digests(checkpoint.model_dir), str(config.policy.get("device", "auto"))
    if device == "auto" and has_gpu():
        from pusht_act.config.lerobot import resolve_device

        device = resolve_device(device)
    info = {
        "origin": "mode=eval",
        "checkpoint": str(checkpoint.directory),
        "options": [o for o in job.overrides if o.lstrip("+").startswith(("policy.", "env."))],
        "overrides": job.overrides,
        "command": command_line(job.overrides),
    }
    identity = identify(model, config.policy, device.replace("auto", "cpu"), config.env, config.eval)
    record = Record(job.run, step, identity, info, config.overwrite)
    # A stored result is printed at once, without torch.
    evaluation = record.load(config.eval.n_videos)
    if evaluation is None:
        evaluation = _run_evaluation(job, checkpoint, record)
    record.append()
    print(f"{checkpoint.directory}: {evaluation}; {record.directory}")
    return Result(
        record.directory,
        step,
        evaluation.metrics,
        checkpoint.directory,
        list(evaluation.episodes),
        evaluation.video_paths,
    )


def _run_evaluation(job: ResolvedJob, checkpoint: Checkpoint, record: "Record") -> "Evaluation":
    from pusht_act.envs.vector_env import make_vector_envs

    config = job.config
    # The environments' processes start while torch is imported here.
    with make_vector_envs(config.eval) as envs:
        from pusht_act.config.lerobot import decode_env, decode_policy
        from pusht_act.evaluation.evaluate import evaluate
        from pusht_act.evaluation.rollout import Actor
        from pusht_act.policy.act import load_policy, load_processors

        policy_config, env = decode_policy(config.policy), decode_env(config.env)
        policy = load_policy(policy_config, checkpoint.model_dir)
        processors = load_processors(policy_config, checkpoint.model_dir)
        return evaluate(Actor(policy, processors), envs, env, config.eval, record=record)


def _generate_demos(job: ResolvedJob) -> Result:
    config = job.config
    ensure_unused(job.run.path, config.overwrite, remedy="give another output_dir=")
    if config.demos.push_to_hub:
        from pusht_act.checkpoints.hub import check_can_push

        check_can_push(config.demos.repo_id, "demos")
    from pusht_act.demos.collect import planner_options
    from pusht_act.demos.initial_states import initial_states

    options, starts = planner_options(config.demos), initial_states(config.demos)
    from pusht_act.demos.generate import write_demos

    written = write_demos(config, options, starts, job.overrides)
    return Result(written.path, metrics=written.metrics, video_paths=[written.video])
