"""Read files that anybody may have written: as text, and JSON as a record of a known type.

Such a file may hold anything, or be a pipe that never ends. What is read here is a file of a plausible size, whose
values have the types of the record, or an error that names the file, the key and the value.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pusht_act.runtime.errors import UserError

MAX_BYTES = 16_000_000
"""The largest JSON file that is read; ours and LeRobot's have some kilobytes."""


def check_is_file(path: Path) -> None:
    """Refuse what can be opened but is no file: reading a pipe or a device may never end.

    Raises:
        OSError: it is neither a file nor a folder; one that is missing passes.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"{path} is no file: give one, or remove it")


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file; `errors` is as for `Path.read_text`.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    check_is_file(path)
    return path.read_text(encoding="utf-8", errors=errors)


def read_json[T](
    path: Path, kind: type[T], remedy: str = "give another checkpoint", upgrade: Callable[[Any], Any] | None = None
) -> T:
    """Return the JSON in a file as a `kind`: a dataclass, a TypedDict or a builtin type. Unknown keys are ignored.

    Args:
        path: The file.
        kind: The type of the record. Values must have its types exactly: "3" is no number.
        remedy: What to do about a damaged file, for the message.
        upgrade: Turns what an older version wrote into the present form.

    Raises:
        FileNotFoundError: there is no file.
        UserError: it cannot be read, is not JSON, or a value has another type.
    """
    try:
        check_is_file(path)
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is damaged (no file of a plausible size): {remedy}")
        text = path.read_bytes()
        if upgrade is not None:
            text = json.dumps(upgrade(json.loads(text))).encode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or 'it is no file'}): {remedy}") from error
    except UserError:
        raise
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}): {remedy}") from error
    return _check(path, kind, text, remedy)


def _check[T](path: Path, kind: type[T], text: bytes, remedy: str) -> T:
    # Imported here: it takes a tenth of a second.
    from pydantic import ValidationError

    try:
        checked: T = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(map(str, wrong["loc"]))
        given = f"{key}={wrong['input']!r:.60}: " if key else ""
        message = wrong["msg"].removeprefix("Invalid JSON: ").replace("Input should be", "it should be")
        if wrong["type"] == "missing":
            given, message = "", f"no {key}"
        raise UserError(f"{path} is damaged ({given}{message[:200]}): {remedy}") from error
    return checked


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
