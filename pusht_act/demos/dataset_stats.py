"""Statistics of demonstrations: success rate, length, coverage, smoothness, next to those of the human data."""

from collections.abc import Sequence

import numpy as np

from pusht_act.demos.expert import Demonstration
from pusht_act.runtime.markdown import format_table

# Measured once, so that the comparison needs no download; a test checks it against the data set.
HUMAN: dict[str, float] = {
    "n_episodes": 206,
    "length_mean": 124.5,
    "length_median": 122.0,
    "length_max": 246.0,
    "coverage_mean": 0.847,
    "coverage_min": 0.772,
    "step_px_mean": 10.2,
    "second_difference_px_mean": 5.4,
}
"""`dataset_stats` of lerobot/pusht; its coverage is that of the last recorded frame, one action before the end."""

ROWS = {
    "pc_success": ("starts solved", "%.1f %%"),
    "length_mean": ("length, mean", "%.1f steps"),
    "length_median": ("length, median", "%.0f steps"),
    "length_max": ("length, longest", "%.0f steps"),
    "coverage_mean": ("final coverage, mean", "%.3f"),
    "coverage_min": ("final coverage, least", "%.3f"),
    "step_px_mean": ("change of the action a step, mean", "%.1f px"),
    "second_difference_px_mean": ("change of that change, mean", "%.1f px"),
}


def dataset_stats(attempts: Sequence[Demonstration]) -> dict[str, float]:
    """Compute the statistics of demonstrations.

    Args:
        attempts: All of them, failures included; only `n_tried` and `pc_success` count the failures.

    Returns:
        Lengths in steps, coverage in [0, 1], and mean differences of the labels between steps in px.
    """
    solved = [demo for demo in attempts if demo.success]
    # A failure is cut at its best step, so its length says nothing.
    lengths = [len(demo.action) for demo in solved]
    return {
        "n_episodes": len(solved),
        "n_tried": len(attempts),
        "pc_success": 100.0 * len(solved) / len(attempts),
        "n_frames": sum(lengths),
        "length_mean": float(np.mean(lengths)),
        "length_median": float(np.median(lengths)),
        "length_max": float(np.max(lengths)),
        "coverage_mean": float(np.mean([demo.coverage for demo in solved])),
        "coverage_min": float(np.min([demo.coverage for demo in solved])),
        "step_px_mean": _mean_norm([np.diff(demo.action, axis=0) for demo in solved]),
        "second_difference_px_mean": _mean_norm([np.diff(demo.action, 2, axis=0) for demo in solved]),
    }


def format_stats(figures: dict[str, float]) -> list[str]:
    """Return the lines of a Markdown table of `figures` next to those of the human data."""
    header = ("", "these", "people")
    rows = [
        (name, form % figures[key], form % HUMAN[key] if key in HUMAN else "") for key, (name, form) in ROWS.items()
    ]
    return format_table(header, rows, text=header)


def _mean_norm(differences: list[np.ndarray]) -> float:
    """Return the mean length of all rows; 0 if all episodes are too short to have any."""
    # Over all steps of all episodes, so that long episodes count for more.
    rows = np.concatenate(differences)
    return float(np.linalg.norm(rows, axis=1).mean()) if len(rows) else 0.0
