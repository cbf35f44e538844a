"""One job from its composed configuration: check it, find its checkpoint and run directory, then do its mode.

What can be refused is refused before torch and lerobot are imported, which takes seconds.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pusht_act.config import Config, Mode, config_from
from pusht_act.inherit import inherit
from pusht_act.lerobot_command import lerobot_command
from pusht_act.run_dir import (
    Checkpoint,
    RunDir,
    check_unused,
    command_line,
    find_checkpoint,
    last_checkpoint,
    move_aside,
    write_provenance,
)

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
    if mode is Mode.eval:
        checkpoint = _evaluated(config_from(cfg))
        config = config_from(inherit(cfg, checkpoint, overrides, choices, resume=False))
    elif mode is Mode.resume:
        config_from(cfg)
        checkpoint, cfg.output_dir = _resumed(cfg, overrides)
        config = config_from(inherit(cfg, checkpoint, overrides, choices, resume=True))
        if checkpoint.step >= config.steps:
            raise ValueError(
                f"steps={config.steps}: {checkpoint.directory} is at step {checkpoint.step} already; give more steps="
            )
    else:
        checkpoint, config = None, config_from(cfg)
    if config.print_lerobot_command:
        print(lerobot_command(config, checkpoint))
        return Result(Path(config.output_dir))
    if mode is Mode.eval:
        assert checkpoint is not None
        return _evaluate(config, checkpoint, overrides)
    if mode is Mode.demos:
        return _demonstrate(config, overrides)
    return _train(config, checkpoint, overrides, choices)


def _resumed(cfg: DictConfig, overrides: list[str]) -> tuple[Checkpoint, str]:
    """The checkpoint to resume, and the run directory to go on in."""
    given = any(override.startswith("output_dir=") for override in overrides)
    if cfg.resume.path is None:
        return last_checkpoint(RunDir(Path(cfg.output_dir))), cfg.output_dir
    checkpoint = find_checkpoint(cfg.resume.path, "resume.path")
    output_dir = Path(cfg.output_dir) if given or checkpoint.run is None else checkpoint.run
    if checkpoint.run == output_dir.resolve():
        last = last_checkpoint(RunDir(output_dir))
        if last.step > checkpoint.step:
            raise ValueError(
                f"resume.path={cfg.resume.path} is at step {checkpoint.step}, its run went on to {last.step}: "
                "give output_dir=NEW to branch off, or leave resume.path out to go on from the last"
            )
    else:
        check_unused(output_dir, cfg.overwrite)
    return checkpoint, str(output_dir)


def _evaluated(config: Config) -> Checkpoint:
    """The checkpoint of mode=eval: a path, or else a model on the Hub."""
    name = str(config.checkpoint)
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).exists() or not looks_like_hub:
        return find_checkpoint(name, "checkpoint")
    from pusht_act.hub import download

    return Checkpoint(download(name))


def _train(config: Config, start: Checkpoint | None, overrides: list[str], choices: dict[str, str | None]) -> Result:
    if config.policy.get("push_to_hub"):
        from pusht_act.hub import check_can_push

        check_can_push(config.policy.get("repo_id"))
    run = RunDir(Path(config.output_dir))
    branches_off = start is None or start.run != run.path.resolve()
    if branches_off:
        check_unused(run.path, config.overwrite)

    from pusht_act.lerobot_config import decode
    from pusht_act.train import set_up, train

    lerobot = decode(config)
    plain = {**dataclasses.asdict(config), "mode": config.mode.value}
    record: dict[str, Any] = {"config": plain, "choices": choices}
    setup = set_up(config, lerobot, start)
    # The run directory is touched when nothing is left that could be refused.
    if branches_off:
        move_aside(run.path)
    write_provenance(run, plain, overrides)
    with _log_file(run):
        training = train(config, lerobot, setup, run, record)
    if config.policy.get("push_to_hub") and training.checkpoint is not None:
        from pusht_act.hub import push

        metrics = training.evaluation.metrics if training.evaluation else {}
        log.info("pushed to %s", push(config, training.checkpoint.directory, metrics, command_line(overrides)))
    evaluation = training.evaluation
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


@contextmanager
def _log_file(run: RunDir) -> Iterator[None]:
    """What the console shows goes to train.log too."""
    handler = logging.FileHandler(run.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("pusht_act").setLevel(logging.INFO)  # from Python nobody has configured logging
    logging.getLogger().addHandler(handler)
    log.info("run directory: %s", run.path)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _evaluate(config: Config, checkpoint: Checkpoint, overrides: list[str]) -> Result:
    from pusht_act.evaluate import evaluate
    from pusht_act.lerobot_config import decode_env, decode_policy
    from pusht_act.policy import load_policy, load_processors

    policy_config = decode_policy(config.policy)
    policy = load_policy(policy_config, checkpoint.model)
    processors = load_processors(policy_config, checkpoint.model)
    step = checkpoint.step if checkpoint.training.is_dir() else 0
    given = any(override.startswith("output_dir=") for override in overrides)
    run = RunDir(Path(config.output_dir) if given or checkpoint.run is None else checkpoint.run)
    directory = run.evaluation(step, config.eval.start_seed, config.eval.n_episodes)
    evaluation = evaluate(policy, processors, decode_env(config.env), config.eval, directory=directory)
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

    options = planner_options(config.demos)
    from pusht_act.demos.dataset import write_demos

    written = write_demos(config, options, overrides)
    return Result(written.path, metrics=written.metrics, video_paths=[written.video])
