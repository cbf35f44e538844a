"""The figures that generated demonstrations are compared with."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pusht_act.demos.dataset_stats import HUMAN, dataset_stats
from pusht_act.demos.expert import Demonstration


def test_the_figures_of_the_human_data_are_as_quoted(human: Path) -> None:
    table = pq.read_table(human / "pusht_keypoints" / "data")
    action, reward = np.stack(table["action"].to_pylist()), table["next.reward"].to_numpy()
    starts = np.flatnonzero(table["frame_index"].to_numpy() == 0)
    last = 0.95 * reward[np.append(starts[1:], len(action)) - 1]
    made = [
        Demonstration(i, labels, labels, float(covered), True)
        for i, (labels, covered) in enumerate(zip(np.split(action, starts[1:]), last, strict=True))
    ]
    figures = dataset_stats(made)
    assert {key: figures[key] for key in HUMAN} == pytest.approx(HUMAN, rel=6e-3)
