"""The cache of decoded data sets: asked for by many at once, killed as it is made, damaged on disk."""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pusht_act.data.cache import Allocate, BuiltDataset, FrameDataset, load_or_build

PROCESSES = 8
ACTIONS = np.arange(60, dtype=np.float32).reshape(30, 2)
STATS = {"action": {"mean": [29.0, 30.0]}}
forked = multiprocessing.get_context("fork")  # another start would import torch eight times


def opened(seconds: float = 0.0) -> FrameDataset:
    """The frames; each build adds a line to `builds` in the working directory, then takes `seconds`."""

    def build(allocate: Allocate) -> BuiltDataset:
        with Path("builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        action = allocate("counting to 30", {"action": (ACTIONS.shape, "float32")})["action"]
        time.sleep(seconds)
        action[:] = ACTIONS
        features = {"action": {"dtype": "float32", "shape": [2]}}
        return BuiltDataset(np.array([[0, 30]]), ["push"], features, STATS, fps=10)

    return load_or_build("me/data", "0123abcd", build)


def is_sound(frames: FrameDataset) -> bool:
    return np.array_equal(frames.arrays["action"], ACTIONS) and frames.stats == STATS and len(frames) == 30


def builds() -> int:
    return len(Path("builds").read_text().splitlines())


@pytest.fixture
def folder(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the frames will lie."""
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(in_tmp / "cache"))
    return in_tmp / "cache" / "0123abcd-v2"


def ask(barrier: object, sound: object) -> None:
    barrier.wait(300)  # type: ignore[attr-defined]
    sound.put(is_sound(opened(seconds=0.3)))  # type: ignore[attr-defined]


def ask_at_once() -> list[bool]:
    """Whether what each process got is sound."""
    barrier, sound = forked.Barrier(PROCESSES), forked.Queue()
    processes = [forked.Process(target=ask, args=(barrier, sound)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    answers = [sound.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return answers


def test_processes_that_ask_at_once_share_what_one_builds(folder: Path) -> None:
    assert ask_at_once() == [True] * PROCESSES
    assert builds() == 1
    flip(folder / "action.npy", 200, 3)
    assert ask_at_once() == [True] * PROCESSES
    assert builds() == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_build_that_was_killed_is_begun_again(folder: Path) -> None:
    process = forked.Process(target=opened, args=(60.0,))
    process.start()
    while not (folder.with_name(f".{folder.name}.part") / "action.npy").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert is_sound(opened())
    assert builds() == 2
    assert not list(folder.parent.glob("*.part"))


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["action.npy", "meta.json"])
@pytest.mark.parametrize(
    ("damage", "values"),
    [
        (cut, [(-1,), (200,), (0,)]),  # from the end on where negative
        (flip, [(byte, byte % 8) for byte in (0, 5, 60, 127, 128, 200, -1)]),
        (lose, [()]),
    ],
)
def test_damage_on_disk_is_found_at_opening_and_mended(
    name: str,
    damage: Callable[..., None],
    values: list[tuple[int, ...]],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened()
    for number, value in enumerate(values, start=2):
        path = folder / name
        size = path.stat().st_size
        caplog.clear()
        damage(path, *(v % size if v < 0 else v for v in value))
        assert is_sound(opened())
        assert builds() == number
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert f"the cached data set {folder} is damaged (" in line
        assert name in line
        assert line.endswith("building it again")
        assert is_sound(opened())
        assert builds() == number


def test_a_bit_anywhere_in_an_array_is_found(folder: Path) -> None:
    opened()
    path = folder / "action.npy"
    whole = path.read_bytes()
    for byte in range(0, len(whole), 7):
        flip(path, byte, byte % 8)
        before = builds()
        assert is_sound(opened())
        assert builds() == before + 1
        assert path.read_bytes() == whole


def test_a_disk_that_cannot_be_read_is_damage_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened()
    (folder / "action.npy").unlink()
    (folder / "action.npy").symlink_to("/proc/self/mem")  # reading its beginning is an input/output error
    assert is_sound(opened())
    assert "Input/output error" in caplog.text
