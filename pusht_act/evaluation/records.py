"""What an evaluation is, and what of it is written to disk.

<directory>/episodes.csv      one row an episode
            metrics.json      success rate with its interval, mean rewards, first seed, seconds
            episode-N.mp4     the first `eval.n_videos` episodes
            film_strip.png    the first episode, if there is a video of it
"""

import csv
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pusht_act.envs.episode import EpisodeResult, VideoRequest
from pusht_act.evaluation.stats import wilson_interval


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


def write_records(evaluation: Evaluation, directory: Path) -> None:
    """Write episodes.csv and metrics.json into `directory`."""
    episodes = evaluation.episodes
    with (directory / "episodes.csv").open("w", newline="") as file:
        # With a seed in each row, so that two evaluations can be compared episode by episode.
        writer = csv.DictWriter(file, fieldnames=list(asdict(episodes[0])))
        writer.writeheader()
        writer.writerows(asdict(episode) for episode in episodes)
    # With the first seed and the number of episodes the evaluation can be repeated.
    record = {**evaluation.metrics, "start_seed": episodes[0].seed, "eval_s": evaluation.seconds}
    (directory / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
