"""What every process of a job but the first does in training (see distributed.py)."""

from contextlib import closing

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.checkpoint_io import rng_states
from pusht_act.config.lerobot import LeRobotConfig
from pusht_act.config.schema import Config
from pusht_act.runtime.distributed import Word, connect, raise_on_any_rank, told
from pusht_act.runtime.signals import defer_signals
from pusht_act.training.build import Setup, back_at, build_trainer, make_step


def set_up_together(config: Config, lerobot: LeRobotConfig, start: Checkpoint | None) -> Setup:
    """`build_trainer` in each process, the first one too, from the same weights.

    Raises:
        ValueError, OSError: as `build_trainer`, in any of them.
    """
    with raise_on_any_rank():
        setup = build_trainer(config, lerobot, start)
    with raise_on_any_rank():
        connect(str(lerobot.policy.device), setup.objects.policy.state_dict().values())
    return setup


def train_along(config: Config, lerobot: LeRobotConfig, setup: Setup) -> None:
    """This process's share of each step, as the first one says, until that says that it is over."""
    with defer_signals():
        while True:
            checkpoint, number = _until_a_roll_back(config, lerobot, setup)
            setup = back_at(config, lerobot, setup, checkpoint, number)


def _until_a_roll_back(config: Config, lerobot: LeRobotConfig, setup: Setup) -> tuple[Checkpoint, int]:
    """Where that goes to, and its number."""
    take_step = make_step(config, lerobot, setup)
    with closing(setup.data.iter_batches(setup.order, config.batch_size)) as inputs:
        while True:
            word, more = told()
            if word is Word.ROLL_BACK:
                checkpoint, number = more
                return checkpoint, number
            if word is Word.STEP:
                take_step(take_step.batch(next(inputs)))
            else:
                assert word is Word.RANDOM
                rng_states()
