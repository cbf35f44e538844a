"""The run directory: who may use it, what is found in it, where it came from."""

import importlib.util
import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pusht_act.checkpoints.checkpoint import Checkpoint, find_checkpoint, last_checkpoint
from pusht_act.runs import provenance
from pusht_act.runs.commands import record_command
from pusht_act.runs.provenance import package_versions, write_provenance
from pusht_act.runs.run_dir import RunDir, ensure_unused, move_aside


def write_run(path: Path, *steps: int) -> Path:
    """The files by which a run's checkpoints are found; `last` is the last of `steps`."""
    for step in steps:
        folder = path / "checkpoints" / f"{step:06d}"
        (folder / "pretrained_model").mkdir(parents=True)
        (folder / "training_state").mkdir()
        (folder / "pretrained_model" / "config.json").write_text("{}")
        (folder / "training_state" / "training_step.json").write_text(json.dumps({"step": step}))
        (folder / "training_state" / "optimizer_param_groups.json").write_text("[]")
        for name in ("pretrained_model/model", "training_state/rng_state", "training_state/optimizer_state"):
            (folder / f"{name}.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (path / "checkpoints" / "last").symlink_to(f"{steps[-1]:06d}")
    return path


def test_an_absent_or_empty_directory_may_be_used(tmp_path: Path) -> None:
    ensure_unused(tmp_path / "absent", overwrite=False)
    ensure_unused(tmp_path, overwrite=False)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("run", "continue it with `pusht-act mode=resume output_dir=.* steps=2`, give another"),
        ("folder", "give another"),
        ("file", "give another"),
    ],
)
def test_a_directory_in_use_is_refused_unless_it_may_be_moved(kind: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "file":
        path.touch()
    elif kind == "run":
        write_run(path, 1)
    else:
        path.mkdir()
        (path / "thesis.tex").touch()
    with pytest.raises(
        FileExistsError, match=rf"is in use: {remedy} job_name= or output_dir=, or move .* overwrite=true"
    ):
        ensure_unused(path, overwrite=False)
    ensure_unused(path, overwrite=True)


def test_the_working_directory_and_those_above_are_never_moved(in_tmp: Path) -> None:
    (in_tmp / "work").touch()
    for path in (Path(), Path(".."), in_tmp, in_tmp.parent):
        with pytest.raises(FileExistsError, match="working directory"):
            ensure_unused(path, overwrite=True)


def test_moving_aside_keeps_every_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for step in (1, 2, 3):
        write_run(path, step)
        move_aside(path)
    assert not path.exists()
    assert [last_checkpoint(RunDir(tmp_path / f"run.old-{n}")).step for n in (1, 2, 3)] == [1, 2, 3]
    move_aside(path)  # nothing there: nothing to do
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "name",
    [
        *(".", "checkpoints/last", "checkpoints/000020", "checkpoints/last/pretrained_model"),
        *("checkpoints/000020/pretrained_model/", "checkpoints/last/pretrained_model/config.json"),
    ],
)
def test_a_checkpoint_is_found_by_every_name_it_has(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10, 20)
    found = find_checkpoint(str(run / name), "checkpoint")
    assert found.model_dir.resolve() == (run / "checkpoints" / "000020" / "pretrained_model").resolve()
    assert (found.step, found.name, found.run_dir) == (20, "000020", run.resolve())


def test_a_checkpoint_is_found_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", 10, 20)
    monkeypatch.chdir(run / "checkpoints" / "000010")
    assert find_checkpoint(".", "checkpoint").step == 10
    monkeypatch.chdir("pretrained_model")
    assert find_checkpoint(".", "checkpoint").step == 10


def test_the_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "run", 10)
    assert find_checkpoint("~/run", "checkpoint").step == 10


def test_a_model_alone_belongs_to_no_run_and_has_no_step(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = find_checkpoint(str(tmp_path), "checkpoint")
    assert found.run_dir is None
    with pytest.raises(ValueError, match=r"training_step\.json.*give a checkpoint that a training run wrote"):
        _ = found.step


@pytest.mark.parametrize("key", ["checkpoint", "resume.path"])
def test_what_is_no_checkpoint_is_named_with_its_option(key: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{key}=.*holds no checkpoint"):
        find_checkpoint(str(tmp_path), key)
    with pytest.raises(FileNotFoundError, match=rf"{key}=.*does not exist"):
        find_checkpoint(str(tmp_path / "absent"), key)


def test_nothing_to_resume_names_the_runs_beside_it(tmp_path: Path) -> None:
    write_run(tmp_path / "test", 10)
    with pytest.raises(FileNotFoundError, match=rf"nothing to resume in {tmp_path}/train; there is {tmp_path}/test"):
        last_checkpoint(RunDir(tmp_path / "train"))


def test_a_long_list_of_runs_is_cut(tmp_path: Path) -> None:
    for number in range(9):
        write_run(tmp_path / f"run{number}", 10)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/run5 and 3 more \(give output_dir=\)") as caught:
        last_checkpoint(RunDir(tmp_path / "train"))
    assert "run6" not in str(caught.value)


def test_an_evaluation_has_one_place_for_each_step_seeds_and_identity() -> None:
    places = {
        RunDir(Path("r")).evaluation(*key)
        for key in [(1, 0, 10, "a"), (2, 0, 10, "a"), (1, 10, 10, "a"), (1, 0, 20, "a"), (1, 0, 10, "b")]
    }
    assert len(places) == 5
    assert RunDir(Path("r")).evaluation(5000, 100_000, 50, "0123456789") == Path(
        "r/eval/step-005000_seeds-100000-100049_01234567"
    )


def test_provenance_is_the_configuration_and_a_line_for_each_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "a")
    write_provenance(run, {"steps": 4, "policy": {"dropout": 0.1}}, ["steps=4"])
    write_provenance(run, {"steps": 8, "policy": {"dropout": 0.1}}, ["mode=resume", "steps=8"])
    assert OmegaConf.load(run.path / "config.yaml") == {"steps": 8, "policy": {"dropout": 0.1}}
    starts = [json.loads(line) for line in (run.path / "runs.jsonl").read_text().splitlines()]
    assert [start["command"] for start in starts] == ["pusht-act steps=4", "pusht-act mode=resume steps=8"]
    assert starts[0]["versions"]["lerobot"] == version("lerobot")
    assert {"started", "git", "host", "pid"} <= starts[0].keys()


def test_a_run_directory_that_cannot_be_made_names_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output_dir=.*/file/run cannot be made .* give output_dir="):
        write_provenance(RunDir(tmp_path / "file" / "run"), {}, [])


def test_versions_hold_what_a_result_depends_on() -> None:
    versions = package_versions()
    for package in ("lerobot", "torch", "gym-pusht", "pymunk", "hydra-core"):
        assert versions[package] == version(package)
    assert versions["python"] == sys.version.partition(" ")[0]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_the_recorded_command_can_be_pasted_into_a_shell(overrides: list[str]) -> None:
    assert shlex.split(record_command(overrides)) == ["pusht-act", *overrides]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """provenance.py as a module of another folder, which may be a repository or not."""
    path = tmp_path / "repository" / "provenance.py"
    path.parent.mkdir()
    path.write_text(Path(provenance.__file__).read_text())
    spec = importlib.util.spec_from_file_location("copied_provenance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied_provenance", module)
    spec.loader.exec_module(module)
    return module


def test_the_commit_is_that_of_the_source(copy: ModuleType) -> None:
    path = Path(copy.__file__ or "")
    assert copy.git_commit() is None
    git(path.parent, "init")
    git(path.parent, "add", path.name)
    git(path.parent, "commit", "-m", "first")
    sha = git(path.parent, "rev-parse", "HEAD")
    assert copy.git_commit() == sha
    path.write_text("# changed")
    assert copy.git_commit() == f"{sha}+changes"


def test_the_commit_of_a_repository_that_we_are_merely_installed_in_is_not_ours(copy: ModuleType) -> None:
    path = Path(copy.__file__ or "")
    git(path.parent, "init")
    git(path.parent, "commit", "--allow-empty", "-m", "somebody's thesis")
    assert copy.git_commit() is None


def test_a_checkpoint_knows_its_parts() -> None:
    checkpoint = Checkpoint(Path("/r/checkpoints/000010/pretrained_model"))
    assert checkpoint.directory == Path("/r/checkpoints/000010")
    assert checkpoint.training_dir == Path("/r/checkpoints/000010/training_state")
    assert checkpoint.run_dir == Path("/r")
