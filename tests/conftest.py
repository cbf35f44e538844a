"""What the tests share: one thread, a cache of their own, small data sets, a tiny run."""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import pusht_act
from pusht_act.job import Result
from tests.helpers.commands import Commands
from tests.helpers.runs import tiny_command

pytest_plugins = ["tests.helpers.wandb_runs", "tests.helpers.wandb_server"]

settings.register_profile("unhurried", settings(), deadline=None)  # on a loaded machine an example takes its time
settings.load_profile("unhurried")

ROOT = Path(__file__).parents[1]
HUMAN = ROOT.parent / "shared" / "data"
"""The human demonstrations, beside a developer's checkout; never part of the project."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=30, help="how many damaged files tests/test_fuzz.py tries")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = Path(os.environ.setdefault("PUSHT_ACT_CACHE", str(tmp_path_factory.mktemp("cache"))))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB__SERVICE_WAIT"] = "600"  # its process once took more than the 30 s that it has by default
    return root


@pytest.fixture(autouse=True)
def _no_log_left_open() -> Iterator[None]:
    """The command gives the root logger a console: here a test's captured stream, which is closed after it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Result]:
    """Run TINY with more overrides, in tmp_path/run unless output_dir is given."""

    def run(*overrides: str) -> Result:
        return pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}", *overrides))

    return run


@pytest.fixture(scope="session")
def commands(cache: Path) -> Iterator[Commands]:
    """The command in processes of its own, without their seconds of imports."""
    with Commands() as commands:
        yield commands


@pytest.fixture
def human() -> Path:
    """The human demonstrations. In CI a test that needs them skips only where there is no `shared` at all."""
    assert (ROOT / "pyproject.toml").is_file(), f"{ROOT} is not the root of the repository"
    if not HUMAN.is_dir():
        assert not (os.environ.get("CI") and HUMAN.parent.is_dir()), f"{HUMAN} is not where the data tests look for it"
        pytest.skip("the human demonstrations (shared/data beside the checkout) are not here")
    return HUMAN


def _write_dataset(root: Path, image: bool) -> Path:
    """Three short episodes of built-in demonstrations, written by LeRobot itself."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from pusht_act.demos import builtin
    from pusht_act.demos.features import FEATURES
    from pusht_act.demos.replay import replay

    seen = "observation.image" if image else "observation.environment_state"
    features = {key: dict(FEATURES[key]) for key in (seen, "observation.state", "action")}
    if image:
        features[seen]["dtype"] = "video"
    dataset = LeRobotDataset.create("local/tiny", fps=10, features=features, root=root, use_videos=image)
    for demonstration, length in zip(builtin.load(3), (23, 31, 17), strict=True):
        episode = replay(demonstration.start, demonstration.action[:length], image=image)
        for t in range(length):
            picture = episode.image[t] if episode.image is not None else episode.environment_state[t]
            frame = {seen: picture, "observation.state": episode.observation_state[t], "action": episode.action[t]}
            dataset.add_frame(frame | {"task": "push"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def image_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeRobotDataset v3.0 with video, 71 frames in 3 episodes."""
    return _write_dataset(tmp_path_factory.mktemp("data") / "image", image=True)


@pytest.fixture(scope="session")
def keypoints_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with keypoints."""
    return _write_dataset(tmp_path_factory.mktemp("data") / "keypoints", image=False)


@pytest.fixture(scope="session")
def broken_dataset(keypoints_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keypoints data set, one frame of 71 of which is not a number; its statistics are as they were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = Path(shutil.copytree(keypoints_dataset, tmp_path_factory.mktemp("broken") / "data"))
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    index = table.schema.get_field_index("observation.state")
    values = table.column(index).to_pylist()
    values[5] = [math.nan, math.nan]
    pq.write_table(
        table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type)), path
    )
    return root
