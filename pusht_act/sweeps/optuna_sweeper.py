"""A sweep whose values Optuna chooses, and whose bad trials it ends early: `hydra/sweeper=optuna`.

    batch by batch (n_jobs): the values of its trials -> the study -> the launcher -> jobs/N.json -> the study

<hydra.sweep.dir>/optuna.db is the study, which a job is told of its evaluations too (pruning.py). Trial N is job N, in
folder N. jobs/N.json says what a job came to (sweep.py); the study is told when its batch has ended and it is done or
pruned, so that one that failed or was interrupted stays open there and can be gone on with. A sweep that was killed
comes to the same: a trial's values are in the study all at once or not at all, and follow from the sampler's seed, its
number and the trials told before its batch.

Imports neither torch nor lerobot, and Optuna only where a study is opened.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from pusht_act.config.schema import OptunaConfig
from pusht_act.runtime.errors import UserError
from pusht_act.runtime.lock import locked
from pusht_act.sweeps.pruning import STORAGE, STUDY, reason
from pusht_act.sweeps.state import FINISHED, Job, load_job

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


log = logging.getLogger(__name__)


def sweep(sweeper: Sweeper, arguments: list[str]) -> None:
    """All trials of the overrides `arguments` and hydra.sweeper.params that are not finished.

    Raises:
        UserError: an option is impossible, there is nothing to choose or a trial was not evaluated.
        FileExistsError: another process is at this sweep.
    """
    config: DictConfig = sweeper.config
    options: OptunaConfig = OmegaConf.to_object(config.hydra.sweeper)  # type: ignore[assignment]
    directory = Path(config.hydra.sweep.dir)
    _check(options)
    given = [*(f"{key}={value}" for key, value in options.params.items()), *arguments]
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    space, fixed = search_space(parser.parse_overrides(given))
    with locked(directory, "hydra.sweep.dir"):
        OmegaConf.save(config, directory / "multirun.yaml")
        study = _study(directory, options)
        # A sweep that was given more trials once may be gone on with by a command that does not say so.
        total = max(options.n_trials, len(study.trials))
        for first in range(0, total, options.n_jobs):
            numbers = range(first, min(first + options.n_jobs, total))
            overrides = [[*fixed, *_suggest(study, number, space, options)] for number in numbers]
            undone = [number for number in numbers if _wait_until_idle(directory, number).state not in FINISHED]
            if undone:
                part = overrides[undone[0] - first : undone[-1] - first + 1]  # finished ones among them are left alone
                sweeper.validate_batch_is_legal(part)
                for result in sweeper.launcher.launch(part, initial_job_idx=undone[0]):
                    _ = result.return_value  # raises what a job raised
            for number in numbers:
                _report(study, load_job(directory, number, []))


def search_space(overrides: Sequence[Override]) -> tuple[dict[str, "BaseDistribution"], list[str]]:
    """What there is to choose, by key, and the overrides of all trials; for a key given twice the later one counts.

    Raises:
        UserError: there is nothing to choose, or an override is impossible.
    """
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
    """Of Optuna's, what an override allows; unlike the published plugin a range ends before its end, as Hydra's do."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    tags: set[str] = getattr(value, "tags", set())
    if unread := tags - ({"log"} if override.is_interval_sweep() else set()):
        raise UserError(f"{override.input_line}: the tag {', '.join(unread)} means nothing, give tag(log, interval())")
    try:
        if override.is_interval_sweep():
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            return (IntDistribution if whole else FloatDistribution)(value.start, value.end, log="log" in tags)
        if override.is_range_sweep():
            values = [round(each, 12) for each in value.range()]  # 0.1 + 0.2 is 0.3
            if not values:
                raise UserError("there is nothing in it")
            whole = isinstance(values[0], int)
            kind = IntDistribution if whole else FloatDistribution
            return kind(min(values), max(values), step=abs(value.step))
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error


def _check(options: OptunaConfig) -> None:
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
    """The sweep's, which is made if need be.

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
    except Exception as error:  # SQLAlchemy's and Optuna's, of many kinds
        raise UserError(f"{directory / STORAGE} cannot be read ({reason(error)}): begin another sweep") from error


def _suggest(study: "Study", number: int, space: dict[str, "BaseDistribution"], options: OptunaConfig) -> list[str]:
    """The overrides that trial `number` is made of: as they were chosen before, or chosen now and kept."""
    import numpy as np
    from optuna import create_study
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState, create_trial

    trials = study.get_trials(deepcopy=False)
    if number < len(trials):
        params = trials[number].params
    else:
        assert number == len(trials)
        seed = int(np.random.SeedSequence([options.sampler.seed, number]).generate_state(1)[0])
        sampler = TPESampler(seed=seed, n_startup_trials=options.sampler.n_startup_trials)
        # Asked beside the study: there a trial killed while it is asked for would stay half chosen.
        scratch = create_study(sampler=sampler, direction=options.direction.value)
        scratch.add_trials(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        params = scratch.ask(space).params
        study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=space))
    return [f"{key}={value}" for key, value in params.items()]


def _wait_until_idle(directory: Path, number: int) -> Job:
    """What is known of a job once no process of a launcher that was killed is at it any more."""
    found = load_job(directory, number, [])
    if found.state == "running":
        log.warning(
            "job %d is under way: waiting for process %s on %s", number, *map(found.holder.get, ("pid", "host"))
        )
    while found.state == "running":
        time.sleep(1)
        found = load_job(directory, number, [])
    return found


def _report(study: "Study", found: Job) -> None:
    """Tell the study what a job has come to, once."""
    from optuna.trial import TrialState

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
