"""The page of all options says what the schema says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pusht_act.config.lerobot import describe_fields
from pusht_act.config.lerobot_fields import lerobot_fields
from pusht_act.config.options import Option
from pusht_act.config.reference import reference
from pusht_act.config.validation import OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_committed_page_is_current() -> None:
    hint = "run python -m pusht_act.config.reference docs/configuration.md"
    assert PAGE.read_text() == reference(), hint


def test_every_option_is_on_it() -> None:
    page = reference()
    sections = {key.partition(".")[0] for key in OPTIONS if "." in key}
    assert [key for key in OPTIONS.keys() - sections if f"| `{key}` |" not in page] == []


@pytest.mark.parametrize(
    ("option", "within", "without", "words"),
    [
        (Option(ge=1), [1, 2.5], [0, -1], "1 or more"),
        (Option(gt=0), [1e-9], [0, -1], "a number above 0"),
        (Option(ge=0, lt=1), [0, 0.99], [1, -0.1], "a number in [0, 1)"),
        (Option(gt=0, le=30), [30], [0, 31], "a number in (0, 30]"),
        (Option(le=5), [-3, 5], [6], "5 or less"),
        (Option(lt=5), [4.9], [5], "a number below 5"),
    ],
)
def test_a_range_in_words(option: Option, within: list[float], without: list[float], words: str) -> None:
    assert option.bounded
    assert all(map(option.contains, within))
    assert not any(map(option.contains, [*without, float("nan"), float("inf"), float("-inf")]))
    assert option.describe() == words


def test_choices_in_words() -> None:
    assert Option(choices=("a", "b", "c")).describe() == "a, b or c"
    assert Option(choices=("a",)).describe() == "a"
    assert Option().describe() == ""


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("-x", 2)])
def test_an_option_is_no_file_to_write(option: str, code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pusht_act.config.reference", option],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert "docs/configuration.md" in done.stdout if code == 0 else "unrecognized arguments: -x" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_committed_fields_are_those_of_lerobot() -> None:
    hint = "run python -m pusht_act.config.lerobot"
    assert json.loads(json.dumps(describe_fields())) == lerobot_fields(), hint
