"""mode=demos, as its command is given: what it writes, what it refuses, and that a kill costs next to nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from pusht_act.demos import collect
from pusht_act.demos import generate as dataset
from pusht_act.demos.expert import Demonstration, demonstrate
from pusht_act.demos.replay import replay
from pusht_act.envs.pusht import make_env, reset_to
from pusht_act.job import Result
from tests.helpers.demos import command, info, make

START = 2_000_000
MOTORS = {"motors": ["motor_0", "motor_1"]}
INDEX = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    **{
        key: {"dtype": "int64", "shape": [1], "names": None}
        for key in ("frame_index", "episode_index", "index", "task_index")
    },
}
BOTH = {
    "observation.state": {"dtype": "float32", "shape": [2], "names": MOTORS},
    "action": {"dtype": "float32", "shape": [2], "names": MOTORS},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    "next.success": {"dtype": "bool", "shape": [1], "names": None},
    **INDEX,
}
SEEN: dict[str, dict[str, Any]] = {
    "pusht": {
        "observation.image": {"dtype": "video", "shape": [96, 96, 3], "names": ["height", "width", "channel"]},
    },
    "pusht_keypoints": {"observation.environment_state": {"dtype": "float32", "shape": [16], "names": None}},
}
"""The features of lerobot/pusht and lerobot/pusht_keypoints."""


def column(root: Path, key: str) -> np.ndarray:
    """[N, ...] of all frames."""
    return np.stack(pq.read_table(root / "data")[key].to_pylist())


def actions(root: Path) -> bytes:
    return column(root, "action").astype(np.float32).tobytes()


@pytest.fixture(scope="module")
def keypoints(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return make(tmp_path_factory.mktemp("demos") / "keypoints", count=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return make(tmp_path_factory.mktemp("demos") / "pictures", env="pusht")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were really planned, in this process."""
    seeds: list[int] = []

    def counted(seed: int, options: Any) -> Demonstration:
        seeds.append(seed)
        return demonstrate(seed, options)

    monkeypatch.setattr(collect, "demonstrate", counted)
    return seeds


@pytest.mark.parametrize("group", ["pusht", "pusht_keypoints"])
def test_the_features_are_those_of_the_human_data(group: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue("pictures" if group == "pusht" else "keypoints").output_dir
    made = info(root)
    plain = {key: {k: v for k, v in feature.items() if k != "info"} for key, feature in made["features"].items()}
    assert plain == SEEN[group] | BOTH
    assert list(plain) == list(SEEN[group] | BOTH)
    assert (made["codebase_version"], made["fps"]) == ("v3.0", 10)
    human = request.getfixturevalue("human") / group
    theirs = info(human)
    assert made["features"] == theirs["features"]  # the video's encoding too
    lengths = {"total_episodes", "total_frames", "splits"}
    assert {k: v for k, v in made.items() if k not in lengths} == {k: v for k, v in theirs.items() if k not in lengths}
    tasks = [pq.read_table(folder / "meta" / "tasks.parquet").to_pydict() for folder in (root, human)]
    assert tasks[0] == tasks[1]
    stats = [json.loads((folder / "meta" / "stats.json").read_text()) for folder in (root, human)]
    assert {k: set(v) for k, v in stats[0].items()} == {k: set(v) for k, v in stats[1].items()}


def test_gym_pusht_replays_every_state_as_stock_lerobot_reads_it(keypoints: Result) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    stock = LeRobotDataset("local/demos", root=keypoints.output_dir, video_backend="pyav")
    seeds = np.load(keypoints.output_dir / "demonstrations.npz")["seed"]
    assert seeds.tolist() == [START, START + 1, START + 2]
    assert stock.num_episodes == 3
    frame = 0
    for seed, episode in zip(seeds, stock.meta.episodes, strict=True):
        env = make_env()
        env.obs_type = "environment_state_agent_pos"
        reset_to(env, int(seed))
        for t in range(episode["length"]):
            item = stock[frame]
            seen = env.get_obs()
            np.testing.assert_array_equal(item["observation.state"], seen["agent_pos"].astype(np.float32))
            np.testing.assert_array_equal(
                item["observation.environment_state"], seen["environment_state"].astype(np.float32)
            )
            _, reward, _, _, outcome = env.step(item["action"].numpy())
            last = t == episode["length"] - 1
            assert item["next.reward"].item() == pytest.approx(reward, abs=1e-6)
            assert (item["next.done"].item(), item["next.success"].item()) == (last, outcome["is_success"])
            assert item["timestamp"].item() == pytest.approx(t / 10)
            frame += 1
        assert outcome["is_success"]
    assert frame == len(stock)


def test_the_statistics_are_those_of_the_frames(keypoints: Result) -> None:
    """To what LeRobot's float32 sums can tell."""
    stats = json.loads((keypoints.output_dir / "meta" / "stats.json").read_text())
    for key in ("action", "observation.state", "observation.environment_state", "next.reward"):
        frames = column(keypoints.output_dir, key).astype(np.float64)
        frames = frames.reshape(len(frames), -1)
        for name, value in (
            ("mean", frames.mean(0)), ("std", frames.std(0)), ("min", frames.min(0)), ("max", frames.max(0)),
        ):  # fmt: skip
            np.testing.assert_allclose(stats[key][name], value, rtol=2e-4, err_msg=f"{key} {name}")
        assert stats[key]["count"] == [len(frames)]


def test_pictures_and_their_statistics_are_the_environments(pictures: Result) -> None:
    """The video is lossy, as people's is; the statistics are taken before it is made."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = pictures.output_dir
    drawn = [replay(seed, column_of(root, i), image=True).image for i, seed in enumerate((START, START + 1))]
    frames = np.concatenate([image for image in drawn if image is not None])
    stats = json.loads((root / "meta" / "stats.json").read_text())["observation.image"]
    assert len(frames) == info(root)["total_frames"]
    scaled = frames.astype(np.float64) / 255
    np.testing.assert_allclose(np.ravel(stats["mean"]), scaled.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(np.ravel(stats["std"]), scaled.std((0, 1, 2)), rtol=1e-9)
    for name, value in (("min", scaled.min((0, 1, 2))), ("max", scaled.max((0, 1, 2)))):
        np.testing.assert_array_equal(np.ravel(stats[name]), value)
    for q in (1, 10, 50, 90, 99):
        exact = np.percentile(scaled.reshape(-1, 3), q, axis=0, method="inverted_cdf")
        np.testing.assert_array_equal(np.ravel(stats[f"q{q:02d}"]), exact)
    assert stats["count"] == [len(frames)]
    stock = LeRobotDataset("local/demos", root=root, video_backend="pyav", return_uint8=True)
    for index in (0, 7, len(frames) - 1):
        seen = stock[index]["observation.image"].numpy().transpose(1, 2, 0).astype(int)
        assert np.abs(seen - frames[index]).mean() < 3
    assert not list(root.glob("images"))
    video = next((root / "videos").rglob("*.mp4"))
    assert video.stat().st_mode == (root / "meta" / "info.json").stat().st_mode


def column_of(root: Path, episode: int) -> np.ndarray:
    table = pq.read_table(root / "data")
    return np.stack(table.filter(np.equal(table["episode_index"].to_numpy(), episode))["action"].to_pylist())


@pytest.mark.slow
def test_a_policy_trains_on_it(keypoints: Result, tiny: Callable[..., Result]) -> None:
    result = tiny("dataset=pusht_keypoints", f"dataset.root={keypoints.output_dir}", "steps=2")
    assert result.step == 2
    assert np.isfinite(result.metrics["loss"])


def test_what_lies_beside_the_data(keypoints: Result) -> None:
    root = keypoints.output_dir
    assert sorted(path.name for path in root.iterdir()) == [
        "README.md", "config.yaml", "data", "demonstrations.npz", "episode-0.mp4", "film_strip.png", "meta",
        "quality.json", "runs.jsonl",
    ]  # fmt: skip
    assert not root.with_name("keypoints.work").exists()
    written = json.loads((root / "quality.json").read_text())
    assert written["demonstrations"] == keypoints.metrics
    assert written["seeds_not_solved"] == []
    assert keypoints.metrics["pc_success"] == 100
    assert keypoints.metrics["coverage_min"] > 0.97
    assert keypoints.metrics["n_frames"] == info(root)["total_frames"]
    card = (root / "README.md").read_text()
    assert "license: mit" in card
    assert "demos.n_episodes=3" in card
    assert re.search(r"\| starts solved +\| +100.0 % ", card)
    assert keypoints.video_paths == [root / "episode-0.mp4"]


def test_with_noise_the_labels_stay_clean_and_what_was_done_is_kept(tmp_path: Path) -> None:
    root = make(tmp_path / "noisy", "demos.action_noise=5", count=1).output_dir
    kept = np.load(root / "demonstrations.npz")
    assert actions(root) == kept["action"].tobytes()
    assert 2 < (kept["executed"] - kept["action"]).std() < 8
    episode = replay(START, kept["executed"])
    assert column(root, "observation.state").astype(np.float32).tobytes() == episode.observation_state.tobytes()
    keypoints = column(root, "observation.environment_state").astype(np.float32)
    assert keypoints.tobytes() == episode.environment_state.tobytes()
    assert episode.success[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    ["coverage=0.98", "speed=14", "smoothness=0.5", "action_noise=4", "replan=2", "seed=1", "start_seed=2000001"],
)
def test_every_option_changes_the_demonstrations(override: str, keypoints: Result, tmp_path: Path) -> None:
    root = make(tmp_path / "other", f"demos.{override}", count=1).output_dir
    usual = np.load(keypoints.output_dir / "demonstrations.npz")
    other = np.load(root / "demonstrations.npz")
    assert other["action"].tobytes() != usual["action"][: usual["length"][0]].tobytes()
    assert other["seed"][0] == START + (override == "start_seed=2000001")


@pytest.mark.slow
def test_a_job_that_was_stopped_goes_on(
    planned: list[int], keypoints: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planning = tmp_path / "again"

    def stopped(seed: int, options: Any) -> Demonstration:
        if len(planned) == 2:
            raise KeyboardInterrupt
        made: Demonstration = counted(seed, options)
        return made

    counted = getattr(collect, "demonstrate")  # noqa: B009  (that of `planned`)
    monkeypatch.setattr(collect, "demonstrate", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(planning, count=3)
    assert planned == [START, START + 1]
    assert not planning.exists()
    monkeypatch.setattr(collect, "demonstrate", counted)
    work = next(planning.with_name("again.work").glob("*/planned"))
    (work / f"{START}.npz").write_bytes(b"half a file")  # as after a power cut
    with monkeypatch.context() as broken:
        broken.setattr(dataset, "film_strip", lambda *_: 1 / 0)  # stopped while writing
        with pytest.raises(ZeroDivisionError):
            make(planning, count=3)
    assert planned == [START, START + 1, START, START + 2]
    assert not planning.exists()
    again = make(planning, count=3)
    assert len(planned) == 4
    assert actions(again.output_dir) == actions(keypoints.output_dir)
    assert not planning.with_name("again.work").exists()
    assert len((planning / "runs.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_killed_job_leaves_no_process_and_its_work_is_gone_on_with(keypoints: Result, tmp_path: Path) -> None:
    root = tmp_path / "killed"
    words = command(root, env="pusht_keypoints", count=2, workers=2)
    job = subprocess.Popen([sys.executable, "-m", "pusht_act", *words], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("killed.work/*/planned/*.npz")):
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.05)
    children = {int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()}
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    while any(running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    make(root, count=2, workers=2)
    assert actions(keypoints.output_dir).startswith(actions(root))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_start_that_is_not_solved_is_left_out_and_named(
    keypoints: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sometimes(seed: int, options: Any) -> Demonstration:
        return replace(demonstrate(seed, options), success=seed != START)

    monkeypatch.setattr(collect, "demonstrate", sometimes)
    with caplog.at_level("INFO"):
        made = make(tmp_path / "less", count=2)
    assert np.load(made.output_dir / "demonstrations.npz")["seed"].tolist() == [START + 1, START + 2]
    assert made.metrics["pc_success"] == pytest.approx(200 / 3)
    assert json.loads((made.output_dir / "quality.json").read_text())["seeds_not_solved"] == [START]
    assert f"seed {START} is skipped" in caplog.text
    first = int(np.load(keypoints.output_dir / "demonstrations.npz")["length"][0])
    assert actions(made.output_dir) == column(keypoints.output_dir, "action").astype(np.float32)[first:].tobytes()


def test_options_that_solve_nothing_end_the_job(
    planned: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = Demonstration(0, np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), 0.1, False)
    monkeypatch.setattr(collect, "demonstrate", lambda seed, _: replace(failure, start=seed))
    with pytest.raises(ValueError, match="only 0 of 20 starts were solved with .*: bring demos.speed"):
        make(tmp_path / "none", count=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("demos.coverage=1.2", r"demos.coverage=1.2 is too large: give a number in \[0.95, 1\)"),
        ("demos.coverage=0.9", r"demos.coverage=0.9 is too small: give a number in \[0.95, 1\)"),
        ("demos.speed=0", r"demos.speed=0.0 is too small: give a number in"),
        ("demos.smoothness=-1", r"demos.smoothness=-1.0 is too small: give 0"),
        ("demos.action_noise=-1", r"demos.action_noise=-1.0 is too small: give a number"),
        ("demos.replan=0", r"demos.replan=0 is too small: give 1"),
        ("demos.seed=-1", r"demos.seed=-1 is too small: give 0"),
        ("demos.n_episodes=0", r"demos.n_episodes=0 is too small: give 1"),
        ("demos.workers=-1", r"demos.workers=-1 is too small: give 0"),
        ("demos.start_seed=-1", r"demos.start_seed=-1 is too small: give 0"),
        ("demos.n_episodes=1000000000", "MB are free there, and 1000000000 episodes need about .* MB: free some"),
        ("demos.push_to_hub=true", "demos.push_to_hub=true needs a place to push to: give demos.repo_id=USER/NAME"),
        ("policy.push_to_hub=true", "not for mode=demos: .*mode=demos has demos.push_to_hub="),
        ("print_lerobot_command=true", "print_lerobot_command=True is for training .*LeRobot does not generate"),
        ("env.obs_type=state", "env.obs_type=state"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    override: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YOUR_PROJECT_NAME", raising=False)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        make(tmp_path / "refused", override)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_data_set_in_place_is_never_written_to(keypoints: Result, tmp_path: Path, planned: list[int]) -> None:
    root = make(tmp_path / "here", count=1).output_dir
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(FileExistsError, match="is in use: give another output_dir=, or move it aside with overwrite"):
        make(root, count=1)
    assert len(planned) == 1
    make(root, "overwrite=true", "demos.start_seed=2000001", count=1)
    aside = tmp_path / "here.old-1"
    assert {path: path.stat().st_mtime_ns for path in aside.rglob("*")} == {
        aside / path.relative_to(root): at for path, at in before.items()
    }
    assert actions(root) != actions(aside)


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one.work").mkdir()
    with FileLock(tmp_path / "one.work" / "lock"), pytest.raises(FileExistsError, match="written by another process"):
        make(tmp_path / "one", count=1)


def test_starts_that_evaluation_uses_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "early", "demos.start_seed=100000", count=1)
    assert "demos.start_seed=100000: evaluation resets" in caplog.text


def test_planning_processes_need_no_torch() -> None:
    code = "import sys, pusht_act.demos.collect; print([m for m in ('torch', 'lerobot') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
