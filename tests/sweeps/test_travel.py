"""A sweep is resumed by the command that is printed: with --config-dir, in any folder, beside another one."""

import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import setup_globals

from pusht_act.main import CONFIG_DIR
from pusht_act.runtime.errors import UserError
from pusht_act.sweeps.hydra_internals import split_arguments
from pusht_act.sweeps.resume import expand_resume_args
from tests.helpers.commands import Commands
from tests.helpers.runs import tiny_command
from tests.helpers.sweeps import states

NAMES = ["a b", "ü", "s=w", "a,b", 'sa"id', "it's"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_resumed(name: str, in_tmp: Path) -> None:
    Path(name).mkdir()
    (Path(name) / "sweep.json").write_text(json.dumps({"overrides": ["seed=1,2"], "jobs": []}))
    from pusht_act.config.overrides import override

    named = override("hydra.sweep.dir", name)
    assert expand_resume_args(["-m", override("sweep.resume", name)]) == ["-m", "seed=1,2", named]
    with pytest.raises(UserError, match="holds another sweep"):
        expand_resume_args(["-m", "seed=3", named])


@pytest.mark.parametrize("flag", [["--config-dir", "my conf"], ["--config-dir=my conf"], ["-cd", "my conf"]])
def test_a_folder_of_configurations_is_asked_for_and_never_read_from_a_file(flag: list[str], in_tmp: Path) -> None:
    Path("s").mkdir()
    content = {"overrides": ["experiment=mine", "seed=1,2"], "jobs": [], "flags": ["--config-dir", "my conf"]}
    (Path("s") / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="was started with --config-dir my conf: give `pusht-act .*`") as error:
        expand_resume_args(["-m", "sweep.resume=s"])
    again = shlex.split(str(error.value).partition("`")[2].rstrip("`"))
    resumed = ["-m", "--config-dir", "my conf", "experiment=mine", "seed=1,2", "hydra.sweep.dir=s"]
    assert expand_resume_args(again[1:]) == resumed
    given = expand_resume_args(["-m", *flag, "sweep.resume=s"])
    assert given == ["-m", *flag, *resumed[3:]]
    expand_resume_args([*flag, "-m", "experiment=mine", "seed=1,2", "hydra.sweep.dir=s"])


def test_flags_and_overrides_are_told_apart() -> None:
    words = ["--config-dir", "b=2", "-m", "--cfg=job", "a=1", "b=2", "~c"]
    assert split_arguments(words) == (["--config-dir", "b=2", "--cfg=job"], ["a=1", "b=2", "~c"])


@pytest.mark.slow
def test_a_sweep_with_configurations_of_its_own_is_resumed_by_what_it_prints(commands: Commands, in_tmp: Path) -> None:
    (in_tmp / "my conf" / "experiment").mkdir(parents=True)
    mine = in_tmp / "my conf" / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\npolicy:\n  n_heads: 7\n")
    sweep = ["seed=1,2", "hydra.sweep.dir='s=w ü'", "hydra.job.chdir=true", "experiment=mine"]
    assert commands.run(["-m", "--config-dir", "my conf", *tiny_command(*sweep)], in_tmp / "first") == 1
    printed = (in_tmp / "first").read_text()
    again = shlex.split(printed.partition("to resume: ")[2].splitlines()[0])
    assert again == ["pusht-act", "-m", "--config-dir", "my conf", 'sweep.resume="s=w ü"']
    mine.write_text("# @package _global_\npolicy:\n  n_heads: 4\n")
    assert commands.run(again[1:], in_tmp / "second") == 0, (in_tmp / "second").read_text()
    assert [row[1] for row in states((in_tmp / "second").read_text())] == ["done", "done"]


def test_two_sweeps_of_the_same_second_have_a_folder_each(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from pusht_act.sweeps.callback import _claim

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Frozen":  # noqa: ARG003
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("hydra.core.utils.datetime", Frozen)
    claimed = []
    for _ in range(3):
        setup_globals()
        with initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
            config = compose("config", return_hydra_config=True)
        OmegaConf.set_readonly(config.hydra, False)
        claimed.append((_claim(config, []), list(config.hydra.overrides.hydra)))
    first = "multirun/2026-01-02/03-04-05"
    assert claimed == [
        (Path(first), []),
        (Path(f"{first}-2"), [f"hydra.sweep.dir={first}-2"]),
        (Path(f"{first}-3"), [f"hydra.sweep.dir={first}-3"]),
    ]
