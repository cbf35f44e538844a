"""Files and folders that are replaced whole or not at all."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pusht_act.runtime.atomic import fsync, new_dir, part_path, remove_dir, replace_dir, shared_file, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whatever_a_killed_write_has_left(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    part_path(path).write_text("hal")
    for text in ("one", "two"):
        write_text(path, text)
        assert path.read_text() == text
        assert names(tmp_path) == ["a.json"]


def test_writers_of_a_shared_file_have_a_temporary_name_each(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with shared_file(path) as part:
        assert part != part_path(path)
        part.write_text("one")
    with suppress(ValueError), shared_file(path) as part:
        part.write_text("tw")
        raise ValueError
    assert (path.read_text(), names(tmp_path)) == ("one", ["a"])


def test_a_folder_replaces_the_former_one_or_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for name in (".a.part", ".a.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").touch()
    for text in ("one", "two"):
        with new_dir(path) as part:
            assert names(part) == []
            (part / text).touch()
            fsync(part)
        assert (names(path), names(tmp_path)) == ([text], ["a"])
    with suppress(KeyboardInterrupt), new_dir(path) as part:
        (part / "three").touch()
        raise KeyboardInterrupt
    assert (names(path), names(tmp_path)) == (["two"], ["a"])


def test_what_cannot_be_replaced_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "one").mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        replace_dir(tmp_path / "missing", tmp_path / "a")
    assert (names(tmp_path), names(tmp_path / "a")) == (["a"], ["one"])

    def refused(*_: Any) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(PermissionError):
            remove_dir(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_a_removal_that_is_killed_leaves_a_hidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "one").mkdir(parents=True)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_dir(tmp_path / "a")
    assert names(tmp_path) == [".a.old"]
