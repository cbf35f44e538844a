"""Whether a trial of `hydra/sweeper=optuna` is worth going on with: its job tells the study each evaluation, and asks.

The job finds the study by the sweep's directory, so it may be another process than the sweep's, on another node. A
study that is busy or gone stops no training. Imports neither torch nor lerobot, and Optuna at the first evaluation.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pusht_act.config.schema import Pruner, PrunerConfig

log = logging.getLogger(__name__)

STORAGE, STUDY = "optuna.db", "sweep"
"""The file of a sweep's study, and the study's name there."""
BUSY_S = 2.0
"""Seconds that a job waits while another process writes to the study."""


def reporter(node: Any) -> Callable[[int, dict[str, float]], bool] | None:
    """What the job whose Hydra configuration is `node` tells its evaluations; None: nobody would prune it."""
    kind = OmegaConf.select(node, "sweeper.pruner.kind")
    number = OmegaConf.select(node, "job.num", throw_on_missing=False)
    if kind in (None, Pruner.none) or number is None:
        return None
    return Reporter(Path(node.sweep.dir), int(number), node.sweeper.metric.value, node.sweeper.pruner)


class Reporter:
    """A `training.async_evaluation.Report` to the study in `directory`, of trial `number`."""

    def __init__(self, directory: Path, number: int, metric: str, options: PrunerConfig) -> None:
        self._path = directory / STORAGE
        self._number, self._metric, self._options = number, metric, options
        self._warned = False

    def __call__(self, step: int, metrics: dict[str, float]) -> bool:  # noqa: D102
        value = metrics[self._metric]
        try:
            ends = self._told(step, value)
        except Exception as error:  # SQLAlchemy's and Optuna's, of many kinds
            if not self._warned:
                said = "%s cannot be used (%s): training goes on, this trial may not be pruned"
                log.warning(said, self._path, reason(error))
            self._warned = True
            return False
        if ends:
            log.info("step %d: %s %.4g is worth no more steps: pruned", step, self._metric, value)
        return ends

    def _told(self, step: int, value: float) -> bool:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Opened each time, as it may lie on another machine's disk and evaluations are far apart; mode=rw makes no new
        # file in place of one that is gone.
        storage = optuna.storages.RDBStorage(
            f"sqlite:///file:{self._path.resolve()}?mode=rw&uri=true",
            engine_kwargs={"connect_args": {"timeout": BUSY_S}},
            skip_compatibility_check=True,
            skip_table_creation=True,
        )
        try:
            study_id = storage.get_study_id_from_name(STUDY)
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, self._number)
            storage.set_trial_intermediate_value(trial_id, step, value)  # once more after a resume, which is fine
            study = optuna.load_study(study_name=STUDY, storage=storage)
            pruner = optuna.pruners.MedianPruner(self._options.n_startup_trials, self._options.n_warmup_steps)
            return pruner.prune(study, storage.get_trial(trial_id))
        finally:
            storage.engine.dispose()


def reason(error: BaseException) -> str:
    """SQLite's own words, which the errors of others are around."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0]
