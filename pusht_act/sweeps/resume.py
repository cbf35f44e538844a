"""Resume a sweep: the same overrides, job numbers and folders again.

    pusht-act -m sweep.resume=DIR     jobs that are done are left alone, those that were interrupted resume from their
                                      last checkpoint, those that failed are tried again

The same command as before, with the same hydra.sweep.dir, does the same.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pusht_act.config.overrides import unused_overrides
from pusht_act.runtime.errors import UserError
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
    given = dict(argument.partition("=")[::2] for argument in argv)
    # Without -m Hydra would ignore options of a sweep, with it run a sweep of status tables.
    multirun = not {"-m", "--multirun"}.isdisjoint(argv)
    if given.get("cluster.dry_run", "false").lower() == "true" and not multirun:
        raise UserError("cluster.dry_run=true shows the script of a sweep: give -m too")
    if multirun and given.get("mode") == "status":
        raise UserError("mode=status looks at one sweep or run and starts none: leave -m out")
    if (named := given.get("sweep.resume", "null")) != "null":
        if not multirun:
            raise UserError(f"sweep.resume={named} resumes a sweep: give -m too")
        return _resume_args(argv, named)
    if multirun and (folder := given.get("hydra.sweep.dir")):
        _check_same_sweep(argv, folder)
    return list(argv)


def _resume_args(argv: Sequence[str], folder: str) -> list[str]:
    """Return the arguments that start the sweep in `folder` again, where and as often as `argv` says."""
    identity = read_identity(Path(folder))
    if identity is None:
        raise FileNotFoundError(
            f"sweep.resume={folder} holds no sweep (no {IDENTITY}): give a folder such as multirun/DATE/TIME"
        )
    recorded = identity.overrides
    rest = [override for override in recorded_overrides(argv) if override != f"sweep.resume={folder}"]
    if other := [override for override in result_overrides(rest) if override not in recorded]:
        raise UserError(
            f"{' '.join(other)}: the sweep in {folder} is resumed as it was started; leave it out, or start another one"
        )

    check_recorded(recorded, argv, folder)
    # Another launcher, or more tries, changes nothing about the results.
    launch = [override for override in rest if override.startswith(LAUNCH_KEYS)]
    replaced = {override.partition("=")[0] for override in launch}
    kept = [override for override in recorded if override.partition("=")[0] not in replaced]
    unused = unused_overrides(kept)
    if unused:
        log.warning("left out, as they never had a use in this sweep's mode: %s", " ".join(unused))
    return ["-m", *(o for o in kept if o not in unused), *launch, f"hydra.sweep.dir={folder}"]


def _check_same_sweep(argv: Sequence[str], folder: str) -> None:
    """Refuse to start a sweep in the folder of another one; in a new folder, or in its own, it may."""
    identity = read_identity(Path(folder))
    if identity is None:
        return
    # In the same order, too, since that numbers the jobs.
    was, now = result_overrides(identity.overrides), result_overrides(recorded_overrides(argv))
    if now != was:
        raise UserError(
            f"hydra.sweep.dir={folder} holds another sweep ({describe_difference(was, now)}): give the same "
            "overrides to resume it, or another hydra.sweep.dir="
        )
