"""Long tables of cases, of which `pytest -m "not slow"` tries some."""

from collections.abc import Sequence
from typing import Any

import pytest


def some_not_slow[T](cases: Sequence[T], every: int) -> list[Any]:
    """Return `cases` as parameters of a test, all but each `every`th marked as slow. A row is a tuple of arguments."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] if i % every else [])
        for i, case in enumerate(cases)
    ]
