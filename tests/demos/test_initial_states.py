"""demos.initial_states: demonstrations from a list of states, what lies beside them, and the lists that are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pusht_act
from pusht_act.demos import collect
from pusht_act.demos.expert import Demonstration, demonstrate
from pusht_act.demos.initial_states import HEADER, describe_start, read_initial_states
from pusht_act.demos.planner import PlannerOptions
from pusht_act.envs.pusht import Start, make_env, reset_to
from pusht_act.job import Result

pytestmark = pytest.mark.slow

STARTS = [(60.0, 400.0, 200.0, 220.0, 2.0), (400.5, 100.25, 300.0, 300.0, -1.0), (256.0, 430.0, 170.0, 150.0, 0.1)]
GOOD = [",".join(map(str, start)) for start in STARTS]


def listed(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder / "starts.csv"
    path.write_text("\n".join([header, *lines, ""]))
    return path


def make(output_dir: Path, starts: Path, *overrides: str, count: int = 3, workers: int = 1) -> Result:
    numbers = [f"demos.n_episodes={count}", f"demos.workers={workers}", f"demos.initial_states={starts}"]
    return pusht_act.run(["mode=demos", "env=pusht_keypoints", *numbers, f"output_dir={output_dir}", *overrides])


def column(root: Path, key: str) -> np.ndarray:
    """[N, ...] of all frames, float32."""
    return np.stack(pq.read_table(root / "data")[key].to_pylist()).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """By two workers."""
    folder = tmp_path_factory.mktemp("starts")
    return make(folder / "set", listed(folder, *GOOD), workers=2)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Start]:
    """What was really planned, in this process; the first of STARTS counts as not solved."""
    starts: list[Start] = []

    def counted(start: Start, options: Any) -> Demonstration:
        starts.append(start)
        return replace(demonstrate(start, options), success=start != STARTS[0])

    monkeypatch.setattr(collect, "demonstrate", counted)
    return starts


def test_gym_pusht_replays_every_state_from_the_starts_that_are_kept(made: Result) -> None:
    root = made.output_dir
    kept = np.load(root / "demonstrations.npz")
    assert set(kept) == {"start", "length", "action", "executed", "coverage"}
    np.testing.assert_array_equal(kept["start"], STARTS)
    agent, keypoints = column(root, "observation.state"), column(root, "observation.environment_state")
    frame = 0
    for start, length in zip(kept["start"].tolist(), kept["length"], strict=True):
        env = make_env()
        env.obs_type = "environment_state_agent_pos"
        reset_to(env, tuple(start))
        assert agent[frame].tolist() == start[:2]
        for _ in range(length):
            seen = env.get_obs()
            np.testing.assert_array_equal(agent[frame], seen["agent_pos"].astype(np.float32))
            np.testing.assert_array_equal(keypoints[frame], seen["environment_state"].astype(np.float32))
            outcome = env.step(kept["executed"][frame])[4]
            frame += 1
        assert outcome["is_success"]
    assert frame == len(agent)


def test_workers_plan_the_starts_in_order_as_one_process_does(made: Result) -> None:
    one_by_one = np.concatenate([demonstrate(start).action for start in STARTS])
    assert column(made.output_dir, "action").tobytes() == one_by_one.tobytes()


def test_what_lies_beside_the_data_speaks_of_starts(made: Result) -> None:
    root = made.output_dir
    written = json.loads((root / "quality.json").read_text())
    assert (written["starts_not_solved"], "seeds_not_solved" in written) == ([], False)
    assert "`demonstrations.npz` has the start (agent x, y, block x, y in px" in (root / "README.md").read_text()
    assert Image.open(root / "film_strip.png").height > 160
    assert (root / "episode-0.mp4").stat().st_size > 10_000


def test_a_start_that_is_not_solved_is_left_out_and_a_list_that_is_used_up_says_so(
    planned: list[Start], made: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starts = listed(tmp_path, *GOOD)
    message = "used up with 2 of 3 solved, fewer than demos.n_episodes=3: give demos.n_episodes=2 or a longer list"
    with pytest.raises(ValueError, match=message), caplog.at_level("INFO"):
        make(tmp_path / "set", starts)
    assert "start (60, 400, 200, 220, 2) is skipped" in caplog.text
    assert not (tmp_path / "set").exists()
    root = make(tmp_path / "set", starts, count=2).output_dir
    assert planned == STARTS  # the second command planned none again
    np.testing.assert_array_equal(np.load(root / "demonstrations.npz")["start"], STARTS[1:])
    assert json.loads((root / "quality.json").read_text())["starts_not_solved"] == [list(STARTS[0])]
    first = int(np.load(made.output_dir / "demonstrations.npz")["length"][0])
    assert column(root, "action").tobytes() == column(made.output_dir, "action")[first:].tobytes()
    assert not (tmp_path / "set.work").exists()


def test_a_list_none_of_which_is_solved_asks_for_another(planned: list[Start], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="demos.initial_states is used up with 0 of 1 solved, fewer than .*: give a longer list;"
    ):
        make(tmp_path / "set", listed(tmp_path, GOOD[0]), count=1)


def test_what_was_planned_is_found_again_by_its_start(planned: list[Start], tmp_path: Path) -> None:
    options = PlannerOptions()
    (tmp_path / "planned").mkdir()
    collect.collect(tmp_path / "planned", options, STARTS, 1, 1)
    assert planned == STARTS[:2]
    again = collect.collect(tmp_path / "planned", options, [STARTS[1], STARTS[2], 2_000_000], 3, 1)
    assert planned == [*STARTS, 2_000_000]
    assert [one.start for one in again] == [STARTS[1], STARTS[2], 2_000_000]


def test_a_list_is_read_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "starts.csv"
    path.write_bytes(
        f"\ufeff{HEADER}\r\n 100.1 ,1e2,0.2e3,300,0.30000000000000004\r\n\r\n".encode()
    )  # by a spreadsheet
    assert read_initial_states(str(path)) == [(100.1, 100.0, 200.0, 300.0, 0.1 + 0.2)]
    assert [describe_start(start) for start in (7, STARTS[1])] == ["seed 7", "start (400.5, 100.25, 300, 300, -1)"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], r"line 1: '' is not the header: give agent_x,agent_y,block_x,block_y,block_angle"),
        (["agent_x,agent_y,block_x,block_y", "1,2,3,4"], "line 1: 'agent_x,agent_y,block_x,block_y' is not the header"),
        (GOOD, "line 1: '60.0,400.0,200.0,220.0,2.0' is not the header"),
        ([HEADER], "has no starts: give one a line below the header"),
        ([HEADER, *GOOD, "1,2,3,4"], "line 5: '1,2,3,4' has 4 values: give agent_x,"),
        ([HEADER, "1,2,3,4,5,6"], "line 2: '1,2,3,4,5,6' has 6 values: give agent_x,"),
        ([HEADER, "60,400,200,220,north"], "line 2: block_angle=north is not a number: give one in rad"),
        ([HEADER, "60,,200,220,2"], "line 2: agent_y= is not a number: give one in px"),
        ([HEADER, "60,nan,200,220,2"], r"line 2: start=\(60, nan, 200, 220, 2\): give .* all finite"),
        (
            [HEADER, "600,400,200,220,2"],
            r"line 2: start=\(600, .* the agent is outside the arena; put it within \[0, 512",
        ),
        ([HEADER, "60,400,20,220,2"], r"line 2: start=\(60, 400, 20, .* through the walls .*; move it inside"),
        ([HEADER, "200,235,200,220,0"], r"line 2: start=\(200, .* centre is inside the block; move it 15 px off"),
        ([HEADER, *GOOD, GOOD[1]], r"line 5: start \(400.5, .*\) is that of line 3: remove it"),
        (
            [HEADER, *GOOD[:2]],
            "has too few starts, 2, for demos.n_episodes=3: give demos.n_episodes=2 or less, or a longer",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_list_that_is_wrong_is_refused_before_anything_is_written(
    lines: list[str], message: str, tmp_path: Path
) -> None:
    path = listed(tmp_path, *lines[1:], header=lines[0])
    with pytest.raises(ValueError, match=f"demos.initial_states={path} {message}") as caught:
        make(tmp_path / "set", path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"\xff\xfe\x00", "utf-8")])
def test_a_list_that_cannot_be_read_is_refused(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "starts.csv"
    if content:
        path.write_bytes(content)
    message = rf"demos.initial_states={path} cannot be read \(.*{reason}.*\): give a CSV file"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "set", path)
    assert not (tmp_path / "set.work").exists()


def test_a_list_and_a_first_seed_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demos.start_seed=2000000 and demos.initial_states=.*: leave one of them out"):
        make(tmp_path / "set", listed(tmp_path, *GOOD), "demos.start_seed=2000000")
