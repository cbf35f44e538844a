"""Pruning with `hydra/sweeper=optuna`: a job reports each evaluation to the study, and asks whether to stop early.

The job finds the study in the sweep's folder, so it may run in another process, on another node. A study that is busy
or missing does not stop a training. Imports neither torch nor lerobot, and Optuna not before the first evaluation.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pusht_act.config.optuna import Pruner, PrunerConfig

log = logging.getLogger(__name__)

STORAGE, STUDY = "optuna.db", "sweep"
"""The file of the study in the sweep's folder, and the name of the study in it."""
BUSY_S = 2.0
"""How many seconds a job waits while another process writes to the study."""


def reporter(node: Any) -> Callable[[int, dict[str, float]], bool] | None:
    """Return what a job reports its evaluations to; None if nothing prunes it.

    Args:
        node: The job's Hydra configuration.
    """
    kind = OmegaConf.select(node, "sweeper.pruner.kind")
    number = OmegaConf.select(node, "job.num", throw_on_missing=False)
    if kind in (None, Pruner.none) or number is None:
        return None
    return Reporter(
        Path(node.runtime.cwd) / node.sweep.dir, int(number), node.sweeper.metric.value, node.sweeper.pruner
    )


class Reporter:
    """A `training.trainer.Report`: reports the evaluations of one trial to its study."""

    def __init__(self, directory: Path, number: int, metric: str, options: PrunerConfig) -> None:
        self._path = directory / STORAGE
        self._number, self._metric, self._options = number, metric, options
        self._warned = False

    def __call__(self, step: int, metrics: dict[str, float]) -> bool:
        """Report the evaluation of `step`, and return whether to stop the training."""
        value = metrics[self._metric]
        try:
            ends = self._report_and_query(step, value)
        except Exception as error:
            # SQLAlchemy and Optuna raise many kinds, without a common base.
            if not self._warned:
                message = "%s cannot be used (%s): training continues, this trial may not be pruned"
                log.warning(message, self._path, first_line(root_cause(error)))
            self._warned = True
            return False
        if ends:
            log.info("step %d: pruned, %s %.4g is worse than the median of former trials", step, self._metric, value)
        return ends

    def _report_and_query(self, step: int, value: float) -> bool:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Opened for each evaluation: they are minutes apart, and the file may lie on another machine's disk. mode=rw
        # does not create a new file in place of one that is missing.
        storage = optuna.storages.RDBStorage(
            f"sqlite:///file:{self._path.resolve()}?mode=rw&uri=true",
            engine_kwargs={"connect_args": {"timeout": BUSY_S}},
            skip_compatibility_check=True,
            skip_table_creation=True,
        )
        try:
            study_id = storage.get_study_id_from_name(STUDY)
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, self._number)
            # A resumed job may report the same step again, which replaces the value.
            storage.set_trial_intermediate_value(trial_id, step, value)
            study = optuna.load_study(study_name=STUDY, storage=storage)
            pruner = optuna.pruners.MedianPruner(self._options.n_startup_trials, self._options.n_warmup_steps)
            return pruner.prune(study, storage.get_trial(trial_id))
        finally:
            storage.engine.dispose()


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost error: SQLite's own, without the layers around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0]
