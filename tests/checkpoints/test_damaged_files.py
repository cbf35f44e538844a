"""Faults of the disk: every file of a checkpoint truncated, flipped or gone, a disk that is full or read-only."""

import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pusht_act
from pusht_act.checkpoints import checkpoint_io as checkpoints
from pusht_act.checkpoints.checkpoint import last_checkpoint
from pusht_act.checkpoints.manifest import MANIFEST, find_corruption
from pusht_act.runs.run_dir import RunDir
from pusht_act.training import train_step as step_module
from tests.helpers.runs import TINY
from tests.helpers.training import assert_same_bits, metrics

pytestmark = pytest.mark.slow


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, bit: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    bit = len(content) * 4 + 1 if bit is None else bit  # in the middle
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


FAULTS: dict[str, Callable[[Path], None]] = {"truncated": truncate, "flipped": flip, "deleted": Path.unlink}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, of steps 2 and 4."""
    return pusht_act.run([*TINY, f"output_dir={tmp_path_factory.mktemp('trained') / 'run'}", "save_freq=2"]).output_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def refusal(run: Path, *overrides: str) -> str:
    """What a resume of `run` to step 2 answers; a valid checkpoint that was found is named as being there already."""
    with pytest.raises((ValueError, OSError)) as caught:
        pusht_act.run(["mode=resume", f"output_dir={run}", "steps=2", *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_resume_takes_the_newest_valid_checkpoint(fault: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run / "checkpoints" / "000004"
    assert len(files(folder)) == 14
    for name in files(folder):
        content = (folder / name).read_bytes()
        FAULTS[fault](folder / name)
        caplog.clear()
        if name == MANIFEST and fault == "deleted":
            assert last_checkpoint(RunDir(run)).step == 4, "as valid as a checkpoint of stock LeRobot"
        else:
            assert last_checkpoint(RunDir(run)).step == 2
            (warning,) = warnings(caplog)
            assert (folder.name if name == MANIFEST else f"{folder}: {name} is ") in warning
            assert f"resuming from step 2 instead, {run}/checkpoints/000002" in warning
        (folder / name).write_bytes(content)
    FAULTS[fault](folder / "pretrained_model" / "config.json")
    assert f"{run}/checkpoints/000002 is at step 2 already" in refusal(run)


@pytest.mark.parametrize("fault", FAULTS)
def test_without_a_valid_one_the_file_is_named(fault: str, run: Path) -> None:
    folder = run / "checkpoints" / "000004"
    shutil.rmtree(run / "checkpoints" / "000002")
    for name in set(files(folder)) - {MANIFEST}:
        content = (folder / name).read_bytes()
        FAULTS[fault](folder / name)
        with pytest.raises(ValueError, match=rf"{folder}: {name} is (missing|damaged: )"):
            last_checkpoint(RunDir(run))
        (folder / name).write_bytes(content)
    FAULTS[fault](folder / "training_state" / "rng_state.safetensors")
    answer = refusal(run)
    assert f"no checkpoint in {run}/checkpoints is valid ({folder}: training_state/rng_state.safetensors is " in answer
    assert "name one elsewhere with resume.path=, or start afresh with overwrite=true" in answer


def test_every_flipped_bit_is_found(run: Path) -> None:
    folder = run / "checkpoints" / "000004"
    for name in set(files(folder)) - {MANIFEST}:
        bits = (folder / name).stat().st_size * 8
        for bit in {0, bits - 1, *range(7, bits, bits // 9)}:
            flip(folder / name, bit)
            assert find_corruption(folder) == f"{name} is damaged: its SHA-256 is not that of {MANIFEST}"
            flip(folder / name, bit)
    assert find_corruption(folder) is None


@pytest.mark.parametrize("fault", ["truncated", "deleted"])
def test_without_a_manifest_what_is_cut_short_or_gone_is_found_all_the_same(fault: str, run: Path) -> None:
    folder = run / "checkpoints" / "000004"
    (folder / MANIFEST).unlink()
    assert find_corruption(folder) is None
    for name in files(folder):
        content = (folder / name).read_bytes()
        FAULTS[fault](folder / name)
        optional = "train_config" in name or "processor" in name or "pusht_act" in name
        assert (find_corruption(folder) or "").startswith(name) or (fault == "deleted" and optional), name
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("link", ["000009", "last", None], ids=["dangling", "to itself", "missing"])
def test_a_broken_link_is_mended_by_the_next_save(link: str | None, run: Path, caplog: Any) -> None:
    last = run / "checkpoints" / "last"
    last.unlink()
    if link is not None:
        last.symlink_to(link)
    assert pusht_act.run(["mode=resume", f"output_dir={run}", "steps=5"]).step == 5
    assert f"{last} " in caplog.text
    assert "missing; resuming from step 4 instead" in caplog.text
    assert f"resuming from {run}/checkpoints/000004" in (run / "train.log").read_text()
    assert last.resolve().name == "000005"


def test_the_damaged_checkpoint_is_replaced_by_the_one_made_again(run: Path, trained: Path) -> None:
    truncate(run / "checkpoints/000004/pretrained_model/model.safetensors")
    assert pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4"]).step == 4
    assert find_corruption(run / "checkpoints/000004") is None
    assert_same_bits(trained, run)
    assert metrics(trained) == metrics(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000002", "000004", "last"]


@pytest.mark.parametrize("key", ["resume.path", "checkpoint", "+policy.pretrained_path"])
def test_a_checkpoint_that_was_named_is_never_replaced_by_another(key: str, run: Path, tmp_path: Path) -> None:
    file = run / "checkpoints/000004/pretrained_model/model.safetensors"
    flip(file)
    modes = {"resume.path": ["mode=resume"], "checkpoint": ["mode=eval"]}
    command = [*modes.get(key, TINY), f"output_dir={tmp_path / 'new'}"]
    for name in (run, run / "checkpoints/last", run / "checkpoints/000004/pretrained_model"):
        with pytest.raises(ValueError, match=f"{key.lstrip('+')}={name}: {file} is damaged: .*give another checkpoint"):
            pusht_act.run([*command, f"{key}={name}"])
    assert not (tmp_path / "new").exists()


def test_an_older_sound_checkpoint_may_be_named_where_the_last_is_damaged(run: Path, trained: Path) -> None:
    flip(run / "checkpoints/000004/training_state/rng_state.safetensors")
    pusht_act.run(["mode=resume", f"resume.path={run}/checkpoints/000002", "steps=4"])
    assert_same_bits(trained, run)


def test_an_evaluation_needs_the_model_alone(run: Path) -> None:
    flip(run / "checkpoints/000004/training_state/optimizer_state.safetensors")
    assert pusht_act.run(["mode=eval", f"checkpoint={run}", "eval.n_episodes=1", "eval.n_videos=0"]).step == 4


# A disk that takes no more.


def begin(run: Path, *overrides: str) -> None:
    pusht_act.run([*TINY, f"output_dir={run}", *overrides])


def visible(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("full_at", [{1, 2}, {4}])
def test_a_save_that_has_no_room_is_tried_again_at_the_next(
    full_at: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, real, run = 0, step_module.train_step, tmp_path / "run"

    def counted(*arguments: Any) -> Any:
        nonlocal step
        step += 1
        free = 12_345 if step in full_at else 10**12
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        return real(*arguments)

    monkeypatch.setattr(step_module, "train_step", counted)
    if 4 in full_at:
        with pytest.raises(OSError, match=r"000004 cannot be saved \(No space left on device\): 0.0 MB are free, a ch"):
            begin(run, "save_freq=1", "checkpoints.background=false")
        assert visible(run) == ["000001", "000002", "000003", "last"]
        assert warnings(caplog) == []
    else:
        begin(run, "save_freq=1", "checkpoints.background=false")
        assert visible(run) == ["000003", "000004", "last"]
        assert len(warnings(caplog)) == 2
        assert "step 1: " in warnings(caplog)[0]
        assert "0.0 MB are free, a checkpoint takes 2.4 MB" in warnings(caplog)[0]
    assert find_corruption(run / "checkpoints" / "last") is None


def test_a_file_that_is_cut_off_in_the_writing_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system refuses to let any file grow past a limit, as it does on a disk that is full or a spent quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        with pytest.raises(OSError, match=r"000006 cannot be saved \(.*File too large"):
            pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6", "save_freq=1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [warning.partition(":")[0] for warning in warnings(caplog)] == ["step 5"]
    assert visible(run) == ["000002", "000004", "last"]
    assert find_corruption(run / "checkpoints" / "last") is None
    assert pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6"]).step == 6


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A small disk of its own at `folder`; yields what mounts it again with other options."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    mount(f"size={size}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_harms_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    size = sum(path.stat().st_size for path in _tiny_checkpoint(tmp_path).rglob("*"))
    with mounted(tmp_path / "disk", str(size + size // 2 + 200_000)):
        run = tmp_path / "disk" / "run"
        monkeypatch.setattr(checkpoints, "_bytes_needed", lambda *_: 0)  # find out the hard way
        with pytest.raises(OSError, match=r"000004 cannot be saved \(.*No space left"):
            begin(run, "save_freq=1")
        assert [warning.partition(":")[0] for warning in warnings(caplog)] == ["step 2", "step 3"]
        assert visible(run) == ["000001", "last"]
        assert find_corruption(run / "checkpoints" / "last") is None
        assert len(metrics(run)) == 4


def fill(path: Path) -> None:
    """To the last byte of its disk."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert shutil.disk_usage(path.parent).free == 0


def test_a_disk_that_others_have_filled_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Full to the last byte from step 2 on, emptied at step 4: metrics.jsonl and the last checkpoint are whole."""
    step, real, filler = 0, step_module.train_step, tmp_path / "disk" / "filler"

    def filling(*arguments: Any) -> Any:
        nonlocal step
        step += 1
        if step == 2:
            fill(filler)
        if step == 4:
            filler.unlink()
        return real(*arguments)

    monkeypatch.setattr(step_module, "train_step", filling)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # train.log is on that disk too
    with mounted(tmp_path / "disk", "20m"):
        run = tmp_path / "disk" / "run"
        begin(run, "save_freq=1", "checkpoints.background=false")
        assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
        assert visible(run) == ["000001", "000004", "last"]
        assert find_corruption(run / "checkpoints" / "last") is None
    saves = [warning for warning in warnings(caplog) if "cannot be saved" in warning]
    assert [warning.partition(":")[0] for warning in saves] == ["step 2", "step 3"]


def _tiny_checkpoint(tmp_path: Path) -> Path:
    begin(tmp_path / "measured", "steps=1")
    return tmp_path / "measured" / "checkpoints" / "000001"


def test_a_read_only_folder_is_a_warning_until_the_last_step(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, aside = run / "checkpoints", run / "aside"
    folder.rename(aside)
    with mounted(folder, "50m") as mount:
        shutil.copytree(aside, folder, symlinks=True, dirs_exist_ok=True)
        mount("remount,ro")
        with pytest.raises(OSError, match=r"000006 cannot be saved \(Read-only file system\)"):
            pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6", "save_freq=1"])
        assert [warning.partition(":")[0] for warning in warnings(caplog)] == ["step 5"]
        assert find_corruption(folder / "last") is None


def test_a_read_only_run_directory_is_refused_at_once(run: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "50m") as mount:
        shutil.copytree(run, tmp_path / "disk" / "run", symlinks=True)
        mount("remount,ro")
        with pytest.raises(
            OSError, match=r"output_dir=.*/disk/run cannot be written to \(Read-only file system\): make"
        ):
            pusht_act.run(["mode=resume", f"output_dir={tmp_path}/disk/run", "steps=6"])


def test_a_file_in_place_of_the_folder_is_a_warning_until_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, real = tmp_path / "run", step_module.train_step

    def with_a_file(*arguments: Any) -> Any:
        (run / "checkpoints").touch()
        return real(*arguments)

    monkeypatch.setattr(step_module, "train_step", with_a_file)
    with pytest.raises(OSError, match=r"000002 cannot be saved \(File exists\).*see that the folder can be written to"):
        begin(run, "save_freq=1", "steps=2")
    assert [warning.partition(":")[0] for warning in warnings(caplog)] == ["step 1"]
    assert os.path.lexists(run / "checkpoints")
