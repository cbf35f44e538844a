"""Look at a safetensors file without torch: whether it is whole, and whether its numbers are finite.

NumPy and safetensors are imported where they are used: a command that reads no checkpoint does without them.
"""

import json
from pathlib import Path
from typing import Any

from pusht_act.runtime.stored import check_is_file

EXPONENTS = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""By safetensors' name of a floating point type: an integer of its size, and the bits of the exponent in it."""


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a file that is there, as "is damaged ..." or "cannot be read ..."; None if nothing is.

    A number that is not finite is damage, too: nothing of the kind is ever saved.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_is_file(path)
        with safe_open(path, "np"):
            # It has checked the header against the size of the file.
            pass
        return f"is damaged ({name} is not finite)" if (name := _find_nonfinite(path)) is not None else None
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except SafetensorError as error:
        return f"is damaged ({' '.join(str(error).split())[:200]})"


def read_header(path: Path) -> dict[str, Any]:
    """Return name -> dtype, shape and offsets of each tensor in a file in which there is no damage."""
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header, and where the numbers begin."""
    # The format: 8 bytes that give the length of the header, the header in JSON, then the tensors.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _find_nonfinite(path: Path) -> str | None:
    """Return the name of a tensor that has a NaN or an infinity; None if all are finite."""
    import numpy as np

    header, start = _read_header(path)
    content = np.memmap(path, np.uint8, "r")
    for name, entry in header.items():
        if entry["dtype"] not in EXPONENTS:
            continue
        name_of_kind, exponent = EXPONENTS[entry["dtype"]]
        kind = np.dtype(name_of_kind)
        first, last = entry["data_offsets"]
        # What is not finite has all bits of its exponent set. NumPy knows no bfloat16, so the bits have to tell.
        if ((content[start + first : start + last].view(kind) & kind.type(exponent)) == exponent).any():
            return name
    return None
