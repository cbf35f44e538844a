"""Labels for DAgger: what the demonstrator would do in the states that a policy got into, kept rollout by rollout.

    <folder>/decisions.npz   those states: seed [R], count [R], state [S, 7]
    <folder>/<seed>.npz      the labels of one rollout, atomically: state [L, 7], length [L], action [sum of lengths, 2]

A label is a short episode that begins in the policy's own state and goes on as the demonstrator would. Workers import
neither torch nor lerobot.
"""

import logging
import os
import zipfile
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64
from tqdm import tqdm

from pusht_act.cores import cores
from pusht_act.demos.coverage import SUCCESS_COVERAGE, coverage_of_poses
from pusht_act.demos.demonstrator import label
from pusht_act.demos.planner import PlannerOptions
from pusht_act.demos.replay import Start, check_start
from pusht_act.demos.workers import AGAIN, in_order

log = logging.getLogger(__name__)

Decisions = dict[int, Float64[np.ndarray, "D 7"]]
"""seed of a rollout's reset -> the states that the policy looked at, as `demonstrator.label` takes them."""
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Label:
    """One labelled state."""

    start: Start
    action: Float32[np.ndarray, "T 2"]
    """What the demonstrator does from there on, px."""


def save_decisions(folder: Path, decisions: Decisions) -> None:
    """Keep what was rolled out, all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(
        folder / "decisions.npz",
        seed=np.array(list(decisions), np.int64),
        count=np.array([len(states) for states in decisions.values()], np.int64),
        state=np.concatenate(list(decisions.values())),
    )


def kept_decisions(folder: Path) -> Decisions | None:
    """What `save_decisions` kept; None when it did not, or the file is damaged."""
    path = folder / "decisions.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            pieces = np.split(file["state"], np.cumsum(file["count"])[:-1])
            return dict(zip(file["seed"].tolist(), pieces, strict=True))
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        log.warning("%s is damaged (%s): rolling out again", path, error)
        return None


def label_decisions(
    folder: Path, decisions: Decisions, options: PlannerOptions, length: int, workers: int, description: str
) -> None:
    """Label each of `decisions` with up to `length` actions, a file a rollout; those that have a file are kept.

    A state that is solved or out of the arena has no label. The number of `workers` (0: one for each core) changes
    nothing but the time.

    Raises:
        OSError: the disk is full, or the system killed a worker.
    """
    workers = workers or cores()
    missing = [seed for seed in decisions if _kept(folder, seed) is None]
    total = sum(map(len, decisions.values()))
    done = total - sum(len(decisions[seed]) for seed in missing)
    if not missing:
        return
    kept = f", {done:,} are there already" if done else ""
    log.info("%s: labelling %s states, workers: %d%s", description, f"{total:,}", workers, kept)
    work = partial(_label_rollout, folder, options, length)
    rollouts = [(seed, decisions[seed]) for seed in missing]
    remedy = f"what was labelled is kept, {AGAIN} dagger.workers"
    with (
        tqdm(total=total, initial=done, desc="labelling", unit="state", disable=None) as bar,
        closing(in_order(work, rollouts, min(workers, len(rollouts)), remedy)) as counts,
    ):
        for count in counts:
            bar.update(count)


def read_labels(folder: Path) -> list[Label]:
    """All labels in `folder`, rollout by rollout.

    Raises:
        ValueError: it holds none, or one is missing or damaged.
    """
    decisions = kept_decisions(folder)
    if decisions is None:
        raise ValueError(f"dagger.labels={folder} holds no labels: give folders labels/round-N that mode=dagger wrote")
    labels: list[Label] = []
    for seed in decisions:
        kept = _kept(folder, seed)
        if kept is None:
            raise ValueError(f"dagger.labels={folder}: {seed}.npz is missing or damaged: give mode=dagger again")
        labels += kept
    return labels


def _label_rollout(folder: Path, options: PlannerOptions, length: int, rollout: tuple[int, np.ndarray]) -> int:
    """Write the labels of one rollout; the number of its states."""
    seed, states = rollout
    labels = [Label(check_start(state), label(state, options, length)) for state in states if _wants_label(state)]
    _save(
        folder / f"{seed}.npz",
        state=np.array([made.start for made in labels], np.float64).reshape(-1, 7),
        length=np.array([len(made.action) for made in labels], np.int64),
        action=np.concatenate([np.empty((0, 2), np.float32), *(made.action for made in labels)]),
    )
    return len(states)


def _wants_label(state: Float64[np.ndarray, " 7"]) -> bool:
    try:
        check_start(state)
    except ValueError:  # pushed through a wall
        return False
    return bool(coverage_of_poses(state[None, 2:5])[0] <= SUCCESS_COVERAGE)


def _kept(folder: Path, seed: int) -> list[Label] | None:
    path = folder / f"{seed}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            actions = np.split(file["action"], np.cumsum(file["length"])[:-1]) if len(file["length"]) else []
            return [Label(check_start(state), action) for state, action in zip(file["state"], actions, strict=True)]
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        log.warning("%s is damaged (%s)", path, error)
        return None


def _save(path: Path, **arrays: np.ndarray) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)
