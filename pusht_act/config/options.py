"""What is asked of an option beside its type: a range, choices, and the modes that use it.

steps: int = option(ge=1, modes=TRAINING)      declared beside the field (schema.py), checked in validation.py,
                                               listed in docs/configuration.md
"""

from collections.abc import Iterator
from dataclasses import MISSING as NO_FACTORY
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class Option:
    """The rules of one option."""

    kind: type | None = None
    """int or float for a bounded option of LeRobot's, str for a text; the schema's own fields have a type."""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] = ()
    nonempty: bool = False
    """Whether an empty text is refused."""
    modes: tuple[Enum, ...] | None = None
    """The modes that use it; None: those of its section, or all."""
    reason: str = ""
    """Why the range or the choices are as they are."""
    instead: str = ""
    """What to give in a mode that does not use it."""
    meaning: str = ""
    """What it does, of an option of ours among LeRobot's; a field of the schema has a docstring."""
    fixed: bool = False
    """Whether a checkpoint's value stays: mode=resume and mode=eval refuse another one."""

    @property
    def bounded(self) -> bool:
        """Whether its value must be a number in a range."""
        return any(bound is not None for bound in (self.ge, self.gt, self.le, self.lt))

    def contains(self, value: float) -> bool:
        """Return whether `value` is in the range; NaN never is."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and abs(value) < float("inf")
        )

    def describe(self) -> str:
        """Return the range or the choices in words, such as "1 or more"; empty when any value will do."""
        if self.choices:
            *some, last = (str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in self.choices)
            return f"{', '.join(some)} or {last}" if some else last
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if low is not None and high is not None:
            return f"a number in {'(' if self.ge is None else '['}{low:g}, {high:g}{')' if self.le is None else ']'}"
        if low is not None:
            return f"{low:g} or more" if self.ge is not None else f"a number above {low:g}"
        if high is not None:
            return f"{high:g} or less" if self.le is not None else f"a number below {high:g}"
        return "not empty" if self.nonempty else ""


def option(default: Any = MISSING, factory: Any = NO_FACTORY, **rules: Any) -> Any:
    """Declare a dataclass field with the rules of an `Option`; `factory` makes a section of the configuration."""
    metadata = {"option": Option(**rules)}
    if factory is not NO_FACTORY:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def find_options(schema: type, prefix: str = "", modes: tuple[Enum, ...] | None = None) -> Iterator[tuple[str, Option]]:
    """Yield (dotted key, rules) of each field of the dataclass `schema`, sections before their fields.

    A field that names no modes has those of its section, which are `modes`.
    """
    # Rules are inherited downwards: a section's modes hold for its fields, unless a field names its own.
    for each in fields(schema):
        rules = _rules(each)
        rules = replace(rules, modes=modes) if rules.modes is None else rules
        yield f"{prefix}{each.name}", rules
        if isinstance(each.type, type) and is_dataclass(each.type):
            yield from find_options(each.type, f"{prefix}{each.name}.", rules.modes)


def _rules(each: Field[Any]) -> Option:
    declared: Option = each.metadata.get("option", Option())
    if each.type == (str | None):
        return replace(declared, kind=str)
    return replace(declared, kind=each.type) if isinstance(each.type, type) else declared
