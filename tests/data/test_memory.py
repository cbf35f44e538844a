"""Memory while a data set is made and opened: it does not grow with the data set."""

import io
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.envs.configs import PushtEnv
from PIL import Image

from benchmarks.measure import PeakMemory
from pusht_act.data import cache as cache_module
from pusht_act.data.builtin_demos import open_builtin_demos
from pusht_act.data.cache import Allocate, BuiltDataset, load_or_build
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.loader import BatchLoader
from tests.helpers.dataset_config import config

ROOM_MB = 200
"""How much more memory a large data set may take than a small one; its images in float64 take several times that."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "cache"))
    yield
    # Hundreds of megabytes, which pytest would keep for three sessions.
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.mark.slow
def test_rendering_takes_no_more_memory_for_more_demonstrations() -> None:
    used = {}
    for count in (4, 30):  # each with two workers
        with PeakMemory() as memory:
            frames = open_builtin_demos(count, PushtEnv(obs_type="pixels_agent_pos"))
        used[count] = memory.process_mb + memory.workers_mb
    assert frames.arrays["observation.image"].nbytes * 8 > 2 * ROOM_MB * 1e6
    assert used[30] < used[4] + ROOM_MB


def write_pictures(root: Path, frames: int) -> None:
    """Write a LeRobotDataset with PNG files in its parquet file, 27 kB each: ten pictures of noise in turn."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 96, 96, 3), np.uint8)
    files = []
    for image in noise:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=0)
        files.append({"bytes": file.getvalue(), "path": None})
    (root / "data").mkdir(parents=True)
    (root / "meta" / "episodes").mkdir(parents=True)
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fields = {
        "observation.image": struct,
        "action": pa.list_(pa.float32()),
        "index": pa.int64(),
        "episode_index": pa.int64(),
        "timestamp": pa.float32(),
    }
    # Row groups of 100 frames, as LeRobot writes one for each episode.
    with pq.ParquetWriter(root / "data" / "file-000.parquet", pa.schema(fields)) as writer:
        for start in range(0, frames, 100):
            numbers = [*range(start, start + 100)]
            rows = {
                "observation.image": [files[i % 10] for i in numbers],
                "action": [[i, i] for i in numbers],
                "index": numbers,
                "episode_index": [0] * 100,
                "timestamp": [i / 10 for i in numbers],
            }
            writer.write_table(pa.table(rows, schema=pa.schema(fields)))
    episodes = pa.table({"dataset_from_index": [0], "dataset_to_index": [frames], "tasks": [["push"]]})
    pq.write_table(episodes, root / "meta" / "episodes" / "file-000.parquet")
    features = {
        "observation.image": {"dtype": "image", "shape": [96, 96, 3], "names": ["height", "width", "channel"]},
        "action": {"dtype": "float32", "shape": [2], "names": None},
    }
    info = {"codebase_version": "v3.0", "features": features, "total_frames": frames, "total_episodes": 1, "fps": 10}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "stats.json").write_text("{}")


@pytest.mark.slow
def test_pictures_in_parquet_files_are_decoded_some_at_a_time(tmp_path: Path) -> None:
    used = {}
    for frames in (600, 8000):
        write_pictures(tmp_path / str(frames), frames)
        with PeakMemory() as memory:
            opened = open_lerobot_dataset(config(tmp_path / str(frames)))
        used[frames] = memory.process_mb
    assert used[8000] < used[600] + ROOM_MB
    noise = np.random.default_rng(0).integers(0, 256, (10, 96, 96, 3), np.uint8).transpose(0, 3, 1, 2)
    assert len(opened) == 8000
    for i in (0, 499, 500, 7999):
        assert np.array_equal(opened.arrays["observation.image"][i], noise[i % 10])
    assert np.array_equal(opened.arrays["action"][:, 0], np.arange(8000))


def count_to(number: int) -> cache_module.FrameDataset:
    def build(allocate: Allocate) -> BuiltDataset:
        action = allocate(f"counting to {number:,}", {"action": ((number, 2), "float32")})["action"]
        action[:] = np.arange(number)[:, None]
        return BuiltDataset(np.array([[0, number]]), ["push"], {"action": {"dtype": "float32"}}, {}, fps=10)

    return load_or_build("me/data", str(number), build)


def test_a_data_set_larger_than_the_memory_opens(tmp_path: Path) -> None:
    """Without a warning of PyTorch's, which does not like maps that are read only."""
    count_to(10)
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("MemTotal", "SwapTotal")))
    folder = tmp_path / "cache" / "10-v2"
    # A file with a hole, which takes no room on the disk.
    rows = 2 * total // 8
    large = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        folder / "action.npy", "w+", np.dtype("float32"), (rows, 2)
    )
    large[:10] = 7
    frames = cache_module._load("me/data", folder)
    assert frames.arrays["action"].nbytes > total
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = BatchLoader(frames, 3, "cpu").batch(torch.tensor([0, 5]))
    assert torch.equal(batch["action"], torch.full((2, 3, 2), 7.0))


def test_the_size_on_disk_is_said_first(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level("INFO"):
        open_builtin_demos(1, PushtEnv(obs_type="environment_state_agent_pos"))
        count_to(1_000_000)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("replaying 1 built-in demonstrations, ")
    assert f" frames: 0.0 MB in {tmp_path / 'cache' / 'demos-'}" in first
    assert second == f"counting to 1,000,000: 8.0 MB in {tmp_path / 'cache' / '1000000-v2'}"


def test_a_disk_without_room_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7_900_000))
    with pytest.raises(OSError, match="counting to 1,000,000: 8.0 MB do not fit in .*cache, which has 7.9 MB free: "):
        count_to(1_000_000)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert "counting" not in caplog.text


class Terminal(io.StringIO):
    """An output that shows progress bars."""

    def isatty(self) -> bool:
        return True


def test_a_bar_shows_all_that_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BAR_DELAY_S", 0)
    seen = []
    for _ in range(2):
        monkeypatch.setattr("sys.stderr", terminal := Terminal())
        open_builtin_demos(2, PushtEnv(obs_type="environment_state_agent_pos"))
        lines = [line for line in terminal.getvalue().replace("\r", "\n").splitlines() if "100%" in line]
        seen.append([line.partition(":")[0] for line in lines])
    assert seen == [["replaying", "writing"], ["checking"]]
