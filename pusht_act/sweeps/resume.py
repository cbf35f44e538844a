"""Resume a sweep: the same overrides, job numbers and folders again.

    pusht-act -m sweep.resume=DIR     jobs that are done are left alone, those that were interrupted resume from their
                                      last checkpoint, those that failed are tried again

The same command as before, with the same hydra.sweep.dir, does the same.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pusht_act.config.overrides import override, read_value, unused_overrides
from pusht_act.runs.commands import follow_up_sweep
from pusht_act.runtime.errors import UserError
from pusht_act.sweeps.hydra_internals import split_arguments
from pusht_act.sweeps.recorded import check_recorded
from pusht_act.sweeps.state import (
    IDENTITY,
    LAUNCH_KEYS,
    describe_difference,
    read_identity,
    recorded_overrides,
    result_overrides,
)

log = logging.getLogger(__name__)


def expand_resume_args(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command with `sweep.resume` replaced by the arguments that the sweep was started with.

    Args:
        argv: The arguments as they were typed.

    Raises:
        FileNotFoundError: there is no such sweep.
        UserError: the command asks for another sweep than the one in its folder.
    """
    # Before Hydra: it composes the first job as soon as it runs.
    given = {argument.partition("=")[0]: argument for argument in argv}
    # Without -m Hydra would ignore options of a sweep, with it run a sweep of status tables.
    multirun = not {"-m", "--multirun"}.isdisjoint(argv)
    if given.get("cluster.dry_run", "").lower() == "cluster.dry_run=true" and not multirun:
        raise UserError("cluster.dry_run=true shows the script of a sweep: give -m too")
    if multirun and given.get("mode") == "mode=status":
        raise UserError("mode=status looks at one sweep or run and starts none: leave -m out")
    if (named := given.get("sweep.resume", "sweep.resume=null")) != "sweep.resume=null":
        if not multirun:
            raise UserError(f"{named} resumes a sweep: give -m too")
        return _resume_args(argv, named)
    if multirun and (named := given.get("hydra.sweep.dir", "")):
        _check_same_sweep(argv, read_value(named))
    return list(argv)


def _resume_args(argv: Sequence[str], named: str) -> list[str]:
    """Return the arguments that start the sweep again which `named` names, where and as often as `argv` says."""
    folder, (flags, overrides) = read_value(named), split_arguments(argv)
    identity = read_identity(Path(folder))
    if identity is None:
        raise FileNotFoundError(f"{named} holds no sweep (no {IDENTITY}): give a folder such as multirun/DATE/TIME")
    # A folder of configuration files, of which anything may be made, is never taken from a file.
    if (was := identity.flags) and not flags:
        raise UserError(
            f"{named}: the sweep was started with {' '.join(was)}: give `{follow_up_sweep(Path(folder), was)}`"
        )
    recorded = identity.overrides
    rest = [each for each in recorded_overrides(overrides) if each != named]
    if other := [each for each in result_overrides(rest) if each not in recorded]:
        raise UserError(
            f"{' '.join(other)}: the sweep in {folder} is resumed as it was started; leave it out, or start another one"
        )

    check_recorded(recorded, argv, folder)
    # Another launcher, or more tries, changes nothing about the results.
    launch = [each for each in rest if each.startswith(LAUNCH_KEYS)]
    replaced = {each.partition("=")[0] for each in launch}
    kept = [each for each in recorded if each.partition("=")[0] not in replaced]
    unused = unused_overrides(kept)
    if unused:
        log.warning("left out, as they never had a use in this sweep's mode: %s", " ".join(unused))
    return ["-m", *flags, *(o for o in kept if o not in unused), *launch, override("hydra.sweep.dir", folder)]


def _check_same_sweep(argv: Sequence[str], folder: str) -> None:
    """Refuse to start a sweep in the folder of another one; in a new folder, or in its own, it may."""
    identity = read_identity(Path(folder))
    if identity is None:
        return
    # In the same order, too, since that numbers the jobs.
    was, now = result_overrides(identity.overrides), result_overrides(recorded_overrides(split_arguments(argv)[1]))
    if now != was:
        raise UserError(
            f"hydra.sweep.dir={folder} holds another sweep ({describe_difference(was, now)}): give the same "
            "overrides to resume it, or another hydra.sweep.dir="
        )
