"""Metrics: windows whose means survive a checkpoint, and metrics.jsonl after a crash."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pusht_act
from pusht_act.job import Result
from pusht_act.runs.loggers import JsonlLogger, LoggerCollection
from pusht_act.runs.run_dir import RunDir
from pusht_act.training.metric_accumulator import MetricAccumulator
from tests.helpers.config import config
from tests.helpers.wandb_runs import lines

Tiny = Callable[..., Result]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines(path)]


LOSSES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


@given(losses=LOSSES, data=st.data())
def test_means_do_not_depend_on_where_a_checkpoint_was_taken(losses: list[float], data: st.DataObject) -> None:
    whole, broken, finite = MetricAccumulator(), MetricAccumulator(), []
    stop = data.draw(st.integers(0, len(losses)))
    for step, loss in enumerate(losses):
        if step == stop:
            broken = MetricAccumulator(json.loads(json.dumps(broken.sums())))
        skipped = data.draw(st.booleans())
        finite += [] if skipped else [loss]
        for window in (whole, broken):
            values: dict[str, torch.Tensor | float] = {"dataloading_s": loss / 7}
            values["loss"] = torch.tensor(torch.nan if skipped else loss)
            window.add(values, torch.tensor(float(skipped)))
    assert broken.means() == whole.means()  # to the bit: a resumed run repeats its log
    assert whole.means().get("skipped", 0) == len(losses) - len(finite)
    if finite:
        assert whole.means()["loss"] == pytest.approx(sum(finite) / len(finite), rel=1e-4, abs=1)


def test_an_empty_window_has_no_means() -> None:
    assert MetricAccumulator().means() == {}


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_a_window_of_skipped_steps_has_their_number_alone(skipped: float) -> None:
    window = MetricAccumulator()
    for _ in range(3):
        window.add({"loss": torch.tensor(torch.nan if skipped else 2.0)}, torch.tensor(skipped))
    assert window.means() == ({"skipped": 3.0} if skipped else {"loss": 2.0})
    assert window.newly_skipped() == 3 * skipped
    assert window.newly_skipped() == 0
    window.add({"loss": torch.tensor(torch.nan)}, torch.tensor(1.0))
    resumed = MetricAccumulator(window.sums())
    assert window.newly_skipped() == 1
    resumed.add({"loss": torch.tensor(torch.nan)}, torch.tensor(1.0))
    assert resumed.newly_skipped() == 1, "those before are counted in TrainerState"


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    sink = JsonlLogger(tmp_path / "run" / "metrics.jsonl", resumed_at=0)
    sink.log({"train/loss": 0.5}, 200)
    assert untimed(tmp_path / "run" / "metrics.jsonl") == [{"step": 200, "train/loss": 0.5}]
    sink.close()


def test_a_line_has_its_time(tmp_path: Path) -> None:
    sink = JsonlLogger(tmp_path / "metrics.jsonl", resumed_at=0)
    began = time.time()
    sink.log({"train/loss": 0.5}, 1)
    sink.close()
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert began - 0.001 <= line["time"] <= time.time() + 0.001
    assert round(line["time"], 3) == line["time"]


def test_a_line_has_its_device_and_the_seconds_of_training_without_those_between_two_processes(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny("steps=2", "eval_freq=2").output_dir
    first = lines(run / "metrics.jsonl")
    # A process that is started an hour later.
    hour_later = lambda clock=time.time: clock() + 3600.0  # noqa: E731
    monkeypatch.setattr("pusht_act.runs.loggers.time.time", hour_later)
    result = pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4"])
    found = lines(run / "metrics.jsonl")
    assert found[: len(first)] == first
    elapsed = [line["elapsed_s"] for line in found]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[0] < elapsed[-1] < 3600 < found[-1]["time"] - found[0]["time"]
    state = json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text())
    assert elapsed[-2] <= state["elapsed_s"] < 3600
    assert {line["device"] for line in found} == {"cpu"}
    assert {"time", "elapsed_s", "device", ""}.isdisjoint(result.metrics)
    assert {"", "elapsed_s", "device"}.isdisjoint(RunDir(run).metrics_of(4))


@given(steps=st.lists(st.integers(1, 30)).map(sorted), resumed_at=st.integers(0, 30), torn=st.integers(0, 40))
def test_a_resume_drops_what_it_will_write_again_and_a_torn_line(
    steps: list[int], resumed_at: int, torn: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    whole = [json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in steps]
    last = json.dumps({"step": 31, "train/loss": 1.0})
    path.write_text("".join(whole) + last[: min(torn, len(last) - 1)])
    JsonlLogger(path, resumed_at).close()
    assert [line["step"] for line in lines(path)] == [step for step in steps if step <= resumed_at]


def test_a_resume_drops_the_evaluation_that_it_does_again_and_nothing_else_of_its_step(tmp_path: Path) -> None:
    sink = JsonlLogger(tmp_path / "metrics.jsonl", resumed_at=0)
    logged = [(1, "eval/pc_success"), (2, "train/loss"), (2, "eval/loss"), (3, "train/loss"), (2, "eval/pc_success")]
    for step, key in logged:
        sink.log({key: 0.0}, step)
    sink.close()
    JsonlLogger(tmp_path / "metrics.jsonl", resumed_at=3, pending=[2]).close()
    assert [(line["step"], list(line)[1]) for line in lines(tmp_path / "metrics.jsonl")] == logged[:-1]


@pytest.mark.parametrize(("resumed_at", "rollbacks", "kept"), [(4, 0, []), (4, 1, [1]), (9, 2, [1, 2]), (3, 1, [])])
def test_a_resume_keeps_the_lines_of_roll_backs_that_its_checkpoint_knows_of(
    resumed_at: int, rollbacks: int, kept: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    with LoggerCollection(config("wandb.enable=false"), RunDir(tmp_path), 0, None) as metrics:
        for step in range(1, 7):
            metrics.log("train", {"loss": 0.5}, step)
        metrics.rewind(4, [], number=1, diverged_at=7)
        assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 4]
        metrics.rewind(4, [], number=2, diverged_at=8)
        metrics.log("train", {"loss": 0.5}, 5)
    JsonlLogger(path, resumed_at, [], rollbacks).close()
    assert [line["rollback/number"] for line in lines(path) if "rollback/number" in line] == kept
    assert [line["step"] for line in lines(path) if "train/loss" in line] == [1, 2, 3, 4, 5][:resumed_at]


def test_bytes_that_a_power_cut_left_behind_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra\x00\x00\xff\xfe')
    sink = JsonlLogger(path, resumed_at=5)
    sink.log({"train/loss": 2.0}, 6)
    sink.close()
    assert [line["step"] for line in lines(path)] == [1, 6]


def test_groups_name_the_metrics(tmp_path: Path) -> None:
    with LoggerCollection(config("wandb.enable=false"), RunDir(tmp_path), 0, None) as metrics:
        metrics.log("train", {"loss": 0.5}, 1)
        metrics.log("eval", {"pc_success": 10.0}, 1)
    assert untimed(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 0.5}, {"step": 1, "eval/pc_success": 10.0}]
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("foreign", ["[]", "3", '{"note": "x"}', '{"step": "x"}', '{"step": 1, "train/loss": "x"}'])
def test_a_line_of_somebody_else_stays_and_stops_nothing(
    foreign: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = RunDir(tmp_path).metrics
    ours = [json.dumps({"step": step, "train/loss": 0.5}) for step in (1, 2, 3)]
    path.write_text("\n".join([ours[0], foreign, *ours[1:], '{"step": 4, "tra']))
    JsonlLogger(path, resumed_at=2).close()
    assert path.read_text().splitlines() == [ours[0], foreign, ours[1]]
    assert f"{path} has 1 lines that are no metrics of this run" in caplog.text
    assert RunDir(tmp_path).metrics_of(2) == {"loss": 0.5}
