"""Sweeps: what their jobs came to is kept, and one that was cut short is resumed by one command."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pusht_act.job import Result
from pusht_act.main import CONFIG_DIR
from pusht_act.runtime.lock import LockOwner
from pusht_act.sweeps import callback
from pusht_act.sweeps.resume import expand_resume_args
from pusht_act.sweeps.state import Job, load_jobs
from pusht_act.sweeps.table import format_jobs
from tests.helpers.commands import Commands, appears
from tests.helpers.evaluations import outcome
from tests.helpers.runs import tiny_command
from tests.helpers.sweeps import ran, states
from tests.helpers.training import assert_same_bits

Tiny = Callable[..., Result]
BEGAN = ["mode=test", "seed=1,2", "hydra/sweeper=basic"]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a sweep."""
    content = {"overrides": BEGAN, "jobs": [["mode=test", "seed=1"], ["mode=test", "seed=2"]]}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    return tmp_path


def test_a_sweep_goes_on_with_the_overrides_it_was_begun_with(begun: Path) -> None:
    there = f"hydra.sweep.dir={begun}"
    assert expand_resume_args(["-m", f"sweep.resume={begun}"]) == ["-m", *BEGAN, there]
    elsewhere = ["sweep.max_tries=9", "hydra/launcher=submitit_local"]
    assert expand_resume_args([*elsewhere, "--multirun", f"sweep.resume={begun}"]) == ["-m", *BEGAN, *elsewhere, there]
    assert expand_resume_args(["-m", "seed=1,2", f"sweep.resume={begun}"]) == ["-m", *BEGAN, there], (
        "in the order of then"
    )


def test_it_goes_on_with_its_launcher_unless_another_is_given(begun: Path) -> None:
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "sweep.max_tries=9"]
    content = json.loads((begun / "sweep.json").read_text())
    (begun / "sweep.json").write_text(json.dumps({**content, "overrides": [*BEGAN, *launcher]}))
    there = f"hydra.sweep.dir={begun}"
    assert expand_resume_args(["-m", f"sweep.resume={begun}"]) == ["-m", *BEGAN, *launcher, there]
    other = ["sweep.max_tries=2", "hydra.launcher.partition=cpu"]
    assert expand_resume_args(["-m", *other, f"sweep.resume={begun}"]) == ["-m", *BEGAN, launcher[0], *other, there]
    assert expand_resume_args(["-m", *BEGAN, there]) == ["-m", *BEGAN, there], "elsewhere is no other sweep"


def test_the_same_command_goes_on_too(begun: Path) -> None:
    hydras_among_them = ["-m", "mode=test", "hydra/sweeper=basic", f"hydra.sweep.dir={begun}", "seed=1,2"]
    assert expand_resume_args(hydras_among_them) == hydras_among_them


@pytest.mark.parametrize("argv", [["mode=test"], ["-m", "seed=1,2"], ["-m", "seed=1,2", "hydra.sweep.dir=/nowhere"]])
def test_other_commands_are_left_alone(argv: list[str]) -> None:
    assert expand_resume_args(argv) == argv


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sweep.resume=DIR"], "sweep.resume=DIR resumes a sweep: give -m too"),
        (["-m", "sweep.resume=DIR/0"], "sweep.resume=DIR/0 holds no sweep (no sweep.json): give a folder such as"),
        (["-m", "sweep.resume=DIR", "seed=3"], "seed=3: the sweep in DIR is resumed as it was started; leave it out"),
        (["-m", "hydra.sweep.dir=DIR", "mode=test", "seed=1,2,3", "hydra/sweeper=basic"],
         "hydra.sweep.dir=DIR holds another sweep (was seed=1,2, now seed=1,2,3): give the same overrides"),
        (["-m", "hydra.sweep.dir=DIR", "mode=test", "hydra/sweeper=basic"], "(was seed=1,2, now without that)"),
        (["-m", "hydra.sweep.dir=DIR", "seed=1,2", "mode=test", "hydra/sweeper=basic"], "(in order)"),
    ],
)  # fmt: skip
def test_another_sweep_is_refused_with_what_differs(argv: list[str], said: str, begun: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        expand_resume_args([each.replace("DIR", str(begun)) for each in argv])
    assert said.replace("DIR", str(begun)) in str(caught.value)


@pytest.mark.slow
def test_options_that_its_mode_refuses_by_now_are_left_out(tiny: Tiny, tmp_path: Path, commands: Commands) -> None:
    run = tiny("steps=1").output_dir
    typed = ["mode=eval", f"checkpoint={run}", "dataset=demos", "seed=3", "policy.optimizer_lr=0.1", "eval.n_videos=0"]
    grid = [[*typed, f"eval.n_episodes={n}"] for n in (1, 2)]
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    content = {"overrides": [*typed, "eval.n_episodes=1,2", "hydra/launcher=basic"], "jobs": grid}
    (sweep / "sweep.json").write_text(json.dumps(content))
    output = tmp_path / "output"
    assert commands.run(["-m", f"sweep.resume={sweep}"], output) == 0, output.read_text()
    said = [line for line in output.read_text().splitlines() if "left out" in line]
    assert len(said) == 1
    assert said[0].endswith(": seed=3 policy.optimizer_lr=0.1")
    assert [each.state for each in load_jobs(sweep)] == ["done", "done"]


def test_a_damaged_identity_is_named(begun: Path) -> None:
    (begun / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="sweep.json is damaged"):
        expand_resume_args(["-m", f"sweep.resume={begun}"])


def test_a_job_whose_process_is_gone_was_interrupted(begun: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import json, dataclasses, pusht_act.runtime.lock as l; "
         "print(json.dumps(dataclasses.asdict(l.LockOwner())))"],
        capture_output=True, check=True,
    )  # fmt: skip
    (begun / "jobs").mkdir()
    for number, holder in enumerate((json.loads(ended.stdout), asdict(LockOwner()))):
        content = asdict(Job(number, [f"seed={number + 1}"], "running", 1, holder=holder))
        (begun / "jobs" / f"{number}.json").write_text(json.dumps(content))
    assert [each.state for each in load_jobs(begun)] == ["interrupted", "running"]
    (begun / "jobs" / "1.json").unlink()
    assert [each.state for each in load_jobs(begun)] == ["interrupted", "waiting"]
    head, separator, *rows = ([cell.strip() for cell in line.split("|")] for line in format_jobs(load_jobs(begun)))
    assert (head[-2], separator[-2], separator[1]) == ("overrides", "---", "--:")
    assert [row[-2] for row in rows] == ["seed=1", "mode=test seed=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "grid"),
    [(signal.SIGKILL, ["sweep=seeds", "hydra.sweeper.params.seed='1,2,3'"]), (signal.SIGTERM, ["seed=1,2,3"])],
    ids=["KILL", "TERM"],
)
def test_a_sweep_that_was_cut_short_comes_to_the_same_bits(
    number: signal.Signals, grid: list[str], commands: Commands, tmp_path: Path
) -> None:
    command = ["-m", *tiny_command("steps=40", "save_freq=2", "eval_freq=20", *grid)]
    whole, cut, output = tmp_path / "whole", tmp_path / "cut", tmp_path / "output"
    assert commands.run([*command, f"hydra.sweep.dir={whole}"], output) == 0, output.read_text()
    assert states(output.read_text()) == [["0", "done", "1"], ["1", "done", "1"], ["2", "done", "1"]]

    pid = commands.start([*command, f"hydra.sweep.dir={cut}"], output)
    appears(output, "#1 :")
    appears(cut / "1" / "metrics.jsonl", '"step": 8,')
    os.kill(pid, number)
    assert commands.wait(pid) == (-number if number == signal.SIGKILL else 128 + number)
    assert [each.state for each in load_jobs(cut)] == ["done", "interrupted", "waiting"]
    if number == signal.SIGTERM:
        printed = output.read_text()
        assert states(printed) == [["0", "done", "1"], ["1", "interrupted", "1"], ["2", "waiting", "0"]]
        assert f"to resume: pusht-act -m sweep.resume={cut}" in printed

    assert commands.run(["-m", f"sweep.resume={cut}"], output) == 0, output.read_text()
    assert states(output.read_text()) == [["0", "done", "1"], ["1", "done", "2"], ["2", "done", "1"]]
    assert [ran(cut / job) for job in "012"] == [1, 2, 1]
    assert re.search(r"resuming from \S+/1/checkpoints/0000\d\d", output.read_text())
    for job in "012":
        assert_same_bits(whole / job, cut / job)
        assert outcome(whole / job) == outcome(cut / job)


@pytest.mark.slow
def test_a_job_that_fails_stops_no_other_and_is_tried_again_so_often(commands: Commands, tmp_path: Path) -> None:
    folder, output = tmp_path / "sweep", tmp_path / "output"
    command = ["-m", *tiny_command("policy.n_heads=3,4"), "sweep.max_tries=2", f"hydra.sweep.dir={folder}"]
    for tries in (1, 2, 2):
        assert commands.run(command, output) == 1
        printed = output.read_text()
        assert states(printed) == [["0", "failed", str(tries)], ["1", "done", "1"]]
        assert "job 0 failed: policy.dim_model=32 is not a multiple of policy.n_heads=3" in printed
        last = printed.splitlines()[-1]
        assert last.startswith("pusht-act: 1 of 2 jobs are not done (job 0: policy.dim_model=32 is not a multiple")
        assert "Traceback" not in printed
    assert "job 0 is left alone, it failed 2 times (sweep.max_tries)" in printed
    assert commands.run(["-m", f"sweep.resume={folder}", "sweep.max_tries=3"], output) == 1
    assert states(output.read_text())[0] == ["0", "failed", "3"]
    assert ran(folder / "1") == 1


def test_the_script_for_slurm_is_shown_and_nothing_is_written(commands: Commands, tmp_path: Path) -> None:
    output, sweep_dir = tmp_path / "output", tmp_path / "sweep"
    command = ["-m", "seed=1,2,3", "cluster.dry_run=true", f"hydra.sweep.dir={sweep_dir}"]
    asked_for = ["hydra.launcher.partition=gpu", "hydra.launcher.mem_gb=7", "hydra.launcher.array_parallelism=2"]
    setup = "hydra.launcher.setup=['module load cuda']"
    assert commands.run([*command, "cluster=slurm", *asked_for, setup], output) == 0, output.read_text()
    script = output.read_text()
    lines = ["--array=0-2%2", "--partition=gpu", "--mem=7GB", "--signal=USR2@120", "--time=720", "--job-name=act_pusht"]
    assert {f"#SBATCH {line}" for line in lines} <= set(script.splitlines())
    assert script.index("\nmodule load cuda\n") < script.index("\nsrun ")
    assert commands.run([*command, "cluster=slurm", "seed=1"], output) == 0
    assert "--array" not in output.read_text()
    assert not sweep_dir.exists()
    assert commands.run(command, output) == 1
    said = "pusht-act: cluster.dry_run=true shows what SLURM would be given, not BasicLauncher: give cluster=slurm"
    assert output.read_text().splitlines()[-1] == said
    assert commands.run(["seed=1", "cluster=slurm", "cluster.dry_run=true"], output) == 1
    assert output.read_text() == "pusht-act: cluster.dry_run=true shows the script of a sweep: give -m too\n"


@pytest.mark.slow
def test_a_preset_that_was_edited_since_is_refused(commands: Commands, tmp_path: Path) -> None:
    folder, output = tmp_path / "sweep", tmp_path / "output"
    command = ["-m", "sweep=seeds", "print_lerobot_command=true", f"hydra.sweep.dir={folder}"]
    assert commands.run(command, output) == 0, output.read_text()
    identity = json.loads((folder / "sweep.json").read_text())
    assert [job[0] for job in identity["jobs"]] == ["seed=1", "seed=2", "seed=3", "seed=4", "seed=5"]
    assert commands.run(["-m", f"sweep.resume={folder}", "sweep.max_tries=9"], output) == 0, output.read_text()
    identity["jobs"][2][0] = "seed=7"
    (folder / "sweep.json").write_text(json.dumps(identity))
    assert commands.run(["-m", f"sweep.resume={folder}"], output) == 1
    assert output.read_text().splitlines()[-1] == (
        f"pusht-act: job 2 of the sweep in {folder} was seed=7, now seed=3: "
        "conf/ has changed since; start another sweep"
    )


@pytest.mark.parametrize("preset", sorted(path.stem for path in (Path(CONFIG_DIR) / "sweep").glob("*.yaml")))
def test_every_preset_is_a_sweep(preset: str) -> None:
    """Its keys are there, each with several values; the command line replaces one, and `sweep.` keeps its options."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        cfg = hydra.compose("config", [f"sweep={preset}", "sweep.max_tries=2"], return_hydra_config=True)
        params = cfg.hydra.sweeper.params
        assert (cfg.sweep.max_tries, len(params) > 0) == (2, True)
        overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
        assert all(override.is_sweep_override() for override in overrides)
        assert preset.startswith("optuna") == ("Optuna" in cfg.hydra.sweeper._target_)
        jobs = callback._grid(cfg, [f"sweep={preset}"])
        assert len(jobs) > 4
        for each in jobs[-1:]:
            hydra.compose("config", each)
