"""resume.auto=true: the same command again resumes, whatever stopped the one before; another one is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import pusht_act
from pusht_act.checkpoints.resume import RESULT_NEUTRAL_KEYS, _differences, describe_restart
from pusht_act.config.validation import to_config
from pusht_act.evaluation.evaluate import evaluate
from pusht_act.evaluation.records import Evaluation
from pusht_act.job import Result
from pusht_act.runs.run_dir import RunDir
from pusht_act.training import async_evaluation as evaluations
from pusht_act.training import train_step as step_module
from tests.helpers.commands import Commands, appears
from tests.helpers.runs import TINY, tiny_command
from tests.helpers.training import assert_same_bits, metrics

Tiny = Callable[..., Result]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    return pusht_act.run([*TINY, "save_freq=2", f"output_dir={run}"]).output_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def again(run: Path, *overrides: str) -> Result:
    return pusht_act.run(tiny_command("save_freq=2", "resume.auto=true", f"output_dir={run}", *overrides))


@pytest.mark.slow
def test_it_begins_where_there_is_nothing(tmp_path: Path) -> None:
    for name, left in (("absent", []), ("empty", []), ("killed", ["lock", ".config.yaml.part"])):
        run = tmp_path / name
        if name != "absent":
            run.mkdir()
        for file in left:
            (run / file).write_text("")
            os.utime(run / file, (0, 0))
        assert again(run, "steps=1").step == 1


def test_it_begins_again_where_there_is_no_checkpoint_yet(finished: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    assert again(copy).step == 4
    assert_same_bits(finished, copy)
    assert metrics(copy) == metrics(finished)
    assert not copy.with_name("run.old-1").exists()


def test_it_goes_on_to_the_same_bits_and_to_more_steps(
    finished: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(copy / "checkpoints/000004")
    shutil.rmtree(copy / "eval", ignore_errors=True)
    assert again(copy, "checkpoints.keep_last=2", "log_freq=1", "eval.workers=1").step == 4
    assert f"resuming from {copy}/checkpoints/000002" in caplog.text
    assert_same_bits(finished, copy)
    assert metrics(copy) == metrics(finished)
    assert again(copy, "steps=6").step == 6
    assert [line["step"] for line in metrics(copy)] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_passed_over(finished: Path, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "checkpoints/000004/training_state/optimizer_state.safetensors").write_bytes(b"")
    assert again(copy).step == 4
    assert "resuming from step 2 instead" in caplog.text
    assert_same_bits(finished, copy)


def test_a_finished_run_is_left_as_it_is(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()}
    result = again(copy)
    assert f"{copy} is finished: step 4; give more steps= to continue" in caplog.text
    assert (result.step, result.checkpoint) == (4, copy / "checkpoints/000004")
    assert result.metrics["loss"] == metrics(copy)[-1]["train/loss"]
    assert again(copy, "steps=3").step == 4
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("section", ["cluster", "status", "train"])
def test_a_section_younger_than_the_run_makes_no_difference(section: str, finished: Path) -> None:
    """Its defaults are what was done before."""
    begun = json.loads((finished / "checkpoints/last/pretrained_model/pusht_act.json").read_text())["config"]
    config = to_config(OmegaConf.create(begun))
    assert begun.pop(section)
    assert list(_differences(begun, config, RESULT_NEUTRAL_KEYS)) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.kl_weight=1"], "policy.kl_weight: was 10, now 1"),
        (["+policy.dropout=0.2"], "policy.dropout: was 0.1, now 0.2"),
        (["seed=3", "batch_size=8"], "batch_size: was 4, now 8; seed: was 1000, now 3"),
        (["+optimizer.eps=1e-6"], "optimizer.eps: was None, now 1e-06"),
    ],
)
def test_another_configuration_is_refused_or_moves_it_aside(overrides: list[str], said: str, copy: Path) -> None:
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match="holds another run, so resume.auto=true cannot resume it") as caught:
        again(copy, *overrides)
    assert f"({said})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(copy.rglob("*")) == before
    assert again(copy, *overrides, "overwrite=true", "steps=1").step == 1
    assert (copy.with_name("run.old-1") / "checkpoints/000004").is_dir()


def test_what_is_not_its_own_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is in use"):
        again(tmp_path / "thesis")
    (copy / "checkpoints/last/pretrained_model/pusht_act.json").unlink()
    (copy / "checkpoints/last/manifest.json").unlink()
    with pytest.raises(ValueError, match="was not written by this project.*use mode=resume"):
        again(copy, "steps=6")


def test_it_goes_on_after_mode_resume_if_the_configuration_is_the_same(copy: Path) -> None:
    pusht_act.run(["mode=resume", f"output_dir={copy}", "steps=5"])
    assert again(copy, "steps=6").step == 6
    pusht_act.run(["mode=resume", f"output_dir={copy}", "steps=7", "policy.optimizer_lr=1e-3"])
    with pytest.raises(ValueError, match="holds another run.*policy.optimizer_lr: was 0.001, now"):
        again(copy, "steps=8")


def _bug(*_: Any) -> None:
    raise KeyError("x")


@pytest.fixture
def broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run whose first step failed."""

    def fail(*_: Any) -> None:
        raise OSError("no room on the device")

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "train_step", fail)
        with pytest.raises(OSError, match="no room"):
            pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}"))
    return tmp_path / "run"


@pytest.mark.parametrize("option", ["resume.auto=true", "overwrite=true"])
def test_a_run_that_failed_before_its_first_checkpoint_is_told_what_works(option: str, broken_off: Path) -> None:
    command = tiny_command(f"output_dir={broken_off}")
    with pytest.raises(FileExistsError) as in_use:
        pusht_act.run(command)
    assert "mode=resume" not in str(in_use.value)
    assert option in str(in_use.value)
    assert pusht_act.run([*command, option]).step == 4


def test_mode_resume_of_a_run_without_a_checkpoint_names_what_works(broken_off: Path) -> None:
    with pytest.raises(FileNotFoundError, match="saved no checkpoint: give the command .* again with resume.auto=true"):
        pusht_act.run(["mode=resume", f"output_dir={broken_off}"])


def test_a_branch_without_a_checkpoint_is_told_what_works(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = ["mode=resume", f"resume.path={copy}", f"output_dir={tmp_path / 'branch'}", "steps=5"]
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "train_step", _bug)
        with pytest.raises(KeyError):
            pusht_act.run(branch)
    with pytest.raises(FileExistsError, match="is in use: give another output_dir=, or .* overwrite=true"):
        pusht_act.run(branch)
    with pytest.raises(FileNotFoundError, match="saved no checkpoint: give the command .* again with overwrite=true"):
        pusht_act.run(["mode=resume", f"output_dir={tmp_path / 'branch'}"])
    assert pusht_act.run([*branch, "overwrite=true"]).step == 5


def test_what_to_do_after_a_loss_depends_on_whether_there_is_a_checkpoint(copy: Path) -> None:
    config = to_config(OmegaConf.create(RunDir(copy).configuration()))
    assert describe_restart(config, RunDir(copy)).startswith(
        "to resume from the last checkpoint: the same command with"
    )
    assert f"mode=resume output_dir={copy} steps=4" in describe_restart(config, RunDir(copy))
    shutil.rmtree(copy / "checkpoints")
    said = "no checkpoint was saved yet: give the same command again with resume.auto=true"
    assert describe_restart(config, RunDir(copy)) == said
    assert again(copy).step == 4


def test_the_log_ends_with_the_error_that_ended_the_run(broken_off: Path) -> None:
    lines = (broken_off / "train.log").read_text().splitlines()
    assert lines[-1].endswith("ERROR pusht-act: no room on the device")


def test_the_log_has_the_traceback_of_an_unexpected_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_module, "train_step", _bug)
    with pytest.raises(KeyError):
        pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}"))
    text = (tmp_path / "run" / "train.log").read_text()
    assert "ERROR an unexpected error ended the run\nTraceback (most recent call last):" in text
    assert text.endswith("KeyError: 'x'\n")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("given", ["resume.auto=true", "resume.auto=false", "resume={auto:true}"])
@pytest.mark.parametrize("mode", ["mode=resume", "mode=eval checkpoint=x", "mode=demos"])
def test_where_it_means_nothing_it_is_refused(given: str, mode: str, in_tmp: Path) -> None:
    with pytest.raises(ValueError, match="resume.auto=(True|False) is for mode=test and mode=full.*leave it out"):
        pusht_act.run([*mode.split(), given])
    assert list(in_tmp.iterdir()) == []


@pytest.mark.slow
def test_an_evaluation_that_was_cut_short_at_the_last_step_is_all_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["eval_freq=4", "eval.background=false"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    again(whole, *options)
    again(run, *options)
    state = run / "checkpoints/000004/training_state/pusht_act.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"pending": 4, "best": None}))
    (run / "checkpoints/000004/manifest.json").unlink()
    (run / "checkpoints/best").unlink()
    steps: list[int] = []

    def counted(*given: Any, **options: Any) -> Evaluation:
        steps.append(1)
        return evaluate(*given, **options)

    monkeypatch.setattr(evaluations, "evaluate", counted)
    assert again(run, *options).step == 4
    assert steps == [1]
    assert_same_bits(whole, run)
    assert metrics(run, "") == metrics(whole, "")
    assert (run / "checkpoints/best").resolve().name == "000004"
    assert json.loads(state.read_text())["pending"] == []


@pytest.mark.slow
def test_the_line_of_a_stopped_run_names_the_same_command(tmp_path: Path, commands: Commands) -> None:
    output, words = (
        tmp_path / "output",
        tiny_command("steps=100000", "resume.auto=true", f"output_dir={tmp_path / 'run'}"),
    )
    pid = commands.start(words, output)
    appears(output, "step 2/")
    os.kill(pid, 15)
    assert commands.wait(pid) == 143
    assert output.read_text().splitlines()[-1].endswith(f"to resume: pusht-act {' '.join(words)}")
