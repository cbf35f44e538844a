"""What commit 7926df9 wrote is still read, gone on with and come to: its runs, its sweeps, its command line.

tests/fixtures/make.py says how the files were made. Where a change is meant, the tables below say so.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.make import FIXTURES, MODES, NEUTRAL, RUN, files, machine, outcome, without_program
from tests.helpers.commands import Commands

RENAMED_KEYS: dict[str, str] = {"demos.starts": "demos.initial_states", "demos.mirror": "train.mirror"}
"""Dotted keys of the configuration, or of whole sections of it: then -> now."""
REMOVED_KEYS: set[str] = {"dagger"}
"""Those of then, by their old names, that there are no more, or whole sections."""
ADDED_KEYS: set[str] = {
    *(
        "train.backbone_norm",
        "train.freeze_backbone_at",
        "train.random_shift",
        "train.state_noise",
        "train.chunk_discount",
    ),
    *("wandb.name", "wandb.group", "wandb.tags", "wandb.add_tags", "wandb.run_id", "wandb.disable_artifact"),
    *("ema", "rename_map", "dataset.observations", "dataset.allow_change"),
}
"""Those that there were not, or whole sections."""
CHANGED_VALUES: dict[tuple[str, Any], Any] = {
    ("policy.pretrained_backbone_weights", "ResNet18_Weights.IMAGENET1K_V1"): "auto",
    ("demos.mirror", False): 0.0,
    ("demos.mirror", True): 0.5,
}
"""(Dotted key, value of then) -> value of now."""
CHANGED_EXPERIMENTS: dict[str, dict[str, Any]] = {
    "quickstart_image": {"steps": 3100, "batch_size": 64, "demos.n_episodes": 1000, "train.precision": "auto"},
}
"""Values of now, by experiment."""
REMOVED_JOBS: set[str] = {"dagger"}
"""Modes and experiments of then that there are no more."""
HYDRAS_FLAGS = (FIXTURES / "goldens" / "help.txt").read_text().partition("--help,-h")[2]
HELP_CHANGES: dict[str, str] = {
    "mode: dagger, demos, eval": "mode: demos, eval",
    # On images it took minutes.
    "mode=test dataset=demos policy=act_small steps=200 eval_freq=100 wandb.enable=false": (
        "mode=test env=pusht_keypoints dataset=demos policy=act_small steps=100 batch_size=8 eval_freq=50 logging=local"
    ),
    "pusht_act/config.py says": "docs/configuration.md says",
    # Hydra's flags are shown by --hydra-help; its own version is not ours.
    f"--help,-h{HYDRAS_FLAGS}": """
Flags
  -m, --multirun      a sweep: one job for each combination of values
  --cfg job           print the composed configuration and stop; --resolve fills in its interpolations
  --config-dir DIR    more configuration files, of your own
  --version           pusht-act's version
  --hydra-help        Hydra's other flags, such as --info and --shell-completion
""",
}
"""Texts in --help: then -> now."""
RENAMED_FILES: dict[str, str] = {}
"""Names of files or folders that a run or a sweep leaves behind: then -> now."""

ADDED_FILES = {
    "run": ["evaluations.jsonl", "eval/step-000006_seeds-100000-100001/episodes.npz"],
    "sweep": ["jobs.csv", "1/evaluations.jsonl", "1/eval/step-000004_seeds-100000-100001/episodes.npz"],
}
"""Files that a run, or a job of a sweep that goes on, did not leave behind then."""

GOLDENS = FIXTURES / "goldens"
JOBS = sorted({path.stem.removeprefix("job_") for path in GOLDENS.glob("job_*.yaml")} - REMOVED_JOBS)
STATE = RENAMED_FILES.get("pusht_act.json", "pusht_act.json")
SAME_SEEDS = ["eval.n_episodes=2", "eval.start_seed=100000", "eval.batch_size=2", "eval.n_videos=0"]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def command(commands: Commands, in_tmp: Path) -> Run:
    """Run `pusht-act ARGUMENTS`, whose keys are given as they were then: its exit code and all that it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        output = in_tmp / "output"
        # As there: no name of one's own, and no GPU.
        as_then = {"YOUR_PROJECT_NAME": "YOUR_PROJECT_NAME", "CUDA_VISIBLE_DEVICES": ""}
        code = commands.wait(commands.start([*map(override, arguments)], output, as_then))
        return code, output.read_text()

    return run


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A fixture again, to be gone on with: in another place, and left alone for long."""

    def copied(name: str) -> Path:
        folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name, symlinks=True))
        for path in folder.glob("jobs/*.json"):
            path.write_text(path.read_text().replace(str(NEUTRAL), str(tmp_path)))
        for path in (*folder.glob("jobs/*.json"), *folder.rglob("lock")):
            os.utime(path, (0, 0))  # a process on another machine, as this one is, is dead when it was silent for long
        return folder

    return copied


def renamed(key: str) -> str:
    """A dotted key of then as it is called now."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def override(then: str) -> str:
    """An override of then as it is given now; a flag is left as it is."""
    key, equals, value = then.partition("=")
    plus = "+" if key.startswith("+") else ""
    return f"{plus}{renamed(key.removeprefix('+'))}{equals}{value}"


def flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each leaf."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def without(keys: dict[str, Any], gone: set[str]) -> dict[str, Any]:
    """`keys` but those that are named in `gone` or are below one of them."""
    below = tuple(f"{key}." for key in gone)
    return {key: value for key, value in keys.items() if key not in gone and not key.startswith(below)}


def expected_configuration(name: str) -> dict[str, Any]:
    """The golden one, with the changes that are meant."""
    text = (GOLDENS / f"job_{name}.yaml").read_text()
    for old, new in RENAMED_KEYS.items():
        text = text.replace(f"${{{old}}}", f"${{{new}}}")
    keys = without(dict(flat(yaml.safe_load(text))), REMOVED_KEYS)
    for (key, then), now in CHANGED_VALUES.items():
        if keys[key] == then:
            keys[key] = now
    keys |= CHANGED_EXPERIMENTS.get(name, {})
    return {renamed(key): value for key, value in keys.items()}


def expected_files(name: str) -> list[str]:
    """The golden list, with the changes that are meant."""
    lines = (GOLDENS / f"{name}_files.txt").read_text().splitlines()
    return sorted("/".join(RENAMED_FILES.get(part, part) for part in line.split("/")) for line in lines)


def assert_same_outcome(run: Path, then: dict[str, Any], made_on: str) -> None:
    """`run` came to what was written down: to the bit on such a machine, to rounding on any other."""
    now = outcome(run, STATE)
    if machine() == made_on:
        assert now == then
        return
    for key in ("links", "pending", "sampler"):
        assert now[key] == then[key]
    assert now["best"]["step"] == then["best"]["step"]
    assert_close(now["metrics"], then["metrics"])
    assert_close(now["evaluations"], then["evaluations"])


def assert_close(now: Any, then: Any, key: str = "") -> None:
    """The same structure, and all numbers the same but for rounding."""
    if isinstance(then, dict):
        assert now.keys() == then.keys()
        for name in then:
            assert_close(now[name], then[name], name)
    elif isinstance(then, list):
        assert len(now) == len(then)
        for a, b in zip(now, then, strict=True):
            assert_close(a, b, key)
    elif key.endswith("loss"):
        assert math.isclose(now, then, rel_tol=1e-6), key
    else:
        # Episodes' rewards are texts, of a table. A simulation makes more of a difference than a step of training does.
        try:
            assert math.isclose(float(now), float(then), rel_tol=1e-3, abs_tol=1e-6), key
        except ValueError:
            assert now == then, key


def test_help(command: Run) -> None:
    code, printed = command("--help")
    then = (GOLDENS / "help.txt").read_text()
    for old, new in HELP_CHANGES.items():
        assert old in then
        then = then.replace(old, new)
    assert code == 0
    assert without_program(printed).rstrip().splitlines() == then.rstrip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_mode_and_experiment_is_the_same_job(name: str, command: Run) -> None:
    options = [f"mode={name}", *MODES[name]] if name in MODES else [f"experiment={name}"]
    code, printed = command(*options, "--cfg", "job")
    assert code == 0, printed
    assert without(dict(flat(yaml.safe_load(printed))), ADDED_KEYS) == expected_configuration(name)


@pytest.mark.parametrize("path", sorted(FIXTURES.rglob("manifest.json")), ids=lambda path: path.parts[-4])
def test_the_checkpoints_are_those_that_were_written(path: Path) -> None:
    entries = json.loads(path.read_text())
    assert len(entries) == 13
    for name, entry in entries.items():
        content = (path.parent / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"]), name


@pytest.mark.slow
def test_a_new_run_comes_to_the_same_and_leaves_the_same_files(command: Run, tmp_path: Path) -> None:
    code, printed = command(*RUN, f"output_dir={tmp_path / 'new'}")
    assert code == 0, printed
    recorded = json.loads((FIXTURES / "mid_resumed.json").read_text())
    assert_same_outcome(tmp_path / "new", outcome(FIXTURES / "run"), recorded["machine"])
    assert files(tmp_path / "new") == sorted([*expected_files("run"), *ADDED_FILES["run"]])


def test_a_run_stopped_in_its_middle_goes_on_to_the_same_end(
    command: Run, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    run = copy("mid")
    state = json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text())
    assert (state["step"], state["pending"]) == (4, 4), "its evaluation was under way"
    code, printed = command("mode=resume", f"output_dir={run}", "steps=8")
    assert code == 0, printed
    assert f"resuming from {run}/checkpoints/000004" in printed
    recorded = json.loads((FIXTURES / "mid_resumed.json").read_text())
    assert_same_outcome(run, recorded, recorded.pop("machine"))
    assert len((run / "runs.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("named", ["", "checkpoints/best", "checkpoints/000006/pretrained_model"])
def test_a_run_is_evaluated_to_the_numbers_it_had(named: str, command: Run, copy: Callable[[str], Path]) -> None:
    run = copy("run")
    then = outcome(run)["evaluations"]
    (folder,) = (run / "eval").iterdir()
    was = {path.name: path.read_text() for path in folder.iterdir()}
    shutil.rmtree(folder)
    code, printed = command("mode=eval", f"checkpoint={run / named}", *SAME_SEEDS)
    assert code == 0, printed
    (folder,) = (run / "eval").iterdir()
    now = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".npz"}
    assert now.keys() == was.keys()
    assert_close(outcome(run)["evaluations"], then)
    metrics, before = (json.loads(each["metrics.json"]) for each in (now, was))
    assert_close({key: metrics[key] for key in before} | {"eval_s": 0.0}, before | {"eval_s": 0.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run", ["1 job: 1 done", "6 / 6", "0.0 %"]),
        ("mid", ["1 job: 1 interrupted", "4 / 8"]),
        ("sweep", ["2 jobs: 1 done, 1 interrupted", "4 / 4", "2 / 4", "seed=2"]),
        ("dagger_round", ["1 job: 1 done", "2 / 2"]),
    ],
)
def test_its_state_is_shown(name: str, said: list[str], command: Run, copy: Callable[[str], Path]) -> None:
    folder = copy(name)
    before = files(folder)
    code, printed = command("mode=status", f"dir={folder}")
    assert code == 0, printed
    assert [text for text in said if text not in printed] == [], printed
    assert files(folder) == before


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_to_the_same_end(command: Run, copy: Callable[[str], Path]) -> None:
    sweep = copy("sweep")
    first = {path: path.read_bytes() for path in (sweep / "0").rglob("*") if path.is_file()}
    code, printed = command("-m", f"sweep.resume={sweep}")
    assert code == 0, printed
    assert "job 0 is done already" in printed
    assert f"resuming from {sweep}/1/checkpoints/000002" in printed
    recorded = json.loads((FIXTURES / "sweep_whole.json").read_text())
    assert_same_outcome(sweep / "1", recorded["jobs"]["1"], recorded["machine"])
    assert {path: path.read_bytes() for path in (sweep / "0").rglob("*") if path.is_file()} == first
    found = [json.loads((sweep / "jobs" / f"{job}.json").read_text()) for job in (0, 1)]
    assert [(job["state"], job["tries"], job["step"], job["objective"]) for job in found] == [
        ("done", 1, 4, 0.0),
        ("done", 2, 4, 0.0),
    ]
    left_out = [line for line in expected_files("sweep") if line.startswith("0/checkpoints/")]  # by make.py
    assert sorted([*files(sweep), *left_out]) == sorted([*expected_files("sweep"), *ADDED_FILES["sweep"]])


def test_a_round_of_dagger_without_its_labels_is_refused_in_a_line(command: Run, copy: Callable[[str], Path]) -> None:
    run = copy("dagger_round")
    before = files(run)
    labels = yaml.safe_load((run / "config.yaml").read_text())["dagger"]["labels"]
    assert len(labels) == 1
    assert not Path(labels[0]).exists()
    code, printed = command("mode=resume", f"output_dir={run}", "steps=4")
    assert code == 1
    last = printed.splitlines()[-1]
    assert last.startswith("pusht-act: ")
    assert "dagger" in last.replace(str(run), "").lower()
    assert "Traceback" not in printed
    assert files(run) == before


@pytest.mark.slow
def test_a_round_of_dagger_is_evaluated(command: Run, copy: Callable[[str], Path]) -> None:
    run = copy("dagger_round")
    code, printed = command("mode=eval", f"checkpoint={run}", *SAME_SEEDS)
    assert code == 0, printed
    (folder,) = (run / "eval").iterdir()
    assert folder.name.startswith("step-000002_seeds-100000-100001_")
