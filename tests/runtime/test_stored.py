"""Files of anybody, read as records of a known type."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pusht_act.runtime.errors import UserError
from pusht_act.runtime.stored import MAX_BYTES, read_json, read_text


@dataclass
class Record:
    step: int
    rate: float = 0.5
    names: list[str] = field(default_factory=list)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


def test_a_record_has_its_types_and_ignores_other_keys(path: Path) -> None:
    path.write_text('{"step": 3, "rate": 1, "names": ["a"], "newer": {}}')
    assert read_json(path, Record) == Record(3, 1.0, ["a"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"step": "3"}, "step='3': it should be a valid integer"),
        ({"step": True}, "step=True: it should be a valid integer"),
        ({"step": 1, "names": ["a", 2]}, "names.1=2: it should be a valid string"),
        ({}, "no step"),
        ([], "it should be an object"),
        ("{", "EOF while parsing"),
        ("", "EOF while parsing"),
        ("[" * 100_000, "recursion limit"),
        ('"\ud800"', "invalid unicode"),
        (" " * (MAX_BYTES + 1), "no file of a plausible size"),
    ],
)
def test_anything_else_names_the_file_the_key_and_the_value(content: Any, said: str, path: Path) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as caught:
        read_json(path, Record, "delete it")
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert said in str(caught.value)
    assert str(caught.value).endswith("): delete it")


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(UserError, match="record.json cannot be read"):
        read_json(path, Record)
    with pytest.raises(OSError, match="record.json is no file"):
        read_text(path)


def test_what_is_missing_is_the_callers_to_explain(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(path, Record)


def test_an_older_form_is_brought_up_to_date(path: Path) -> None:
    path.write_text("3")
    assert read_json(path, Record, upgrade=lambda content: {"step": content}) == Record(3)
    path.write_text("3")
    with pytest.raises(UserError, match="is damaged"):
        read_json(path, Record, upgrade=lambda content: content["step"])
