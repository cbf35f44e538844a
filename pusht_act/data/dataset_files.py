"""The files of a LeRobotDataset: what is not a sound file is refused with its name; a hash tells contents apart."""

import hashlib
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pusht_act.runtime.errors import UserError

FOLDERS = ("meta", "data", "videos")
"""What a data set consists of; a README or a .gitattributes beside them is not read."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that Git has in place of a large file."""
ROWS_PER_BATCH = 500
"""Rows of a parquet file that are in memory at a time, with their images if they have any."""
FETCH = "fetch the data set again"


class DatasetError(UserError):
    """A file of a data set that cannot be used.

    Args:
        path: The file, or the folder of files that are read as one table.
        problem: What is wrong: the key or the frame, its value and what was expected.
        remedy: What to do.
    """

    def __init__(self, path: Path, problem: str, remedy: str = FETCH) -> None:
        super().__init__(f"{path}: {problem}: {remedy}")


def show(value: Any) -> str:
    """Return a value for a message, cut short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_files(root: Path) -> None:
    """Check that the data set at `root` consists of files, each with its content.

    Raises:
        DatasetError: There is something else, such as a pipe, which would never end, or a pointer of Git LFS.
    """
    for path in _files(root):
        try:
            is_file = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            raise DatasetError(path, f"cannot be read ({error.strerror})") from error
        if not is_file:
            raise DatasetError(path, "is no regular file")
        with readable(path), path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DatasetError(path, "is a pointer of Git LFS, not the file itself", f"run git lfs pull in {root}")


def content_hash(root: Path) -> str:
    """Return a hash of the names within the data set and of what the files hold."""
    # A data set that was moved or copied is decoded once.
    digest = hashlib.sha256()
    for path in _files(root):
        digest.update(path.relative_to(root).as_posix().encode())
        with readable(path), path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if not path.is_dir())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no such file.
        DatasetError: It holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(path, f"holds no JSON ({error})") from error
    if not isinstance(content, dict):
        raise DatasetError(path, f"holds {show(content)}, no JSON object")
    return content


def read_parquet(folder: Path, columns: list[str]) -> pa.Table:
    """Read columns of the parquet files of `folder` as one table; they should be small."""
    tables = []
    for path in _parquet_files(folder):
        with readable(path):
            tables.append(pq.read_table(path, columns=columns))
    with readable(folder):
        return pa.concat_tables(tables)


def iter_parquet(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows that `read_parquet` reads, some at a time."""
    for path in _parquet_files(folder):
        with readable(path), pq.ParquetFile(path) as file:
            # Unlike read_table it would leave out what is missing.
            if missing := {*columns} - {*file.schema_arrow.names}:
                raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")
            yield from file.iter_batches(ROWS_PER_BATCH, columns=columns)


def numbers(table: pa.Table, column: str, folder: Path, integer: bool = True) -> np.ndarray:
    """Return a column of plain numbers.

    Raises:
        DatasetError: It holds something else, or a row has none.
    """
    values = table[column]
    if not (pa.types.is_integer(values.type) or (pa.types.is_floating(values.type) and not integer)):
        raise DatasetError(folder, f"column {column} holds {values.type}, not {'whole ' if integer else ''}numbers")
    if values.null_count:
        raise DatasetError(folder, f"column {column} has {values.null_count} rows without a value")
    array: np.ndarray = values.to_numpy()
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array)))
        raise DatasetError(folder, f"column {column}, row {row}: {array[row]} is no finite number")
    return array


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of reading `path` in the block into one that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise DatasetError(path, f"cannot be read ({reason})") from error


def _parquet_files(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no parquet file: {FETCH}")
    return paths
