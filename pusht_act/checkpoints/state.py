"""What a checkpoint tells beside LeRobot's own files: the records in it, and their types.

    pretrained_model/pusht_act.json   ModelRecord: what the run was composed from
    training_state/pusht_act.json     TrainerState: what LeRobot does not save of the loop
    training_state/training_step.json TrainingStep (LeRobot's)

Imports neither torch nor lerobot.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from annotated_types import Ge, Lt, Predicate

from pusht_act.runtime.stored import read_json

Natural = Annotated[int, Ge(0), Lt(2**53)]
"""A count or a step."""


@dataclass(frozen=True)
class ModelRecord:
    """What a model was trained from. Its fields are the keys of pretrained_model/pusht_act.json."""

    config: dict[str, Any]
    choices: dict[str, Any]
    loss: str | None = None
    """The name of a loss in place of the default."""
    transforms: list[str] | None = None


@dataclass(frozen=True)
class TrainingStep:
    """LeRobot's training_state/training_step.json."""

    step: Natural
    batch_size: Natural | None = None
    """Of each process; None in a checkpoint of an older LeRobot."""
    num_processes: Natural | None = None


class Best(TypedDict):
    """An evaluation and its score."""

    step: Natural
    score: list[float]
    """[pc_success, avg_max_reward]"""


def _is_position(content: dict[str, int]) -> bool:
    return {"epoch", "start_index"} <= content.keys()


@dataclass
class TrainerState:
    """The state of the training loop at a step. Its fields are the keys of training_state/pusht_act.json."""

    step: Natural = 0
    sampler: Annotated[dict[str, Natural], Predicate(_is_position)] | None = None
    """EpisodeSampler.state_dict(); None in a checkpoint of stock LeRobot, which does not record it."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums of the metrics since they were last logged, and their number."""
    skipped: Natural = 0
    """How many steps since the last roll-back were skipped because their loss or gradient was not finite."""
    rollbacks: Natural = 0
    """How often training diverged and was rolled back to a checkpoint. Each time changes the order of the data."""
    best: Best | None = None
    """The best evaluation so far."""
    pending: list[Natural] = field(default_factory=list)
    """The steps whose evaluations are due and not done, in order. The first one may be running."""
    spare: list[Natural] = field(default_factory=list)
    """Steps whose checkpoints are temporary: written for their evaluation alone, or because a signal stopped the run.

    A later save removes them, except the best one and those of `pending`."""
    wandb_run_id: str | None = None
    dataset: str | None = None
    """Hash of the data set that it was trained on; None in a checkpoint that does not record it."""
    elapsed_s: float = 0.0
    """Seconds of training so far, in all processes of the run, but without the time in which none ran."""


def read_trainer_state(path: Path) -> TrainerState:
    """Return the state of the loop in a file.

    Raises:
        FileNotFoundError: there is none, as in a checkpoint of stock LeRobot.
        UserError: it is damaged.
    """
    return read_json(path, TrainerState, "resume from another checkpoint", _with_list_of_pending)


def _with_list_of_pending(content: Any) -> Any:
    """Return a stored state with `pending` as a list; in older checkpoints it is a single step or None."""
    pending = content.get("pending")
    return content | {"pending": [pending] if isinstance(pending, int) else [] if pending is None else pending}
