"""What is printed can be pasted: quoted for a shell and for Hydra, and started as the present command was."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from pusht_act.config.errors import explain
from pusht_act.config.overrides import override, read_value
from pusht_act.main import CONFIG_DIR
from pusht_act.runs.commands import follow_up, follow_up_sweep, read_command, record_command, resume_command
from pusht_act.runs.run_dir import RunDir

NAMES = ["run", "a b", "ü", "o=ut", "a,b", 'sa"id', "it's", "1e3", "null", "[x]", "(x)", "x\\", "~x", " lead", "2026"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back_through_shell_and_hydra(name: str) -> None:
    program, *words = shlex.split(resume_command(Path("outputs") / name, 8))
    assert (program, words[0], words[2]) == ("pusht-act", "mode=resume", "steps=8")
    with initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        assert compose("config", words).output_dir == f"outputs/{name}"
    (_, first, second) = shlex.split(follow_up_sweep(Path(name), []))
    assert (first, read_value(second)) == ("-m", name)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: "${" not in text))
def test_any_text_is_read_back(text: str) -> None:
    assert read_value(override("output_dir", text)) == text


def test_what_needs_no_quotes_has_none() -> None:
    assert override("output_dir", "outputs/run_1") == "output_dir=outputs/run_1"
    assert resume_command(Path("r"), 3) == "pusht-act mode=resume output_dir=r steps=3"


def test_what_cannot_be_read_is_answered_with_what_can() -> None:
    with (
        initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR),
        pytest.raises(Exception, match="LexerNo") as error,
    ):
        compose("config", ["output_dir=ünder way"])
    said = explain(error.value, CONFIG_DIR)
    assert said.endswith(f"give {shlex.quote(override('output_dir', 'ünder way'))}")


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_after_torchrun_a_training_is_started_by_torchrun(torchrun: pytest.MonkeyPatch) -> None:
    assert resume_command(Path("r"), 3) == (
        "torchrun --standalone --nproc-per-node 4 --no-python pusht-act mode=resume output_dir=r steps=3"
    )
    assert follow_up(["mode=eval", "checkpoint=r"]) == "pusht-act mode=eval checkpoint=r"
    assert follow_up(["-m", "seed=1,2"]) == "pusht-act -m seed=1,2"
    torchrun.setenv("GROUP_WORLD_SIZE", "2")
    torchrun.setenv("MASTER_ADDR", "node7")
    assert resume_command(Path("r"), 3).startswith(
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node7:29500 --nproc-per-node 4 --no-python pusht-act "
    )


def test_the_program_is_named_by_its_path_where_a_shell_does_not_find_it(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(in_tmp / ".venv/bin/pusht-act")])
    monkeypatch.setenv("PATH", "/nowhere")
    assert resume_command(Path("r"), 3).startswith(".venv/bin/pusht-act mode=resume ")
    assert record_command(["steps=3"]) == "pusht-act steps=3"


def test_the_overrides_of_a_recorded_command_are_read_back() -> None:
    assert read_command("pusht-act --config-dir 'my conf' steps=3 'output_dir=\"a b\"' ~x") == [
        *("steps=3", 'output_dir="a b"', "~x")
    ]
    assert read_command("pusht-act 'unclosed") == []


@pytest.mark.parametrize(("steps", "wanted"), [(8, 8), (4, 8), (2, 8)])
def test_a_run_is_continued_to_its_end_or_to_twice_as_many_steps(steps: int, wanted: int, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (run.checkpoints / "000004" / "training_state").mkdir(parents=True)
    (run.checkpoints / "000004" / "training_state" / "training_step.json").write_text('{"step": 4}')
    (run.checkpoints / "last").symlink_to("000004")
    (tmp_path / "config.yaml").write_text(f"mode: test\nsteps: {steps}\n")
    assert run.continue_command() == f"pusht-act mode=resume output_dir={tmp_path} steps={wanted}"
