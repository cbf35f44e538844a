"""Generate scripted demonstrations (mode=demos): a LeRobotDataset v3.0 with the features of lerobot/pusht.

    output_dir.work/<key>/     while it is generated: one file for each planned start, the command, the unfinished data
                               set
    output_dir/                all at once, by renaming: data/ meta/ videos/ (LeRobot's), README.md (the card),
                               quality.json, film_strip.png, episode-0.mp4, demonstrations.npz (what was executed),
                               config.yaml and runs.jsonl

The same command resumes a job that was killed at any moment. A data set that is in output_dir is never modified.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import UInt8

from pusht_act.config.lerobot import decode_env
from pusht_act.config.overrides import override
from pusht_act.config.schema import Config
from pusht_act.demos.collect import collect, options_key
from pusht_act.demos.dataset_card import make_card, push
from pusht_act.demos.dataset_stats import HUMAN, dataset_stats, format_stats
from pusht_act.demos.expert import Demonstration
from pusht_act.demos.lerobot_writer import FPS, write_lerobot
from pusht_act.demos.planner import PlannerOptions
from pusht_act.envs.film_strip import film_strip
from pusht_act.envs.pusht import Start, make_env, reset_to
from pusht_act.envs.rendering import render_frame
from pusht_act.envs.video import write_video
from pusht_act.runs.commands import follow_up, record_command
from pusht_act.runs.provenance import package_versions, write_provenance
from pusht_act.runs.run_dir import RunDir, ensure_unused, move_aside
from pusht_act.runtime.lock import remove_stale
from pusht_act.runtime.system import cores

log = logging.getLogger(__name__)

# The file of its plan, its share of the data set, and half as much again.
EPISODE_BYTES = {False: 40_000, True: 90_000}
"""Space on disk for one episode, by whether it has images."""
OTHER_BYTES = 20_000_000
"""Space on disk for everything else."""
# Evaluation resets its environments with seeds from 100,000 and 200,000 up; the human data started at 0 to 205.
CLEAN_SEEDS = 1_000_000
"""Seeds from here on meet neither those of an evaluation nor those of the human data."""


@dataclass(frozen=True)
class Written:
    """A finished data set."""

    path: Path
    metrics: dict[str, float]
    """Its `dataset_stats`."""
    video: Path


def write_demos(config: Config, options: PlannerOptions, starts: Sequence[Start], overrides: list[str]) -> Written:
    """Plan `config.demos.n_episodes` successful episodes and write them to `config.output_dir`.

    Args:
        config: Configuration of the job.
        options: Options of the planner in `config.demos`.
        starts: Where the episodes start, by `config.demos`.
        overrides: The command line, for the record.

    Raises:
        UserError: Hardly any start is solved with `options`, or too few of all of them.
        FileExistsError: output_dir is in use, or another process is writing a data set there.
        OSError: The disk is full, or output_dir cannot be created.
    """
    image = decode_env(config.env).obs_type == "pixels_agent_pos"
    target = Path(config.output_dir).resolve()
    # Hours of planning follow: refuse what cannot end well before they start.
    _check_room(target, config.demos.n_episodes, image)
    if config.demos.initial_states is None and config.demos.start_seed < CLEAN_SEEDS:
        log.warning(
            "demos.start_seed=%d: evaluation resets with seeds from 100,000 and 200,000 up; a policy must not be "
            "evaluated on starts that it was trained on", config.demos.start_seed,
        )  # fmt: skip
    workers = config.demos.workers or cores()
    with _work_folder(target, options) as work:
        # Check again under the lock: another process may have finished it since this one started.
        ensure_unused(target, config.overwrite)
        write_provenance(RunDir(work), {**dataclasses.asdict(config), "mode": config.mode.value}, overrides)
        attempts = collect(work / "planned", options, starts, config.demos.n_episodes, workers)
        figures = dataset_stats(attempts)
        solved = [demo for demo in attempts if demo.success]
        log.info("writing %d episodes%s", len(solved), " with images" if image else "")

        # Write everything in the work folder: output_dir appears at once and complete, by the rename below.
        part = work / "dataset"
        shutil.rmtree(part, ignore_errors=True)
        write_lerobot(part, solved, image, workers)
        _write_extras(part, attempts, figures, options)
        make_card(part, config, figures, record_command(overrides)).save(part / "README.md")
        for name in ("config.yaml", "runs.jsonl"):
            shutil.copy(work / name, part)
        if move_aside(target) is None and target.exists():
            remove_stale(target)
        part.rename(target)
        shutil.rmtree(work)
    for line in format_stats(figures):
        if "---" not in line:
            log.info(line)
    log.info("%d episodes, %d frames in %s; film_strip.png there shows one", len(solved), figures["n_frames"], target)
    env = "pusht" if image else "pusht_keypoints"
    name = str(config.demos.repo_id) if config.demos.push_to_hub else f"local/{target.name}"
    train = [f"env={env}", override("dataset.repo_id", name), override("dataset.root", config.output_dir)]
    log.info("to train on them: %s", follow_up(train))
    if config.demos.push_to_hub:
        log.info("pushed to %s", push(target, config, figures, record_command(overrides)))
    return Written(Path(config.output_dir), figures, Path(config.output_dir) / "episode-0.mp4")


def _check_room(target: Path, count: int, image: bool) -> None:
    needed = OTHER_BYTES + count * EPISODE_BYTES[image]
    disk = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise OSError(
            f"output_dir={target}: {free / 1e6:.0f} MB are free there, and {count} episodes need about "
            f"{needed / 1e6:.0f} MB: free some, lower demos.n_episodes or give output_dir= on another disk"
        )


@contextmanager
def _work_folder(target: Path, options: PlannerOptions) -> Iterator[Path]:
    """Yield the folder in which the data set is generated, locked for this process."""
    # Beside `target`, so that it is on the same disk and renaming moves no bytes; one folder for each set of options,
    # so that demonstrations of different options are never mixed.
    root = target.with_name(f"{target.name}.work")
    work = root / options_key(options)
    try:
        (work / "planned").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"output_dir={target}: {root} cannot be created ({error.strerror}): give an output_dir= that is writable"
        ) from error
    lock = FileLock(root / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(
            f"output_dir={target} is being written by another process: wait for it, or give another output_dir="
        ) from error
    try:
        yield work
    finally:
        lock.release()
        if not work.exists():
            # Not empty if demonstrations of other options are waiting there.
            with suppress(OSError):
                (root / "lock").unlink(missing_ok=True)
                root.rmdir()


def _write_extras(
    root: Path, attempts: Sequence[Demonstration], figures: dict[str, float], options: PlannerOptions
) -> None:
    """Write what LeRobot's format does not hold: executed actions, statistics, a video and a film strip."""
    solved = [demo for demo in attempts if demo.success]
    first = solved[0].start
    kind = "seed" if isinstance(first, int) else "start"
    # For those who want to replay the demonstrations in the simulator.
    kept: dict[str, Any] = {
        kind: np.array([demo.start for demo in solved]),
        "length": np.array([len(demo.action) for demo in solved], np.int64),
        "action": np.concatenate([demo.action for demo in solved]),
        "executed": np.concatenate([demo.executed for demo in solved]),
        "coverage": np.array([demo.coverage for demo in solved], np.float64),
    }
    np.savez_compressed(root / "demonstrations.npz", **kept)
    # For those who want to compare them with others, or to make them again.
    record = {
        "demonstrations": figures,
        "human": HUMAN,
        "options": dataclasses.asdict(options),
        f"{kind}s_not_solved": [demo.start for demo in attempts if not demo.success],
        "versions": package_versions(),
    }
    (root / "quality.json").write_text(json.dumps(record, indent=2) + "\n")
    # For those who want to see one.
    frames = _render_episode(solved[0])
    write_video(root / "episode-0.mp4", frames, FPS)
    film_strip(frames, True, first if isinstance(first, int) else None).save(root / "film_strip.png")


def _render_episode(demo: Demonstration) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Render large frames of an episode: one before each action, and one after the last."""
    env = make_env()
    env.visualization_width = env.visualization_height = 384
    reset_to(env, demo.start)
    frames = [render_frame(env)]
    for action in demo.executed:
        env.step(action)
        frames.append(render_frame(env))
    return frames
