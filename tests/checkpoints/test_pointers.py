"""A run travels: `last` and `best` are links, or files or whole checkpoints where a copy or a file system has none."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pusht_act
from pusht_act.checkpoints.checkpoint import find_checkpoint, last_checkpoint
from pusht_act.checkpoints.retention import resolve_pointer, set_pointer
from pusht_act.job import Result
from pusht_act.runs.run_dir import RunDir, follow
from pusht_act.runtime.lock import locked
from pusht_act.sweeps.status import read_progress
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits

Tiny = Callable[..., Result]


def without_links(run: Path) -> None:
    """What git and some archives make of links."""
    for link in [path for path in run.rglob("*") if path.is_symlink()]:
        name = link.readlink().name
        link.unlink()
        link.write_text(name)


def only_copies(run: Path) -> None:
    """A run of which `last` and `best` alone were copied, as folders."""
    for path in run.glob("checkpoints/0*"):
        shutil.rmtree(path)


TRAVELS: dict[str, Callable[[Path], None]] = {
    "as it was": lambda _: None,
    "links followed": lambda _: None,
    "links as files": without_links,
    "only last and best": only_copies,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, to be continued to 6."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    pusht_act.run(tiny_command(f"output_dir={run}", "save_freq=2", "eval_freq=4", "checkpoints.keep_last=1"))
    return run


@pytest.fixture(scope="module")
def whole(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(stopped, tmp_path_factory.mktemp("whole") / "run", symlinks=True)
    return pusht_act.run(["mode=resume", f"output_dir={copy}", "steps=6"]).output_dir


@pytest.fixture(params=TRAVELS)
def travelled(request: pytest.FixtureRequest, stopped: Path, tmp_path: Path) -> Path:
    is_link_kept = request.param in ("as it was", "links as files")
    run = Path(shutil.copytree(stopped, tmp_path / "copy", symlinks=is_link_kept))
    TRAVELS[request.param](run)
    return run


@pytest.mark.slow
def test_a_copied_run_is_found_and_resumed_to_the_same_bits(travelled: Path, whole: Path) -> None:
    for name in (travelled, travelled / "checkpoints" / "last", travelled / "checkpoints" / "best"):
        assert find_checkpoint(str(name), "checkpoint").step == 4
    assert read_progress(travelled).step == 4
    pusht_act.run(["mode=resume", f"output_dir={travelled}", "steps=6"])
    run = RunDir(travelled)
    assert last_checkpoint(run).step == 6
    assert (resolve_pointer(run, "last"), resolve_pointer(run, "best")) == (
        run.checkpoints / "000006",
        resolve_pointer(RunDir(travelled), "best"),
    )
    assert_same_bits(whole, travelled)
    assert not list(run.checkpoints.glob(".*"))
    assert {path.name for path in run.checkpoints.iterdir() if path.is_symlink()} >= {"last"}


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EPERM])
def test_a_run_needs_no_links(code: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(os, "link", refused)
    run = tmp_path / "run"
    pusht_act.run(tiny_command(f"output_dir={run}", "save_freq=2", "eval_freq=4", "checkpoints.keep_last=1"))
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=6"])
    assert (run / "checkpoints" / "last").read_text() == "000006"
    assert_same_bits(whole, _with_links(run, tmp_path))


def _with_links(run: Path, folder: Path) -> Path:
    """A copy whose `last` the helper that compares can walk into."""
    copy = Path(shutil.copytree(run, folder / "with_links"))
    (copy / "checkpoints" / "last").unlink()
    shutil.copytree(copy / "checkpoints" / "000006", copy / "checkpoints" / "last")
    return copy


@pytest.mark.parametrize("content", [b"", b"..", b"/etc", b"000003/../..", b"\xff\xfe", b"x" * 100])
def test_a_file_that_names_no_step_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    (run.checkpoints / "last").write_bytes(content)
    assert follow(run.checkpoints / "last") is None
    with pytest.raises(ValueError, match=r"no checkpoint in .* is valid \(.*/last names no checkpoint\)"):
        last_checkpoint(run)


def test_a_fifo_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last")
    assert follow(tmp_path / "last") is None


def test_the_only_copy_of_a_checkpoint_is_kept_when_another_one_becomes_the_last(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for folder, step in (("last", 3), ("000005", 5)):
        (run.checkpoints / folder / "training_state").mkdir(parents=True)
        (run.checkpoints / folder / "training_state" / "training_step.json").write_text(f'{{"step": {step}}}')
    set_pointer(run, "last", "000005")
    assert (run.checkpoints / "last").readlink() == Path("000005")
    assert (run.checkpoints / "000003" / "training_state").is_dir()


def test_a_lock_without_hard_links_keeps_a_second_process_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    with locked(tmp_path), pytest.raises(FileExistsError, match=f"process {os.getpid()} "), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
