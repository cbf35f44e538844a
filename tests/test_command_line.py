"""The command itself: quick answers, help whose examples work, launcher presets, real sweeps."""

import copy
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import load_file

import pusht_act
from pusht_act.config.validation import to_config
from pusht_act.job import Result
from pusht_act.main import CONFIG_DIR, _execute, main
from tests.helpers.runs import TINY, tiny_command
from tests.helpers.sampling import some_not_slow

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher")  # as config.register does; pytest undoes that
SECONDS_TO_ANSWER = 1.5
QUICK = [
    ["--cfg", "job"],
    ["--help"],
    ["stepps=3"],
    ["policy=act_smal"],
    ["policy.n_action_steps=200"],
    ["mode=resume"],
    ["mode=eval", "checkpoint=nowhere"],
    ["print_lerobot_command=true"],
    ["mode=status", "dir=nowhere"],
    ["--version"],
]


def command(*arguments: str, cwd: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *flags, "-m", "pusht_act", *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        cfg: DictConfig = hydra.compose("config", list(overrides), return_hydra_config=True)
    return cfg


def help_text(cwd: Path) -> str:
    return command("--help", cwd=cwd).stdout


def examples(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    pusht-act")]


def seconds(*arguments: str, cwd: Path) -> float:
    """How long the command takes; on a machine that is busy otherwise, how much of that is its own."""
    own, start = os.times(), time.perf_counter()
    command(*arguments, cwd=cwd)
    wall, now = time.perf_counter() - start, os.times()
    busy = os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    return now.children_user - own.children_user + now.children_system - own.children_system if busy else wall


@pytest.mark.slow
@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_answers_at_once(arguments: list[str], tmp_path: Path) -> None:
    attempts = (seconds(*arguments, cwd=tmp_path) for _ in range(3))
    assert any(attempt < SECONDS_TO_ANSWER for attempt in attempts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", some_not_slow(QUICK, every=3), ids=" ".join)
def test_answers_without_torch_and_lerobot(arguments: list[str], tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path, flags=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pusht_act.config.schema" in imported
    assert {"torch", "lerobot", "gym_pusht", "wandb", "optuna"} & imported == set()


@pytest.mark.slow
def test_training_imports_no_hugging_face_datasets(tmp_path: Path) -> None:
    code = (
        "import sys, pusht_act; pusht_act.run(sys.argv[1:]); "
        "print(sorted({'lerobot', 'datasets', 'pandas', 'lerobot.datasets'} & sys.modules.keys()))"
    )
    arguments = tiny_command("steps=1", f"output_dir={tmp_path / 'run'}")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['lerobot']"


def test_the_printed_configuration_is_the_composed_one(tmp_path: Path) -> None:
    done = command("--cfg", "job", "mode=test", "policy.dim_model=64", cwd=tmp_path)
    printed: Any = OmegaConf.create(done.stdout)
    assert (printed.mode, printed.steps, printed.policy.dim_model) == ("test", 10_000, 64)


def test_help_lists_groups_and_examples_that_compose(tmp_path: Path) -> None:
    text = help_text(tmp_path)
    for group in ("mode", "policy", "env", "dataset", "logging", "experiment"):
        names = sorted(path.stem for path in (Path(CONFIG_DIR) / group).glob("*.yaml"))
        assert f"{group}: {', '.join(names)}\n" in text
    assert "--cfg" in text
    commands = examples(text)
    assert [] in commands  # the main job takes no argument
    for part in ("mode=test", "mode=resume", "mode=eval", "-m", "print_lerobot_command=true"):
        assert any(part in words for words in commands), part
    for words in commands:
        one_job = [word.partition(",")[0] for word in words if word != "-m"]
        cfg = compose(*one_job)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        to_config(cfg)


def test_the_version_is_ours(tmp_path: Path) -> None:
    done = command("--version", cwd=tmp_path)
    assert done.stdout == f"pusht-act {pusht_act.__version__} (Python {platform.python_version()})\n"
    assert done.returncode == 0
    assert pusht_act.__version__ == version("pusht-act")
    with pytest.raises(AttributeError, match="nothing"):
        pusht_act.nothing  # noqa: B018


CHILD = """
import os, subprocess, sys
from pathlib import Path
import pusht_act.job
import pusht_act.main
from pusht_act.job import Result

def run_job(*_):
    subprocess.run([sys.executable, "-c", "import os; print(os.environ.get('HYDRA_FULL_ERROR'))"], check=True)
    return Result(Path())

pusht_act.job.run_job = run_job
pusht_act.main.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["-m", "seed=1"]])
@pytest.mark.parametrize("given", ["1", "0", None])
def test_a_child_is_asked_for_tracebacks_by_the_user_only(
    given: str | None, arguments: list[str], tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    environment |= {"HYDRA_FULL_ERROR": given} if given is not None else {}
    words = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, str(given) in done.stdout.splitlines()) == (0, True), done.stderr


def test_the_config_store_is_copied_for_others() -> None:
    store = ConfigStore.instance()
    copied = copy.deepcopy(store)
    assert copied is not store
    assert copied.repo is not store.repo
    assert "schema.yaml" in copied.repo
    assert "__deepcopy__" not in vars(ConfigStore)


@pytest.mark.parametrize("arguments", [["--help"], ["stepps=3"]])
def test_what_main_changes_of_hydra_is_put_back(
    arguments: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hydra._internal.utils.run_and_report
    monkeypatch.setattr(sys, "argv", ["pusht-act", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert hydra._internal.utils.run_and_report is before
    assert hydra._internal.hydra.run_and_report is before
    assert "__deepcopy__" not in vars(ConfigStore)


def test_sweeps_write_under_multirun() -> None:
    assert compose().hydra.sweep.dir.startswith("multirun/")


def test_the_jobs_of_a_sweep_run_one_after_the_other_unless_told_otherwise() -> None:
    assert compose().hydra.launcher == compose("hydra/launcher=basic").hydra.launcher
    assert compose().hydra.launcher._target_.endswith("BasicLauncher")


def test_the_local_preset_lets_long_jobs_finish_and_see_a_gpu() -> None:
    launcher = compose("hydra/launcher=submitit_local").hydra.launcher
    assert launcher._target_.endswith("submitit_launcher.LocalLauncher")
    assert launcher.timeout_min >= 24 * 60
    assert launcher.gpus_per_node == 1


def test_the_slurm_preset_survives_its_time_limit() -> None:
    launcher = compose("hydra/launcher=submitit_slurm").hydra.launcher
    assert launcher._target_.endswith("submitit_launcher.SlurmLauncher")
    assert launcher.timeout_min > 60
    assert (launcher.signal_delay_s, launcher.max_num_timeout) == (120, 50)
    assert launcher.mem_gb > 0
    assert launcher.cpus_per_task > 0


def test_the_plugins_other_options_are_reached_and_typed() -> None:
    launcher = compose("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu").hydra.launcher
    assert launcher.partition == "gpu"
    with pytest.raises(hydra.errors.ConfigCompositionException):
        compose("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=soon")
    with pytest.raises(hydra.errors.ConfigCompositionException):
        compose("hydra/launcher=submitit_slurm", "hydra.launcher.patrition=gpu")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_a_sweep_trains_each_job_in_a_folder_of_its_own(launcher: str, tmp_path: Path) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for attempt in range(3):
        sweep = tmp_path / f"sweep{attempt}"
        done = command("-m", *TINY, "seed=1,2", f"hydra/launcher={launcher}", f"hydra.sweep.dir={sweep}", cwd=cwd)
        if "_0_log.out" not in done.stderr:
            break
    else:
        # submitit 1.5 starts a local job first and makes the folder of its log after; a loaded machine turns it round.
        pytest.skip("submitit started its local job before it had made the job's log folder, three times")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert OmegaConf.load(sweep / "0" / "config.yaml").seed == 1
    assert OmegaConf.load(sweep / "1" / "config.yaml").seed == 2
    models = [sweep / job / "checkpoints" / "last" / "pretrained_model" / "model.safetensors" for job in "01"]
    weights = [load_file(model) for model in models]
    assert any((weights[0][key] != weights[1][key]).any() for key in weights[0])
    assert list(cwd.iterdir()) == []


def run_as_a_job_of_a_sweep(directory: Path, *overrides: str) -> Result:
    cfg = compose(*overrides)
    OmegaConf.set_struct(cfg, False)
    node = cfg.pop("hydra")
    node.mode, node.runtime.output_dir = RunMode.MULTIRUN, str(directory)
    return _execute(cfg, node)


@pytest.mark.slow
def test_a_sweep_of_evaluations_keeps_them_apart_and_leaves_the_run_alone(tmp_path: Path, tiny: Any) -> None:
    run = tiny().output_dir
    before = sorted(run.rglob("*"))
    overrides = ["mode=eval", f"checkpoint={run}", "eval.n_episodes=1", "eval.n_videos=0", "env.episode_length=4"]
    for job in "01":
        directory = tmp_path / f"sweep, n={job}"  # a name that Hydra's own grammar would not read back
        result = run_as_a_job_of_a_sweep(directory, *overrides)
        assert result.output_dir.is_relative_to(directory)
        assert (result.output_dir / "episodes.csv").is_file()
    assert sorted(run.rglob("*")) == before


def test_a_sweep_goes_where_it_is_told(tmp_path: Path) -> None:
    given = tmp_path / "given"
    result = run_as_a_job_of_a_sweep(tmp_path / "job", *TINY, f"output_dir={given}")
    assert result.output_dir == given
    assert not (tmp_path / "job").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_command_quietly(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pusht_act", *TINY, "steps=1000000", f"output_dir={tmp_path / 'run'}"]
    # A job that a shell puts in the background is born with SIGINT ignored, and so are its children.
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (one thread at this point)
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3/" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in rest


@pytest.mark.slow
@pytest.mark.parametrize(("given", "threads"), [({}, "3"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_a_slurm_task_has_a_thread_for_each_core_it_was_given(given: dict[str, str], threads: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    code = "import os, pusht_act; print(os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"SLURM_CPUS_PER_TASK": "3"} | given,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{threads}\n"


def test_a_working_directory_that_was_deleted_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {shlex.quote(sys.executable)} -P -m pusht_act mode=test"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"pusht-act: the working directory {gone} was deleted: change to a folder that exists\n"
