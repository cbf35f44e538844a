"""What a run comes to, and whom it tells of its evaluations."""

from collections.abc import Callable
from dataclasses import dataclass

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.evaluation.records import Evaluation

Report = Callable[[int, dict[str, float]], bool]
"""Takes a step and the metrics of its evaluation; returns whether to prune the run."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    step: int
    metrics: dict[str, float]
    """Means of the last steps."""
    checkpoint: Checkpoint | None
    evaluation: Evaluation | None
    """The last one."""
    pruned: bool = False
    """Whether the pruner ended training before its last step."""
