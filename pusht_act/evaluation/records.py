"""What an evaluation is, and what of it is written to disk. Imports neither torch nor lerobot.

<directory>/episodes.csv      one row an episode
            episodes.npz      seeds [N], starts [N, 5], coverage by step [N, T] padded with NaN, lengths [N]
            metrics.json      success rate with its interval, means, and what was evaluated by what, where and when
            episode-N.mp4     the first `eval.n_videos` episodes
            film_strip.png    the first episode, if there is a video of it
"""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pusht_act.envs.episode import EpisodeResult, VideoRequest
from pusht_act.evaluation.identity import digest
from pusht_act.evaluation.stats import wilson_interval
from pusht_act.runs.provenance import git_commit, machine, package_versions
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.stored import check_is_file, read_json, read_text

READERS: dict[str, Callable[[str], Any]] = {
    **{"episode_ix": int, "seed": int, "success": lambda text: text == "True", "steps": int},
    **{"max_reward": float, "sum_reward": float, "coverage": float},
}
COLUMNS = ("episode_ix", "seed", "success", "max_reward", "sum_reward", "coverage", "steps")
"""Of episodes.csv."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    episodes: list[EpisodeResult]
    seconds: float
    video_paths: list[Path] = field(default_factory=list)
    film_strip: Path | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics under LeRobot's names, and the 95 % interval of pc_success, in percent like it."""
        successes = sum(episode.success for episode in self.episodes)
        # Success is a coin toss an episode, so a rate without its interval invites wrong conclusions.
        low, high = wilson_interval(successes, len(self.episodes))
        return {
            "pc_success": 100.0 * successes / len(self.episodes),
            "pc_success_low": 100.0 * low,
            "pc_success_high": 100.0 * high,
            "avg_max_reward": float(np.mean([episode.max_reward for episode in self.episodes])),
            "avg_sum_reward": float(np.mean([episode.sum_reward for episode in self.episodes])),
            "n_episodes": len(self.episodes),
        }

    @property
    def score(self) -> tuple[float, float]:
        """What checkpoints are compared by: the success rate, then how close the other episodes came."""
        # Early in training several checkpoints have the same success rate, often none.
        return self.metrics["pc_success"], self.metrics["avg_max_reward"]

    def __str__(self) -> str:
        m = self.metrics
        seeds = f"seeds {self.episodes[0].seed} to {self.episodes[-1].seed}"
        return (
            f"success {m['pc_success']:.1f} % (95 %: {m['pc_success_low']:.1f} to {m['pc_success_high']:.1f}), "
            f"mean max reward {m['avg_max_reward']:.3f} over {m['n_episodes']} episodes, {seeds}, {self.seconds:.1f} s"
        )


def video_requests(directory: Path, count: int, fps: int) -> list[VideoRequest]:
    """Return the videos to record of the first `count` episodes; the first gets a film strip, too."""
    return [
        VideoRequest(directory / f"episode-{i}.mp4", fps, directory / "film_strip.png" if i == 0 else None)
        for i in range(count)
    ]


@dataclass(frozen=True)
class _Metrics:
    """What is read of metrics.json."""

    eval_s: float


@dataclass(frozen=True)
class Record:
    """Where an evaluation is stored, and what its metrics.json holds beside its numbers."""

    run: RunDir
    step: int
    identity: dict[str, Any]
    """All that decides the numbers (identity.py)."""
    info: dict[str, Any] = field(default_factory=dict)
    """Where it came from: origin, checkpoint, overrides, command."""
    overwrite: bool = False
    """Whether to repeat what is stored."""

    @property
    def directory(self) -> Path:
        """Its folder, which follows from its identity."""
        seeds = self.identity["start_seed"], self.identity["n_episodes"]
        return self.run.evaluation(self.step, *seeds, digest(self.identity))

    def load(self, n_videos: int = 0) -> Evaluation | None:
        """Return the stored evaluation; None if there is none, or not as many videos.

        Raises:
            UserError: it is damaged.
        """
        if self.overwrite or not self.directory.is_dir():
            return None
        videos = video_requests(self.directory, min(n_videos, self.identity["n_episodes"]), 1)
        if not all(request.video.exists() for request in videos):
            return None
        try:
            seconds = read_json(self.directory / "metrics.json", _Metrics, "overwrite=true repeats it").eval_s
            episodes = read_episodes(self.directory)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise UserError(f"{self.directory} is damaged ({error}): overwrite=true repeats the evaluation") from error
        return Evaluation(episodes, seconds, [each.video for each in videos], videos[0].film_strip if videos else None)

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        """Write episodes.csv, episodes.npz and metrics.json into `folder`."""
        episodes = evaluation.episodes
        write_episodes(episodes, folder)
        # With the first seed and the number of episodes the evaluation can be repeated.
        content = {
            **evaluation.metrics,
            "start_seed": episodes[0].seed,
            "eval_s": evaluation.seconds,
            "avg_coverage": float(np.mean([episode.coverage for episode in episodes])),
            "avg_steps": float(np.mean([episode.steps for episode in episodes])),
            "step": self.step,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.info,
            "identity": self.identity,
            "commit": git_commit(),
            "versions": package_versions(),
            "machine": machine(),
        }
        (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")

    def append(self) -> None:
        """Append a line to evaluations.jsonl, unless the same one is there."""
        content = read_json(self.directory / "metrics.json", dict[str, Any], "overwrite=true repeats it")
        keys = ("date", "origin", "step", "start_seed", "n_episodes", "pc_success", "avg_max_reward", "options")
        line = {"identity": digest(self.identity), "folder": self.directory.name}
        text = json.dumps(line | {key: content[key] for key in keys if key in content}) + "\n"
        path = self.run.evaluations
        # A process may have been killed after the folder was renamed.
        if not path.exists() or text not in read_text(path, errors="replace"):
            with path.open("a") as file:
                file.write(text)


def write_episodes(episodes: list[EpisodeResult], folder: Path) -> None:
    """Write episodes.csv, with a seed in each row, and episodes.npz with start poses and the coverage by step."""
    with (folder / "episodes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(episode) for episode in episodes)
    lengths = np.array([episode.steps for episode in episodes])
    coverage = np.full((len(episodes), lengths.max()), np.nan)
    for row, episode in zip(coverage, episodes, strict=True):
        row[: episode.steps] = episode.coverage_by_step
    np.savez_compressed(
        folder / "episodes.npz",
        seeds=np.array([episode.seed for episode in episodes]),
        starts=np.array([episode.start for episode in episodes]),
        coverage=coverage,
        lengths=lengths,
    )


def read_episodes(folder: Path) -> list[EpisodeResult]:
    """Return the episodes that `write_episodes` wrote, the same to the bit."""
    for name in ("episodes.csv", "episodes.npz"):
        check_is_file(folder / name)
    with (folder / "episodes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(folder / "episodes.npz") as arrays:
        starts, coverage = arrays["starts"].tolist(), arrays["coverage"].tolist()
    return [
        EpisodeResult(
            **{key: READERS[key](value) for key, value in row.items()},
            start=tuple(start),
            coverage_by_step=tuple(covered[: int(row["steps"])]),
        )
        for row, start, covered in zip(rows, starts, coverage, strict=True)
    ]
