"""What demonstrations are like: how many starts were solved, how long, how far, how smooth; people's beside them."""

from collections.abc import Sequence

import numpy as np

from pusht_act.demos.expert import Demonstration
from pusht_act.runtime.markdown import format_table

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
"""`dataset_stats` of lerobot/pusht; its coverage is that of the last frame recorded, one action before the end."""

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


def dataset_stats(tried: Sequence[Demonstration]) -> dict[str, float]:
    """Figures of the successes among `tried`: lengths in steps, coverage in [0, 1], differences of labels in px.

    Differences are means over all steps of all episodes; `pc_success` is the share of `tried` that succeeded.
    """
    solved = [made for made in tried if made.success]
    lengths = [len(made.action) for made in solved]
    return {
        "n_episodes": len(solved),
        "n_tried": len(tried),
        "pc_success": 100.0 * len(solved) / len(tried),
        "n_frames": sum(lengths),
        "length_mean": float(np.mean(lengths)),
        "length_median": float(np.median(lengths)),
        "length_max": float(np.max(lengths)),
        "coverage_mean": float(np.mean([made.coverage for made in solved])),
        "coverage_min": float(np.min([made.coverage for made in solved])),
        "step_px_mean": _mean_norm([np.diff(made.action, axis=0) for made in solved]),
        "second_difference_px_mean": _mean_norm([np.diff(made.action, 2, axis=0) for made in solved]),
    }


def format_stats(figures: dict[str, float]) -> list[str]:
    """A Markdown table of `figures`, people's beside them, line by line."""
    header = ("", "these", "people")
    rows = [
        (name, form % figures[key], form % HUMAN[key] if key in HUMAN else "") for key, (name, form) in ROWS.items()
    ]
    return format_table(header, rows, text=header)


def _mean_norm(differences: list[np.ndarray]) -> float:
    """Mean length of all rows; 0 when episodes are too short to have any."""
    rows = np.concatenate(differences)
    return float(np.linalg.norm(rows, axis=1).mean()) if len(rows) else 0.0
