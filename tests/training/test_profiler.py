"""train.profile: a trace, and where a step's time goes."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import pusht_act
from pusht_act.job import Result

pytestmark = pytest.mark.slow

Tiny = Callable[..., Result]
LONG = ["steps=30", "log_freq=7", "eval_freq=30", "save_freq=0"]


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, tuple[float, int]]]:
    """By part, its ms and its share of each step's line."""
    texts = [r.getMessage() for r in caplog.records if "a step takes" in r.getMessage()]
    return [
        {name: (float(ms), int(of)) for name, ms, of in re.findall(r"(\w+) ([\d.]+) \((\d+) %\)", t)} for t in texts
    ]


def test_a_profile_tells_where_the_time_goes(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = tiny(*LONG, "train.profile=true").output_dir
    events = json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert sum(name.startswith("ProfilerStep#") for name in names) == 10
    assert any(name.startswith("Optimizer.step") for name in names)
    assert "aten::addmm" in names
    assert {"data", "forward", "backward", "optimizer", "logging", "eval", "saving"} <= names
    first, last = lines(caplog)
    for split in (first, last):
        assert list(split) == ["data", "forward", "backward", "optimizer", "logging", "eval", "saving"]
        assert all(split[name][0] > 0 for name in ("data", "forward", "backward", "optimizer", "logging"))
        assert 96 <= sum(share for _, share in split.values()) <= 104
    for seldom in ("eval", "saving"):
        assert last[seldom][0] > first[seldom][0], "at the last step"


def test_nothing_is_profiled_unasked_and_the_training_is_the_same(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiled = tiny("steps=26", "train.profile=true", f"output_dir={tmp_path / 'profiled'}")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        plain = tiny("steps=26", f"output_dir={tmp_path / 'plain'}")
    assert not (plain.output_dir / "profile").exists()
    assert not lines(caplog)
    assert {**plain.metrics, "dataloading_s": 0} == {**profiled.metrics, "dataloading_s": 0}


def test_a_profile_that_would_come_to_nothing_is_refused_or_said(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="steps=24 are too few for train.profile=true: give 25 or more"):
        tiny("steps=24", "train.profile=true")
    run = tiny("steps=2").output_dir
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6", "train.profile=true"])
    assert "the run ended after 4 steps, a trace needs 25" in caplog.text
    with pytest.raises(ValueError, match="train.profile=True is for training .*, not for mode=eval: leave it out"):
        pusht_act.run(["mode=eval", f"checkpoint={run}", "train.profile=true"])
