"""Everything that sweeps need of Hydra's internals, which are no public interface.

Written for Hydra 1.3: tests/sweeps/test_internals.py fails, naming that version, if they have changed.
"""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

HYDRA_VERSION = "1.3"


def is_basic_sweeper(target: str) -> bool:
    """Return whether a sweeper's `_target_` is Hydra's own, which runs a grid."""
    return target.endswith(f".{BasicSweeper.__name__}")


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
