"""A sweep whose values Optuna chooses and whose bad trials it prunes: `hydra/sweeper=optuna`.

    for each batch of n_jobs trials: their values -> the study -> the launcher -> jobs/N.json -> the study

The study is <hydra.sweep.dir>/optuna.db; jobs report their evaluations to it, too (pruning.py). Trial N is job N, in
folder N, and jobs/N.json has its result (run_job.py). A trial is finished in the study when its batch has ended and the
job is done or pruned. One that failed or was interrupted stays open there and can be resumed.

A sweep that is killed and resumed has the same results as one that is not. The values of a trial are in the study
completely or not at all, and depend only on the sampler's seed, the number of the trial, and the trials that were
finished before its batch.

Imports neither torch nor lerobot, and Optuna only where a study is opened.
"""

import logging
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from pusht_act.config.optuna import OptunaConfig
from pusht_act.runtime.errors import DiskError, UserError
from pusht_act.runtime.lock import locked
from pusht_act.sweeps.pruning import STORAGE, STUDY, first_line, root_cause
from pusht_act.sweeps.state import FINISHED, Job, load_job

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


log = logging.getLogger(__name__)

MOST_VALUES = 1_000_000
"""How many values a range may have."""


def sweep(sweeper: Sweeper, arguments: list[str]) -> None:
    """Run all trials that are not finished.

    Args:
        sweeper: Hydra's, which has the configuration and the launcher.
        arguments: The overrides of the command line; hydra.sweeper.params come before them.

    Raises:
        UserError: an option is invalid, there is nothing to choose, or a trial was not evaluated.
        FileExistsError: another process is running this sweep.
    """
    config: DictConfig = sweeper.config
    options: OptunaConfig = OmegaConf.to_object(config.hydra.sweeper)  # type: ignore[assignment]
    directory = Path(config.hydra.sweep.dir)
    _check(options)
    given = [*(f"{key}={value}" for key, value in options.params.items()), *arguments]
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    space, fixed = search_space(parser.parse_overrides(given))
    with locked(directory, "hydra.sweep.dir"), _disk_errors_named(directory):
        OmegaConf.save(config, directory / "multirun.yaml")
        study = _study(directory, options)
        # A sweep that was given more trials on a former resume keeps them.
        total = max(options.n_trials, len(study.trials))
        for first in range(0, total, options.n_jobs):
            numbers = range(first, min(first + options.n_jobs, total))
            # The whole batch is chosen before any of it runs, so that it does not matter which job ends first.
            overrides = [[*fixed, *_suggest(study, number, space, options)] for number in numbers]
            undone = [number for number in numbers if _wait_until_idle(directory, number).state not in FINISHED]
            if undone:
                # The launcher numbers jobs without gaps. Finished ones in between are left alone (run_job.py).
                part = overrides[undone[0] - first : undone[-1] - first + 1]
                sweeper.validate_batch_is_legal(part)
                for result in sweeper.launcher.launch(part, initial_job_idx=undone[0]):
                    # Raises what the job raised.
                    _ = result.return_value
            for number in numbers:
                _report(study, load_job(directory, number, []))


@contextmanager
def _disk_errors_named(directory: Path) -> Iterator[None]:
    """Raise as one line that the study cannot be written: SQLAlchemy and Optuna have errors of their own for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(root_cause(error), sqlite3.Error):
            raise
        path, reason = directory / STORAGE, first_line(root_cause(error))
        raise DiskError(f"{path} cannot be written ({reason}): make room, then resume the sweep") from error


def search_space(overrides: Sequence[Override]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
    """Return the distribution of each key that Optuna chooses, and the overrides that all trials share.

    For a key that is given twice, the later override counts.

    Raises:
        UserError: there is nothing to choose, or an override is invalid.
    """
    # Each key is in one of the two: a later override takes it out of where the earlier one put it.
    space: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        space.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            space[key] = _distribution(override)
        else:
            fixed[key] = str(override.input_line)
    if not space:
        raise UserError(
            "hydra/sweeper=optuna has nothing to choose: give a key several values, such as "
            "'policy.optimizer_lr=tag(log, interval(1e-5,1e-2))' or policy.chunk_size=8,16"
        )
    return space, list(fixed.values())


def _distribution(override: Override) -> "BaseDistribution":
    """Return the distribution that an override describes.

    Unlike in the published Optuna plugin, the end of a range is excluded, as elsewhere in Hydra.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    tags: set[str] = getattr(value, "tags", set())
    if unread := tags - ({"log"} if override.is_interval_sweep() else set()):
        raise UserError(f"{override.input_line}: the tag {', '.join(unread)} means nothing, give tag(log, interval())")
    try:
        _check_ends(override)
        # interval() is continuous unless both ends are whole numbers.
        if override.is_interval_sweep():
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            return (IntDistribution if whole else FloatDistribution)(value.start, value.end, log="log" in tags)
        if override.is_range_sweep():
            # Rounded, since 0.1 + 0.2 should be 0.3.
            if not (values := [round(number, 12) for number in value.range()]):
                raise UserError("the range is empty")
            whole = isinstance(values[0], int)
            kind = IntDistribution if whole else FloatDistribution
            return kind(min(values), max(values), step=abs(value.step))
        # choice() and a plain list: no order between the values.
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error


def _check_ends(override: Override) -> None:
    """Refuse an interval or a range without ends, or with more values than anybody can mean."""
    if not (override.is_interval_sweep() or override.is_range_sweep()):
        return
    value = override.value()
    ends = (value.start, value.stop, value.step) if override.is_range_sweep() else (value.start, value.end)
    if not all(end is not None and math.isfinite(end) for end in ends):
        raise UserError("give finite numbers")
    if override.is_range_sweep() and (value.step == 0 or abs(value.stop - value.start) / abs(value.step) > MOST_VALUES):
        raise UserError(f"give a step that leaves at most {MOST_VALUES:,} values")


def _check(options: OptunaConfig) -> None:
    """Refuse options that Optuna would refuse later, or take for something else."""
    least = {
        "n_trials": (options.n_trials, 1),
        "n_jobs": (options.n_jobs, 1),
        "sampler.seed": (options.sampler.seed, 0),
        "sampler.n_startup_trials": (options.sampler.n_startup_trials, 1),
        "pruner.n_startup_trials": (options.pruner.n_startup_trials, 0),
        "pruner.n_warmup_steps": (options.pruner.n_warmup_steps, 0),
    }
    for key, (value, smallest) in least.items():
        if value < smallest:
            raise UserError(f"hydra.sweeper.{key}={value} is too small: give {smallest} or more")


def _study(directory: Path, options: OptunaConfig) -> "Study":
    """Return the study of a sweep, creating it if need be.

    Raises:
        UserError: it cannot be read.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=f"sqlite:///{directory / STORAGE}",
            study_name=STUDY,
            direction=options.direction.value,
            load_if_exists=True,
        )
    except Exception as error:
        # SQLAlchemy and Optuna raise many kinds, without a common base.
        raise UserError(
            f"{directory / STORAGE} cannot be read ({first_line(root_cause(error))}): start another sweep"
        ) from error


def _suggest(study: "Study", number: int, space: dict[str, "BaseDistribution"], options: OptunaConfig) -> list[str]:
    """Return the chosen overrides of trial `number`: those in the study, or new ones that are added to it."""
    import numpy as np
    from optuna import create_study
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState, create_trial

    trials = study.get_trials(deepcopy=False)
    if number < len(trials):
        params = trials[number].params
        # The study's file may come from anybody, and its parameters become overrides.
        if trials[number].distributions != space or not params.keys() <= space.keys():
            raise UserError(
                f"{STORAGE} of the sweep has other values to choose in trial {number} than its overrides: start "
                "another sweep"
            )
    else:
        assert number == len(trials)
        # A sampler of its own for each trial, so that a resumed sweep need not replay the former ones' random numbers.
        seed = int(np.random.SeedSequence([options.sampler.seed, number]).generate_state(1)[0])
        sampler = TPESampler(seed=seed, n_startup_trials=options.sampler.n_startup_trials)
        # Asked of a copy in memory: a process killed while it asks would leave a trial with some values in the study.
        scratch = create_study(sampler=sampler, direction=options.direction.value)
        scratch.add_trials(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        params = scratch.ask(space).params
        study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=space))
    return [f"{key}={value}" for key, value in params.items()]


def _wait_until_idle(directory: Path, number: int) -> Job:
    """Return a job, after waiting for a process that a former launcher, since killed, has left running."""
    found = load_job(directory, number, [])
    if found.state == "running":
        log.warning("job %d is running: waiting for process %s on %s", number, *map(found.holder.get, ("pid", "host")))
    while found.state == "running":
        time.sleep(1)
        found = load_job(directory, number, [])
    return found


def _report(study: "Study", found: Job) -> None:
    """Finish the trial of a job in the study, unless it is finished or the job is not."""
    from optuna.trial import TrialState

    # Optuna refuses to change a trial that is finished.
    if found.state not in FINISHED or study.get_trials(deepcopy=False)[found.number].state.is_finished():
        return
    if found.state == "pruned":
        study.tell(found.number, state=TrialState.PRUNED)
    elif found.objective is None:
        raise UserError(
            f"job {found.number} was not evaluated, so it has no {found.metric} to compare trials by: give eval_freq="
        )
    else:
        study.tell(found.number, found.objective)
