"""Which checkpoints stay: checkpoints.keep_last and keep_every, best and last always, whole ones at every moment."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pusht_act
from pusht_act.checkpoints.manifest import find_corruption
from pusht_act.checkpoints.retention import prune, remove_temp_files, resolve_pointer, set_pointer
from pusht_act.config.schema import CheckpointsConfig
from pusht_act.job import Result
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.atomic import remove_dir

Tiny = Callable[..., Result]


def fake(path: Path, *steps: int, last: int, best: int | None = None) -> RunDir:
    run = RunDir(path)
    for step in steps:
        (run.checkpoints / f"{step:06d}" / "pretrained_model").mkdir(parents=True)
    set_pointer(run, "last", f"{last:06d}")
    if best is not None:
        set_pointer(run, "best", f"{best:06d}")
    return run


def steps_of(run: RunDir) -> list[int]:
    assert not list(run.checkpoints.glob(".*"))
    return sorted(int(path.name) for path in run.checkpoints.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (0, 0, [10, 20, 30, 40, 50, 60]),
        (1, 0, [20, 50, 60]),
        (2, 0, [20, 40, 50, 60]),
        (1, 30, [20, 30, 50, 60]),
        (9, 0, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_what_stays(keep_last: int, keep_every: int, kept: list[int], tmp_path: Path) -> None:
    """60 lies past `last`: what a resume from an earlier step has not come to again is nobody's to remove."""
    run = fake(tmp_path, 10, 20, 30, 40, 50, 60, last=50, best=20)
    prune(run, CheckpointsConfig(keep_last, keep_every))
    assert steps_of(run) == kept


def test_nothing_goes_where_last_points_nowhere(tmp_path: Path) -> None:
    for target in ("000099", "last", "../elsewhere", None):
        run = fake(tmp_path / str(target).replace("/", ""), 10, 20, last=20)
        (run.checkpoints / "last").unlink()
        (run.path / "elsewhere").mkdir()
        if target is not None:
            (run.checkpoints / "last").symlink_to(target)
        assert resolve_pointer(run, "last") is None
        prune(run, CheckpointsConfig(1, 0))
        assert steps_of(run) == [10, 20]


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    run = fake(tmp_path, 995_000, 1_000_000, last=1_000_000)
    (run.checkpoints / "0005000").mkdir()
    prune(run, CheckpointsConfig(2, 0))
    assert steps_of(run) == [995_000, 1_000_000]


def test_a_removal_that_is_killed_leaves_a_hidden_folder_which_the_next_save_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake(tmp_path, 10, 20, last=20)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_dir(run.checkpoints / "000010")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [".000010.old", "000020", "last"]
    for name in (".000030.part", ".000007.old"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / ".last.new").symlink_to("000010")
    (run.checkpoints / ".mine").touch()
    remove_temp_files(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [".mine", "000020", "last"]


def test_what_cannot_be_removed_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    run = fake(tmp_path, 10, 20, last=20)

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    prune(run, CheckpointsConfig(1, 0))
    assert f"{run.checkpoints}/000010 cannot be removed (Permission denied): it stays" in caplog.text
    assert steps_of(run) == [10, 20]


def test_a_link_always_points_somewhere(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("000001", "000002"):
        (run.checkpoints / name).mkdir(parents=True)
        set_pointer(run, "last", name)
        assert (run.checkpoints / "last").resolve().name == name


@pytest.mark.slow
def test_a_run_keeps_what_it_is_told_to(tiny: Tiny) -> None:
    run = RunDir(tiny("steps=7", "save_freq=1", "checkpoints.keep_last=2", "checkpoints.keep_every=3").output_dir)
    assert steps_of(run) == [3, 6, 7]
    assert all(find_corruption(run.checkpoints / f"{step:06d}") is None for step in steps_of(run))
    pusht_act.run(["mode=resume", f"output_dir={run.path}", "steps=9"])
    assert steps_of(run) == [3, 6, 8, 9], "the checkpoint's own options hold"
    pusht_act.run(["mode=resume", f"output_dir={run.path}", "steps=10", "checkpoints.keep_last=1"])
    assert steps_of(run) == [3, 6, 9, 10]


@pytest.mark.slow
def test_the_best_stays_also_where_no_save_was_due(tiny: Tiny) -> None:
    options = ("eval_freq=1", "save_freq=2", "env.episode_length=40", "policy.optimizer_lr=1e-2")
    run = RunDir(tiny("steps=8", *options, "checkpoints.keep_last=1").output_dir)
    best, last = resolve_pointer(run, "best"), resolve_pointer(run, "last")
    assert best is not None
    assert last is not None
    assert steps_of(run) == sorted({int(best.name), 8})
    assert find_corruption(best) is None


def test_a_save_that_was_killed_while_pruning_is_gone_on_from(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny("save_freq=1", "checkpoints.keep_last=1")
    run = RunDir(tmp_path / "run")
    assert [path.name for path in run.checkpoints.glob(".*")] == [".000001.old"]
    assert pusht_act.run(["mode=resume", f"output_dir={run.path}", "steps=4"]).step == 4
    assert steps_of(run) == [4]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
