"""hydra/sweeper=optuna: what is chosen, what is pruned, and that a sweep which was killed comes to the same best."""

import json
import os
import re
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from pusht_act.config.optuna import Direction, OptunaConfig, Pruner, PrunerConfig
from pusht_act.main import CONFIG_DIR
from pusht_act.sweeps import optuna_sweeper, pruning
from pusht_act.sweeps.optuna_sweeper import search_space
from pusht_act.sweeps.pruning import Reporter, reporter
from pusht_act.sweeps.state import Job, load_jobs
from pusht_act.sweeps.table import format_best
from tests.helpers.commands import Commands, appears
from tests.helpers.runs import tiny_command
from tests.helpers.sampling import some_not_slow
from tests.helpers.sweeps import ran, states

BY_LENGTH = (
    *("hydra/sweeper=optuna", "hydra.sweeper.metric=avg_sum_reward", "env.episode_length=range(2,20)"),
    *("eval.workers=1", "log_freq=2"),
)
"""The longer an episode, the more reward there is in it."""


def study_of(directory: Path) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{directory / 'optuna.db'}")


def told(directory: Path) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.state, trial.params, trial.value) for trial in study_of(directory).trials]


def done(directory: Path) -> list[tuple[Any, ...]]:
    """What each job was and came to."""
    return [(each.number, each.state, each.overrides, each.step, each.objective) for each in load_jobs(directory)]


@pytest.mark.slow
def test_a_sweep_that_was_killed_comes_to_the_same_trials(commands: Commands, tmp_path: Path) -> None:
    """In the second job of a batch; with random trials before it and TPE's after it."""
    command = [
        "-m", *tiny_command("steps=60", "save_freq=4", "eval_freq=60", *BY_LENGTH), "hydra.sweeper.pruner.kind=none",
        "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.n_startup_trials=2",
    ]  # fmt: skip
    whole, cut, output = tmp_path / "whole", tmp_path / "cut", tmp_path / "output"
    assert commands.run([*command, f"hydra.sweep.dir={whole}"], output) == 0, output.read_text()
    printed = output.read_text()
    assert states(printed) == [[str(number), "done", "1"] for number in range(6)]
    format_best = max(load_jobs(whole), key=lambda each: each.objective or 0)
    said = f"best: job {format_best.number}, avg_sum_reward {format_best.objective:.4g}, {format_best.overrides[-1]}\n"
    assert format_best.overrides[-1].startswith("env.episode_length=")
    assert said in printed
    assert study_of(whole).best_trial.number == format_best.number

    pid = commands.start([*command, f"hydra.sweep.dir={cut}"], output)
    appears(output, "#3 :")
    while not (cut / "3" / "checkpoints" / "last").exists():
        time.sleep(0.002)
    os.kill(pid, signal.SIGSTOP)  # or it would be done before the other has been refused
    refused = tmp_path / "refused"
    assert commands.run(["-m", f"sweep.resume={cut}"], refused) == 1
    assert refused.read_text().startswith(f"pusht-act: hydra.sweep.dir={cut} is being written by process {pid} on ")
    assert len(refused.read_text().splitlines()) == 1
    os.kill(pid, signal.SIGKILL)
    assert commands.wait(pid) == -signal.SIGKILL
    assert [each.state for each in load_jobs(cut)] == ["done"] * 3 + ["interrupted"] + ["waiting"] * 2
    assert [trial.state for trial in study_of(cut).trials] == [TrialState.COMPLETE] * 2 + [TrialState.RUNNING] * 2

    assert commands.run(["-m", f"sweep.resume={cut}"], output) == 0, output.read_text()
    assert said in output.read_text()
    assert [ran(cut / str(job)) for job in range(6)] == [1, 1, 1, 2, 1, 1]
    assert re.search(r"resuming from \S+/3/checkpoints/0000\d\d", output.read_text())
    assert done(cut) == done(whole)
    assert told(cut) == told(whole)
    chosen = [each.overrides[-1] for each in load_jobs(whole)]
    assert len(set(chosen)) > 3
    runs = [json.loads((cut / str(job) / "metrics.jsonl").read_text().splitlines()[-1])["step"] for job in range(6)]
    assert runs == [60] * 6

    assert commands.run(["-m", f"sweep.resume={cut}", "hydra.sweeper.n_trials=7"], output) == 0, output.read_text()
    assert [each.tries for each in load_jobs(cut)] == [1, 1, 1, 2, 1, 1, 1], "only the one that is new"
    assert commands.run(["-m", f"sweep.resume={cut}"], output) == 0
    assert states(output.read_text())[6] == ["6", "done", "1"]


@pytest.mark.slow
def test_bad_trials_are_pruned(commands: Commands, tmp_path: Path) -> None:
    folder, output = tmp_path / "sweep", tmp_path / "output"
    command = [
        "-m", *tiny_command("steps=12", "eval_freq=4", "eval.background=false", *BY_LENGTH), "hydra.sweeper.n_trials=5",
        "hydra.sweeper.pruner.n_startup_trials=1", "hydra.sweeper.pruner.n_warmup_steps=6", f"hydra.sweep.dir={folder}",
    ]  # fmt: skip
    assert commands.run(command, output) == 0, output.read_text()
    found = load_jobs(folder)
    pruned = [each for each in found if each.state == "pruned"]
    assert 0 < len(pruned) < 5
    assert found[0].state == "done"
    for each in pruned:
        assert each.step == 8, "neither in the warm-up nor at the end"
        assert (Path(each.output_dir) / "checkpoints" / "last").resolve().name == "000008"
        row = next(line for line in output.read_text().splitlines() if line.startswith(f"| {each.number:3} | pruned "))
        assert f"| {each.objective:>14.4g} |" in row
        trial = study_of(folder).trials[each.number]
        assert (trial.state, trial.value) == (TrialState.PRUNED, each.objective)
        assert trial.intermediate_values.keys() == {4, 8}
    assert f"best: job {study_of(folder).best_trial.number}, " in output.read_text()
    assert commands.run(command, output) == 0
    assert [ran(folder / str(job)) for job in range(5)] == [1] * 5


@pytest.mark.slow
def test_a_trial_that_fails_is_tried_again_and_the_others_go_on(commands: Commands, tmp_path: Path) -> None:
    folder, output = tmp_path / "sweep", tmp_path / "output"
    space = ["policy.n_heads=choice(3)", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "sweep.max_tries=2"]
    for tries in (1, 2, 2):
        assert commands.run(["-m", *tiny_command(*space), f"hydra.sweep.dir={folder}"], output) == 1
        assert states(output.read_text()) == [["0", "failed", str(tries)], ["1", "failed", str(tries)]]
    last = output.read_text().splitlines()[-1]
    assert last.startswith("pusht-act: 2 of 2 jobs are not done (job 0: policy.dim_model=32 is not a multiple")
    assert len(study_of(folder).trials) == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    some_not_slow([
        (["seed=1"], "hydra/sweeper=optuna has nothing to choose: give a key several values, such as"),
        (["seed=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 is too small: give 1 or more"),
        (["seed=1,2", "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0 is too small: give 1 or more"),
        (["seed=1,2", "hydra.sweeper.sampler.seed=-1"], "hydra.sweeper.sampler.seed=-1 is too small: give 0 or more"),
        (["seed=1,2", "hydra.sweeper.metric=success"],
         "hydra.sweeper.metric=success: Invalid value 'success', expected one of [pc_success, avg_max_reward, avg_sum"),
        (["seed=1,2", "hydra.sweeper.trials=3"], "hydra.sweeper.trials is unknown: hydra/sweeper=optuna has options"),
        (["seed=1,2", "print_lerobot_command=true"], "job 0 was not evaluated, so it has no pc_success to compare"),
        (["policy.nope=interval(1,2)"], "policy.nope is not in conf/"),
    ], every=8),
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(overrides: list[str], said: str, commands: Commands, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = ["-m", "hydra/sweeper=optuna", "mode=test", *overrides, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert commands.run(command, output) == 1
    assert output.read_text().splitlines()[-1].startswith(f"pusht-act: {said}"), output.read_text()
    assert "Traceback" not in output.read_text()


def test_a_study_that_is_damaged_is_named(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "optuna.db").write_text("no data base" * 100)
    output = tmp_path / "output"
    assert commands.run(["-m", "hydra/sweeper=optuna", "seed=1,2", f"hydra.sweep.dir={tmp_path}"], output) == 1
    assert f"pusht-act: {tmp_path}/optuna.db cannot be read (" in output.read_text().splitlines()[-1]


def parsed(*overrides: str) -> tuple[dict[str, Any], list[str]]:
    return search_space(OverridesParser.create().parse_overrides(list(overrides)))


@pytest.mark.parametrize(
    ("override", "distribution"),
    [
        ("x=interval(1e-5,1e-2)", FloatDistribution(1e-5, 1e-2)),
        ("x=tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("x=interval(1,8)", FloatDistribution(1, 8)),
        ("x=int(interval(1,8))", IntDistribution(1, 8)),
        ("x=tag(log,int(interval(1,8)))", IntDistribution(1, 8, log=True)),
        ("x=range(2,9,2)", IntDistribution(2, 8, step=2)),
        ("x=range(8,2,-2)", IntDistribution(4, 8, step=2)),
        ("x=range(0.1,0.5,0.1)", FloatDistribution(0.1, 0.4, step=0.1)),
        ("+x=8,b,null,[1,2],'c d'", CategoricalDistribution(["8", "b", "null", "[1,2]", "'c d'"])),
        ("x=choice(a,b)", CategoricalDistribution(["a", "b"])),
    ],
)
def test_the_search_space_is_given_in_hydras_grammar(override: str, distribution: Any) -> None:
    assert parsed("y=1", override, "~z") == ({override.partition("=")[0]: distribution}, ["y=1", "~z"])


def test_the_later_of_two_overrides_counts() -> None:
    assert parsed("x=1,2", "y=1,2", "x=3", "z=3", "z=1,2")[1] == ["x=3"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("x=range(5,5)", "x=range(5,5): the range is empty"),
        ("x=interval(2,1)", "x=interval(2,1): "),
        ("x=tag(log,interval(0,1.5))", "x=tag(log,interval(0,1.5)): "),
        ("x=tag(lgo,interval(1,2))", "x=tag(lgo,interval(1,2)): the tag lgo means nothing"),
        ("x=tag(log,range(1,9))", "x=tag(log,range(1,9)): the tag log means nothing"),
    ],
)
def test_an_impossible_search_space_is_named(override: str, said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        parsed(override)


def options(**changed: Any) -> OptunaConfig:
    """Those of conf/hydra/sweeper/optuna.yaml, some changed."""
    values: Any = OmegaConf.load(Path(CONFIG_DIR) / "hydra" / "sweeper" / "optuna.yaml")
    del values["defaults"]
    found: Any = OmegaConf.to_object(OmegaConf.merge(OptunaConfig, values, changed))
    return found  # type: ignore[no-any-return]


def chosen(directory: Path, number: int, given: OptunaConfig) -> list[str]:
    """By a study of `number` trials that knows x=7 as the place to be."""
    directory.mkdir()
    study = optuna_sweeper._study(directory, given)
    space: dict[str, Any] = {"x": FloatDistribution(0, 10)}
    for i in range(number):
        params = {"x": 10 * i / number}
        study.add_trial(create_trial(params=params, distributions=space, value=-((params["x"] - 7) ** 2)))
    first = optuna_sweeper._suggest(study, number, space, given)
    assert optuna_sweeper._suggest(study, number, space, given) == first, "chosen once"
    assert len(study.trials) == number + 1
    return first


def test_what_is_chosen_follows_from_the_seed_the_number_and_the_trials_before(tmp_path: Path) -> None:
    def x(name: str, number: int, **changed: Any) -> float:
        (override,) = chosen(tmp_path / name, number, options(**changed))
        return float(override.removeprefix("x="))

    tpe = x("tpe", 20)
    assert x("again", 20) == tpe
    assert abs(tpe - 7) < 2
    assert abs(x("minimize", 20, direction="minimize") - 7) > 3
    assert x("seed", 20, sampler={"seed": 1}) != tpe
    random = [x(f"random-{number}", number, sampler={"n_startup_trials": 99}) for number in (0, 1, 20)]
    assert len({*random, tpe}) == 4, "by its number too"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A study of two trials that had 0.6 and 0.4 at step 10, and of one that is under way."""
    study = optuna_sweeper._study(tmp_path, options())
    for value in (0.6, 0.4):
        study.add_trial(create_trial(value=value, intermediate_values={10: value}))
    study.ask()
    return tmp_path


def asked(directory: Path, *values: float, **changed: int) -> list[bool]:
    """Whether trial 2 ends after steps 10, 20 and so on."""
    pruner = PrunerConfig(Pruner.median, **{"n_startup_trials": 1, "n_warmup_steps": 0, **changed})
    report = Reporter(directory, 2, "pc_success", pruner)
    return [report(10 * i, {"pc_success": value}) for i, value in enumerate(values, start=1)]


def test_a_trial_below_the_median_ends(two: Path) -> None:
    assert asked(two, 0.45) == [True]
    assert study_of(two).trials[2].intermediate_values == {10: 0.45}
    assert asked(two, 0.55) == [False], "said again, after a resume"
    assert study_of(two).trials[2].intermediate_values == {10: 0.55}


def test_the_pruner_has_options(two: Path) -> None:
    assert asked(two, 0.45, n_startup_trials=3) == [False]
    assert asked(two, 0.45, n_warmup_steps=11) == [False]
    node = OmegaConf.create({"sweeper": {"pruner": {"kind": Pruner.none}}, "job": {"num": 1}})
    assert reporter(node) is None


def test_a_study_that_is_busy_or_gone_lets_training_go_on(
    two: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pruning, "BUSY_S", 0.1)
    other = sqlite3.connect(two / "optuna.db")
    other.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    assert asked(two, 0.1, 0.1) == [False, False]
    assert time.monotonic() - start < 30
    other.close()
    assert "database is locked" in caplog.text
    assert "training continues" in caplog.text
    assert len(caplog.records) == 1, "once"
    (two / "optuna.db").unlink()
    assert asked(two, 0.1) == [False]
    assert len(caplog.records) == 2
    assert not (two / "optuna.db").exists(), "no empty one in its place"


def test_the_best_is_by_the_direction() -> None:
    found = [Job(i, [f"seed={i}"], state, 1, objective=value) for i, (state, value) in enumerate(
        [("done", 20.0), ("done", 30.0), ("done", 30.0), ("pruned", 10.0), ("done", None), ("failed", None)]
    )]  # fmt: skip
    for direction, line in (
        (Direction.maximize, "job 1, pc_success 30.0 %"),
        (Direction.minimize, "job 0, pc_success 20.0 %"),
    ):
        assert format_best(direction.value, found) == [f"best: {line}, seed={line[4]}"]
    assert format_best(None, found) == [], "of a grid none is sought"
