"""Bad input: one line that names the key, the value and the remedy; exit code 1; nothing written."""

import sys
from pathlib import Path

import pytest
import torch

import pusht_act
from pusht_act.config.errors import explain
from pusht_act.main import CONFIG_DIR, USER_ERRORS, main
from tests.config.refused import REFUSED
from tests.helpers.command_line import command
from tests.helpers.runs import TINY, tiny_command
from tests.helpers.sampling import some_not_slow


def line(*overrides: str) -> str:
    """What the command prints for these overrides, all of it refused."""
    with pytest.raises(USER_ERRORS) as caught:
        pusht_act.run([*overrides])
    return explain(caught.value, CONFIG_DIR)


def check(printed: str, fragments: tuple[str, ...], folder: Path) -> None:
    assert "\n" not in printed
    assert [fragment for fragment in fragments if fragment not in printed] == [], printed
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    some_not_slow([(row[0], row[1:]) for row in REFUSED], every=6),
    ids=[row[0].removeprefix(" ".join(TINY)).strip() for row in REFUSED],
)
def test_bad_input_is_refused_in_one_line(
    overrides: str,
    fragments: tuple[str, ...],
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["pusht-act", *overrides.split(" ")])
    with pytest.raises(SystemExit) as left:
        main()
    printed = left.value.code  # a text: Python then prints it on stderr and exits with 1
    assert isinstance(printed, str)
    assert printed.startswith("pusht-act: ")
    check(printed, fragments, in_tmp)
    out, err = capfd.readouterr()
    assert out == ""
    assert [text for text in err.splitlines() if " INFO " not in text] == []


def test_the_table_is_long() -> None:
    assert len({row[0] for row in REFUSED}) == len(REFUSED) >= 60


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        ("dataset=demos demos.n_episodes=3 train.mirror=0.5", "env.episode_length=0"),
        ("mode=resume demos.n_episodes=3", "env.episode_length=0"),
        ("mode=demos demos.n_episodes=3 demos.start_seed=3", "demos.replan=0"),
        ("mode=demos logging=local env=pusht_keypoints", "demos.replan=0"),
        ("wandb.enable=1 overwrite=0", "env.episode_length=0"),
    ],
)
def test_an_option_that_has_a_use_gets_past_the_checks_for_it(overrides: str, wrong: str, in_tmp: Path) -> None:
    check(line(*overrides.split(" "), wrong), (f"{wrong} is too small",), in_tmp)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu"])
def test_a_device_that_is_not_there_is_refused(device: str, in_tmp: Path) -> None:
    check(line(*TINY, f"policy.device={device}"), (f"policy.device={device}", "policy.device=cpu", "auto"), in_tmp)


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded_name_the_override(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(in_tmp.parent / "no-weights-here"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, wherever the test runs
    weights = "policy.pretrained_backbone_weights=ResNet18_Weights.IMAGENET1K_V1"
    printed = line(*TINY, "env=pusht", "dataset=demos", weights)
    check(printed, (weights, "give policy.pretrained_backbone_weights=null"), in_tmp)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pusht_act.run([*TINY, f"output_dir={tmp_path_factory.mktemp('trained') / 'run'}"]).output_dir


def test_a_run_directory_in_use_is_refused(trained: Path, in_tmp: Path) -> None:
    files = sorted(trained.rglob("*"))
    printed = line(*TINY, f"output_dir={trained}")
    check(printed, (f"output_dir={trained}", "mode=resume", "job_name=", "overwrite=true"), in_tmp)
    assert sorted(trained.rglob("*")) == files


def test_the_working_directory_is_never_moved_aside(in_tmp: Path) -> None:
    (in_tmp / "thesis.tex").touch()
    for path in (".", "..", str(in_tmp)):
        assert f"output_dir={path} is the working directory" in line(*TINY, f"output_dir={path}", "overwrite=true")
    assert (in_tmp / "thesis.tex").exists()


def test_a_finished_run_is_called_so(trained: Path, in_tmp: Path) -> None:
    said = line(*TINY, f"output_dir={trained}")
    assert f"output_dir={trained} holds a finished run of 4 steps: train it further with `pusht-act mode=resume" in said
    assert f"output_dir={trained} steps=8`" in said
    assert f"output_dir={trained} holds a finished run" not in line(*TINY, f"output_dir={trained}", "overwrite=x")


@pytest.mark.parametrize("steps", [4, 3])
def test_a_resume_at_or_past_its_end_is_refused(steps: int, trained: Path, in_tmp: Path) -> None:
    printed = line("mode=resume", f"output_dir={trained}", f"steps={steps}")
    check(printed, (f"steps={steps}", "step 4", "steps="), in_tmp)


def test_a_checkpoint_without_training_state_is_refused_on_resume_only(trained: Path, in_tmp: Path) -> None:
    model = in_tmp / "downloaded"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(trained / "checkpoints" / "last" / "pretrained_model" / name)
    printed = line("mode=resume", f"resume.path={model}", f"output_dir={in_tmp / 'run'}")
    assert "training_step.json" in printed
    assert "give a checkpoint that a training run wrote" in printed
    assert not (in_tmp / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["policy.hidden_dim=256"],
        ["policy.n_action_steps=200"],
        ["policy=act_smal"],
        ["mode=resume"],
        tiny_command("dataset=pusht_keypoints", "dataset.root=/nowhere"),
    ],
    ids=lambda overrides: overrides[-1],
)
def test_the_command_prints_one_line_and_exits_with_1(overrides: list[str], in_tmp: Path) -> None:
    done = command(*overrides, cwd=in_tmp)
    lines = [text for text in done.stderr.splitlines() if " INFO " not in text]
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pusht-act: ")
    assert done.stdout == ""
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("overrides", [["policy.hidden_dim=256"], ["policy.n_action_steps=200"]])
def test_the_traceback_is_shown_on_request(overrides: list[str], in_tmp: Path) -> None:
    done = command(*overrides, cwd=in_tmp, environment={"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_a_bad_job_of_a_sweep_ends_in_one_line(in_tmp: Path) -> None:
    done = command("-m", "steps=0,0", cwd=in_tmp)
    assert done.returncode == 1
    reason = "steps=0 is too small: give 1 or more"
    assert done.stderr.splitlines()[-1] == f"pusht-act: 2 of 2 jobs are not done (job 0: {reason})"
    assert "Traceback" not in done.stderr
