"""The demonstrations that come with the package, so that a first training run needs no network."""

import hashlib
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from pusht_act.demos.expert import Demonstration
from pusht_act.runtime.errors import UserError

PATH = Path(__file__).with_name("builtin.npz")
# Written by build_builtin.
SHA256 = "533550383611c0273824e5d3752bbb791a9dc68cc4fd21da0213bebc4f8861a7"
REMEDY = "install the package again, or rebuild the file by `python -m pusht_act.demos.build_builtin`"


def content_hash(
    seed: Int64[np.ndarray, " N"], length: Int64[np.ndarray, " N"], action: Float32[np.ndarray, "S 2"]
) -> str:
    """Return the SHA-256 of the arrays' contents."""
    # Of little-endian bytes rather than of the file, which may be compressed differently.
    digest = hashlib.sha256()
    for array, kind in ((seed, "<i8"), (length, "<i8"), (action, "<f4")):
        digest.update(np.ascontiguousarray(array, kind).tobytes())
    return digest.hexdigest()


@cache
def _read() -> tuple[Demonstration, ...]:
    try:
        with np.load(PATH, allow_pickle=False) as file:
            seed, length, action, covered = (file[key] for key in ("seed", "length", "action", "coverage"))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{PATH}: cannot be read ({error}); {REMEDY}") from error
    found = content_hash(seed, length, action)
    if found != SHA256:
        raise UserError(f"{PATH}: sha256 {found[:12]}... is not {SHA256[:12]}...; {REMEDY}")
    # Without noise, what was executed are the labels themselves.
    pieces = np.split(action, np.cumsum(length)[:-1])
    return tuple(
        Demonstration(int(s), piece, piece, float(c), True) for s, piece, c in zip(seed, pieces, covered, strict=True)
    )


def load(count: int) -> list[Demonstration]:
    """Return the first `count` built-in demonstrations: successes from reset seeds, without noise.

    Raises:
        UserError: `count` is out of range, or the file is not the one that belongs to this version.
    """
    everything = _read()
    if not 1 <= count <= len(everything):
        raise UserError(f"count={count}: choose one in [1, {len(everything)}], or make more with mode=demos")
    return list(everything[:count])
