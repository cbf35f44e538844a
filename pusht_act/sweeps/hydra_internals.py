"""Everything that sweeps need of Hydra's internals, which are no public interface.

Written for Hydra 1.3: tests/sweeps/test_internals.py fails, naming that version, if they have changed.
"""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

HYDRA_VERSION = "1.3"


def is_basic_sweeper(target: str) -> bool:
    """Return whether a sweeper's `_target_` is Hydra's own, which runs a grid."""
    return target.endswith(f".{BasicSweeper.__name__}")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command's flags without -m, such as --config-dir DIR, and its overrides."""
    overrides: list[str] = get_args_parser().parse_intermixed_args(list(arguments)).overrides
    left = list(overrides)
    # A flag's value looks like an override; what argparse counts as one comes in the same order.
    flags = [each for each in reversed(arguments) if not (left and left[-1] == each and left.pop())][::-1]
    return [flag for flag in flags if flag not in ("-m", "--multirun")], overrides


def expand_grid(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a grid, in the order in which Hydra numbers them.

    Empty if an override is malformed: the sweeper raises the error itself, with a better message.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        # Split into batches of `max_batch_size` jobs; None: a single batch.
        batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, None)
    except HydraException:
        # Raised here, in a callback, it would be a warning only.
        return []
    return batches[0]
