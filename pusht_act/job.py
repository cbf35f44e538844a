"""One job: resolve it once (resolve.py), then run its mode.

    DictConfig, overrides, choices  -> ResolvedJob  -> train, evaluate or generate demonstrations  -> Result

What can be refused is refused before torch and lerobot are imported, which takes seconds.
"""

import dataclasses
import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pusht_act.checkpoints.checkpoint import MODEL_DIR, Checkpoint
from pusht_act.checkpoints.merge_config import blamed_on
from pusht_act.checkpoints.resume import describe_restart
from pusht_act.checkpoints.retention import finish_cleanup
from pusht_act.config.lerobot_command import lerobot_command
from pusht_act.config.overrides import check_overrides, override
from pusht_act.config.schema import Config, Mode, to_dict
from pusht_act.config.validation import check_processes, check_share
from pusht_act.resolve import ResolvedJob, is_finished, resolve
from pusht_act.runs import commands
from pusht_act.runs.provenance import log_file, write_provenance
from pusht_act.runs.run_dir import RunDir, ensure_unused, move_aside
from pusht_act.runtime.distributed import PeerLostError, broadcast_from_main, raise_on_any_rank, world_size
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.signals import StopSignal, signals
from pusht_act.training.extensions import Extensions

if TYPE_CHECKING:
    from pusht_act.evaluation.records import Evaluation, Record
    from pusht_act.training.result import Report, TrainResult
    from pusht_act.training.trainer import Trainer

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


def run_job(
    cfg: DictConfig,
    overrides: list[str],
    choices: dict[str, str | None],
    report: "Report | None" = None,
    extensions: Extensions | None = None,
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
    # From here the job is decided, and its run directory locked until it has ended.
    with _memory_errors_named(), resolve(cfg, overrides, choices) as resolved:
        job = dataclasses.replace(resolved, report=report, extensions=extensions or Extensions())
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


@contextmanager
def _memory_errors_named() -> Iterator[None]:
    """Say in one line that something does not fit into memory; torch raises a mere RuntimeError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has a class of its own for a GPU only.
        said = re.search(r"can't allocate memory|out of memory|Storage size calculation overflowed", str(error))
        if said is None and not isinstance(error, MemoryError):
            raise
        raise UserError(
            f"not enough memory ({str(error).splitlines()[0][:200] if str(error) else 'MemoryError'}): give smaller "
            "values, such as batch_size= or those of policy.*"
        ) from error


def run_worker(extensions: Extensions | None = None) -> Result:
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
        trainer = _build_trainer(config, start, extensions or Extensions(), [])
        try:
            training = trainer.fit(run, {})
        except PeerLostError as lost:
            lost.remedy = describe_restart(config, run)
            raise
    return Result(run.path, training.step, training.metrics)


def _build_trainer(config: Config, start: Checkpoint | None, extensions: Extensions, overrides: list[str]) -> "Trainer":
    """Build the trainer on every rank; the first import of torch and lerobot."""
    _import("pusht_act.config.lerobot", "pusht_act.training.build")
    from pusht_act.config.lerobot import decode
    from pusht_act.training.build import build_trainer

    with raise_on_any_rank(), blamed_on(start, overrides) if start is not None else nullcontext():
        lerobot = decode(config)
    return build_trainer(config, lerobot, start, extensions)


def _import(*modules: str) -> None:
    """Import what takes seconds, `config.lerobot` first (see there).

    A signal waits for it: raised from within torch's compiled code it would abort.
    """
    with signals.defer("importing torch first"):
        for module in modules:
            importlib.import_module(module)


def _train(job: ResolvedJob) -> Result:
    config, start, run = job.config, job.start, job.run
    if job.auto_resumes and start is not None and is_finished(start, config):
        job.extensions.check_same(start)
        return _finished_result(job, start)
    # A run that resumes in its own folder may write there; any other needs a folder that is not in use.
    check_share(config.batch_size, world_size())
    _check_can_push(config)
    branches_off = start is None or start.run_dir != run.path.resolve()
    if job.auto_resumes and run.restart_option() == "resume.auto=true":
        branches_off = False
    if branches_off:
        ensure_unused(run.path, config.overwrite)

    # From here on the other ranks take part (see run_worker).
    _import("pusht_act.config.lerobot", "pusht_act.training.build")
    from pusht_act.training.automatic import resolve_automatic

    job = dataclasses.replace(job, config=resolve_automatic(config, start))
    broadcast_from_main((job.config, start))
    trainer = _build_trainer(job.config, start, job.extensions, job.overrides)
    # The run directory is touched when nothing is left that could be refused.
    if branches_off and (moved := move_aside(run.path)):
        assert job.lock is not None
        job.lock.relock(moved)
    write_provenance(run, to_dict(job.config), job.overrides, job.extensions.metadata())
    with log_file(run):
        training = _fit(trainer, job)
        evaluation = training.evaluation
        # A run that the pruner ended is not what anybody wants on the Hub.
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


def _fit(trainer: "Trainer", job: ResolvedJob) -> "TrainResult":
    """Train in the run directory, and log how to continue if something ends that early."""
    if job.start is not None:
        log.info("resuming from %s", job.start.directory)
    try:
        return trainer.fit(job.run, {"config": to_dict(job.config), "choices": job.choices}, job.report)
    except StopSignal as stopped:
        _print_how_to_resume(stopped, job)
        raise
    except PeerLostError as lost:
        # Said here, so that train.log has it, too.
        lost.remedy, lost.reported = describe_restart(job.config, job.run), True
        log.error("%s", lost)
        raise


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
        remedy = describe_restart(config, run) if config.save_checkpoint else "no checkpoint was written"
        log.warning("%s; %s", stopped, remedy)
        return
    again = ["mode=resume", override("output_dir", str(run.path)), f"steps={config.steps}"]
    if is_finished(Checkpoint(stopped.checkpoint / MODEL_DIR), config):
        log.warning("%s, the last: the run is finished, in %s", stopped, stopped.checkpoint)
    else:
        command = job.extensions.follow_up(overrides if config.resume.auto else again)
        log.warning("%s, saved %s; to resume: %s", stopped, stopped.checkpoint, command)


def _print_next_steps(job: ResolvedJob, film_strip: Path | None) -> None:
    """Log where to look after the last step, and three commands to try; a job of a sweep logs nothing."""
    config, run, overrides = job.config, job.run, job.overrides
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return
    if film_strip is not None:
        log.info("to look at: %s and the videos beside it", film_strip)
    here, follow_up = override("output_dir", str(run.path)), job.extensions.follow_up
    if config.save_checkpoint:
        log.info("final evaluation: %s", commands.follow_up(["mode=eval", override("checkpoint", str(run.path))]))
        # A schedule ends with its run: a longer one has to be trained from the start.
        if not config.scheduler:
            log.info("to continue training: %s", follow_up(["mode=resume", here, f"steps={2 * config.steps}"]))
        elif config.mode is not Mode.resume:
            again = [o for o in overrides if not o.startswith(("steps=", "job_name=", "output_dir="))]
            name = override("job_name", f"{config.job_name}_longer")
            log.info("to train twice as long: %s", follow_up([*again, f"steps={2 * config.steps}", name]))
    if config.mode is Mode.resume:
        return
    again, seed = [o for o in overrides if not o.startswith(("seed=", "output_dir="))], config.seed + 1
    # A call from Python and torchrun start one job, in a folder that it has to name.
    one = [*again, f"seed={seed}", override("output_dir", f"{run.path}_seed{seed}")]
    is_one = job.extensions.metadata() or commands.is_launched()
    log.info("to measure variance over seeds: %s", follow_up(one if is_one else ["-m", *again, "seed=1,2,3"]))


def _check_can_push(config: Config) -> None:
    if config.policy.get("push_to_hub"):
        from pusht_act.checkpoints.hub import check_can_push

        check_can_push(config.policy.get("repo_id"))


def _push(job: ResolvedJob, checkpoint: Checkpoint, metrics: dict[str, float]) -> None:
    if job.config.policy.get("push_to_hub"):
        from pusht_act.checkpoints.hub import push

        log.info("pushed to %s", push(job.config, checkpoint.directory, metrics, job.extensions.command(job.overrides)))


def _evaluate(job: ResolvedJob) -> Result:
    from pusht_act.evaluation.identity import has_gpu, identify, model_digests
    from pusht_act.evaluation.records import Record

    config, checkpoint = job.config, job.start
    assert checkpoint is not None
    # A model that was copied without its training state tells no step.
    step = checkpoint.step if checkpoint.training_dir.is_dir() else 0
    model, device = model_digests(checkpoint.model_dir), str(config.policy.get("device", "auto"))
    if device == "auto" and has_gpu():
        _import("pusht_act.config.lerobot")
        from pusht_act.config.lerobot import resolve_device

        device = resolve_device(device)
    # What is kept beside the result, and what decides whether this is the same evaluation.
    info = {
        "origin": "mode=eval",
        "checkpoint": str(checkpoint.path),
        "options": [o for o in job.overrides if o.lstrip("+").startswith(("policy.", "env."))],
        "overrides": job.overrides,
        "command": job.extensions.command(job.overrides),
    }
    identity = identify(model, config.policy, device.replace("auto", "cpu"), config.env, config.eval)
    record = Record(job.run, step, identity, info, config.overwrite)
    # A stored result is printed at once, without torch.
    evaluation = record.load(config.eval.n_videos)
    if evaluation is None:
        evaluation = _run_evaluation(job, checkpoint, record)
        _log_to_wandb(job, checkpoint, step, evaluation)
    record.append()
    print(f"{checkpoint.path}: {evaluation}; {record.directory}")
    return Result(
        record.directory,
        step,
        evaluation.metrics,
        checkpoint.directory,
        list(evaluation.episodes),
        evaluation.video_paths,
    )


def _log_to_wandb(job: ResolvedJob, checkpoint: Checkpoint, step: int, evaluation: "Evaluation") -> None:
    """Add the evaluation to the W&B run that trained the checkpoint, if W&B is on; to a new one without such a run."""
    if not job.config.wandb.enable:
        return
    from pusht_act.runs.wandb_logger import open_wandb

    wandb = open_wandb(job.config, job.run, checkpoint.wandb_run_id)
    if wandb is not None:
        wandb.log({f"test/{key}": value for key, value in evaluation.metrics.items()}, step)
        wandb.log_videos("test", evaluation.video_paths, evaluation.film_strip, step)
        wandb.close(failed=False)


def _run_evaluation(job: ResolvedJob, checkpoint: Checkpoint, record: "Record") -> "Evaluation":
    from pusht_act.envs.vector_env import make_vector_envs

    config = job.config
    # The environments' processes start while torch is imported here.
    with make_vector_envs(config.eval) as envs:
        _import("pusht_act.config.lerobot", "pusht_act.evaluation.evaluate", "pusht_act.policy.act")
        from pusht_act.config.lerobot import check_observations, decode_env, decode_policy
        from pusht_act.evaluation.evaluate import evaluate
        from pusht_act.evaluation.rollout import Actor
        from pusht_act.policy.act import load_policy, load_processors

        with blamed_on(checkpoint, job.overrides):
            policy_config, env = decode_policy(config.policy), decode_env(config.env)
            check_observations(policy_config, env)
        policy = load_policy(policy_config, checkpoint.model_dir)
        processors = load_processors(policy_config, checkpoint.model_dir)
        return evaluate(Actor(policy, processors), envs, env, config.eval, record=record)


def _generate_demos(job: ResolvedJob) -> Result:
    config = job.config
    ensure_unused(job.run.path, config.overwrite, remedy="give another output_dir=")
    if config.demos.push_to_hub:
        from pusht_act.checkpoints.hub import check_can_push

        check_can_push(config.demos.repo_id, "demos")
    _import("pusht_act.demos.collect", "pusht_act.demos.generate")
    from pusht_act.demos.collect import planner_options
    from pusht_act.demos.initial_states import initial_states

    options, starts = planner_options(config.demos), initial_states(config.demos)
    from pusht_act.demos.generate import write_demos

    written = write_demos(config, options, starts, job.overrides)
    return Result(written.path, metrics=written.metrics, video_paths=[written.video])
