"""mode=dagger (Ross et al. 2011): train, see where the policy gets to, have that labelled, train on with the labels.

<output_dir>/
  round-0/           an ordinary run on the data set
  labels/round-1/    the states in which round 0's policy made its decisions, labelled by the demonstrator
  round-1/           an ordinary run from round 0's weights, on the data set and labels/round-1
  labels/round-2/    ...
  config.yaml  runs.jsonl  train.log

What is finished is kept, so the same command goes on wherever it was stopped, on the CPU to the same bits.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.envs.configs import PushtEnv

from pusht_act.config import Config, Mode, plain
from pusht_act.data import open_dataset
from pusht_act.demos.labels import Decisions, kept_decisions, label_decisions, read_labels, save_decisions
from pusht_act.demos.planner import PlannerOptions
from pusht_act.environments import environments
from pusht_act.evaluate import evaluate
from pusht_act.integrity import damage
from pusht_act.lerobot_config import LeRobotConfig, decode, decode_policy
from pusht_act.lock import Lock, locked
from pusht_act.policy import load_policy, load_processors
from pusht_act.run_dir import (
    Checkpoint,
    RunDir,
    command_line,
    last_checkpoint,
    log_file,
    move_aside,
    write_provenance,
)
from pusht_act.signals import Stopped
from pusht_act.train import Setup, set_up, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """A finished round."""

    run: RunDir
    checkpoint: Checkpoint
    frames: int
    """In the data set and all labels so far."""
    metrics: dict[str, float]
    """Of its last step: training means and, if there was an evaluation, its metrics."""


def dagger(
    config: Config,
    options: PlannerOptions,
    overrides: list[str],
    choices: dict[str, str | None],
    lock: Lock,
    fresh: bool,
) -> list[Round]:
    """All rounds of `config`, those that are finished read and the others made; the last one's is the final policy.

    `options` are the demonstrator's; `lock` is held on `output_dir`; `fresh` says that it holds nothing to go on from.

    Raises:
        ValueError: a configuration that does not fit the data; nothing was written.
        FileExistsError: another process is at work in a round's directory.
        OSError: no room on the disk, or a labelling process was killed.
    """
    root = RunDir(Path(config.output_dir))
    lerobot = decode(config)
    jobs = [_job(config, number) for number in range(config.dagger.rounds + 1)]
    prepared = _prepared(jobs[0], None) if fresh else None
    if fresh and (moved := move_aside(root.path)):
        lock.take_again(moved)
    write_provenance(root, plain(config), overrides)
    with log_file(root), _saying_how_to_go_on(overrides):
        for number, job in enumerate(jobs):
            name = f"round {number}/{config.dagger.rounds}"
            if _finished(job) is not None:
                log.info("%s: finished already", name)
                continue
            if number:
                _label(config, lerobot, options, number, name)
            log.info("%s: training, %s", name, job.output_dir)
            _train(job, prepared or _prepared(job, _stopped_at(job)), overrides, choices)
            prepared = None  # its data may fill a GPU
        rounds = _rounds(jobs, len(open_dataset(config, lerobot)))
        _report(rounds)
    return rounds


def _job(config: Config, number: int) -> Config:
    """The ordinary job that round `number` is: paths are absolute, so that it can be resumed from anywhere."""
    root = Path(config.output_dir).resolve()
    policy = config.policy
    if number:
        policy = {**policy, "pretrained_path": str(_checkpoint(root / f"round-{number - 1}", config.steps).model)}
    labels = [str(_labels(config, n).resolve()) for n in range(1, number + 1)]
    return dataclasses.replace(
        config,
        mode=Mode.full,
        output_dir=str(Path(config.output_dir) / f"round-{number}"),
        job_name=f"{config.job_name}_round-{number}",
        overwrite=False,
        policy=policy,
        dagger=dataclasses.replace(config.dagger, labels=labels),
    )


def _labels(config: Config, number: int) -> Path:
    return Path(config.output_dir) / "labels" / f"round-{number}"


def _checkpoint(run: Path, steps: int) -> Checkpoint:
    """The one that a run of `steps` ends with, there or not."""
    return Checkpoint(RunDir(run).checkpoints / f"{steps:06d}" / "pretrained_model")


def _finished(job: Config) -> Checkpoint | None:
    checkpoint = _checkpoint(Path(job.output_dir), job.steps)
    return checkpoint if damage(checkpoint.directory) is None else None


def _stopped_at(job: Config) -> Checkpoint | None:
    """The last sound checkpoint of a round that was begun, if it got to one; the round may have gone on since."""
    run = RunDir(Path(job.output_dir))
    return last_checkpoint(run, job.steps, f"delete {run.path} to train it again") if run.has_checkpoints() else None


def _prepared(job: Config, start: Checkpoint | None) -> tuple[LeRobotConfig, Setup]:
    lerobot = decode(job)
    return lerobot, set_up(job, lerobot, start)


def _train(
    job: Config, prepared: tuple[LeRobotConfig, Setup], overrides: list[str], choices: dict[str, str | None]
) -> None:
    run = RunDir(Path(job.output_dir))
    with locked(run.path):
        write_provenance(run, plain(job), overrides)
        with log_file(run):
            train(job, *prepared, run, {"config": plain(job), "choices": choices})


def _label(config: Config, lerobot: LeRobotConfig, options: PlannerOptions, number: int, name: str) -> None:
    """Have the states labelled that the policy of the round before gets into; what is kept of it is not made again."""
    folder = _labels(config, number)
    decisions = kept_decisions(folder)
    if decisions is None:
        log.info("%s: rolling out %d episodes", name, config.dagger.n_rollouts)
        decisions = _rolled_out(config, lerobot.env, number)
        save_decisions(folder, decisions)
    # Twice the chunk, so that a sample anywhere in the first half of a label has all of its actions.
    length = 2 * lerobot.policy.chunk_size
    label_decisions(folder, decisions, options, length, config.dagger.workers, name)


def _rolled_out(config: Config, env: PushtEnv, number: int) -> Decisions:
    checkpoint = _checkpoint(Path(config.output_dir) / f"round-{number - 1}", config.steps)
    saved = json.loads((checkpoint.model / "config.json").read_text())
    policy_config = decode_policy({**saved, "device": config.policy.get("device", "auto")})
    policy, processors = load_policy(policy_config, checkpoint.model), load_processors(policy_config, checkpoint.model)
    count, first = config.dagger.n_rollouts, config.dagger.start_seed + (number - 1) * config.dagger.n_rollouts
    rollouts = dataclasses.replace(config.eval, n_episodes=count, start_seed=first, n_videos=0)
    with environments(rollouts) as envs:
        evaluation = evaluate(policy, processors, envs, env, rollouts, description="rolling out")
    log.info("%s: %s", checkpoint.directory, evaluation)
    return {
        episode.seed: np.array(states).reshape(-1, 7)
        for episode, states in zip(evaluation.episodes, evaluation.decisions, strict=True)
    }


def _rounds(jobs: list[Config], frames: int) -> list[Round]:
    """What `jobs` came to; `frames` are those of the data set alone."""
    rounds = []
    for job in jobs:
        for folder in job.dagger.labels[-1:]:
            frames += sum(len(label.action) for label in read_labels(Path(folder)))
        run, checkpoint = RunDir(Path(job.output_dir)), _finished(job)
        assert checkpoint is not None
        rounds.append(Round(run, checkpoint, frames, run.metrics_of(job.steps)))
    return rounds


def _report(rounds: list[Round]) -> None:
    log.info("| round |     frames | success                     |")
    for number, made in enumerate(rounds):
        m, success = made.metrics, "not evaluated"
        if "pc_success" in m:
            interval = f"(95 %: {m['pc_success_low']:.1f} to {m['pc_success_high']:.1f})"
            success = f"{m['pc_success']:.1f} % {interval}"
        log.info("| %5d | %10s | %-27s |", number, f"{made.frames:,}", success)
    evaluated = command_line(["mode=eval", f"checkpoint={rounds[-1].run.path}"])
    log.info("the final policy is that of round %d; 500 episodes on fresh seeds: %s", len(rounds) - 1, evaluated)


@contextmanager
def _saying_how_to_go_on(overrides: list[str]) -> Iterator[None]:
    try:
        yield
    except Stopped as stopped:
        saved = f", saved {stopped.checkpoint}" if stopped.checkpoint else ""
        log.warning("%s%s; to go on: %s", stopped, saved, command_line(overrides))
        stopped.told = True
        raise
