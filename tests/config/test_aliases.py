"""Old names of options work wherever an option is named: typed, in a checkpoint, in a sweep."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import pusht_act
from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.config.aliases import RENAMED, rename_config, rename_overrides
from pusht_act.config.validation import OPTIONS
from pusht_act.sweeps.resume import expand_resume_args
from pusht_act.sweeps.state import read_identity
from tests.checkpoints.test_merge_config import inherited
from tests.fixtures.make import FIXTURES
from tests.helpers.command_line import command


def test_every_new_name_is_an_option_and_no_old_one_is() -> None:
    assert set(RENAMED.values()) <= OPTIONS.keys()
    assert not RENAMED.keys() & OPTIONS.keys()


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ("demos.starts=x", "demos.initial_states=x"),
        ("+demos.starts=x", "demos.initial_states=x"),
        ("++demos.starts=x", "++demos.initial_states=x"),
        ("~demos.starts", "~demos.initial_states"),
        ("demos.starts='a=b,c'", "demos.initial_states='a=b,c'"),
    ],
)
def test_an_old_name_is_replaced_with_a_line(given: str, now: str, caplog: pytest.LogCaptureFixture) -> None:
    assert rename_overrides([given]) == [now]
    assert [record.getMessage() for record in caplog.records] == ["demos.starts is called demos.initial_states now"]


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ("demos.mirror=true", "train.mirror=0.5"),
        ("demos.mirror=False", "train.mirror=0.0"),
        ("+demos.mirror=true,false", "train.mirror=0.5,0.0"),
        ("demos.mirror=perhaps", "train.mirror=perhaps"),
    ],
)
def test_an_old_value_is_converted(given: str, now: str, caplog: pytest.LogCaptureFixture) -> None:
    assert rename_overrides([given]) == [now]
    assert [record.getMessage() for record in caplog.records] == [f"demos.mirror is called {now} now"]


def test_a_stored_value_is_converted() -> None:
    assert rename_config({"demos": {"mirror": True}, "train": {"mirror": 0.0}})["train"] == {"mirror": 0.5}
    assert rename_config({"demos": {"mirror": False}}) == {"demos": {}, "train": {"mirror": 0.0}}


@pytest.mark.parametrize(
    "given", ["demos.start_seed=3", "-m", "job_name=demos.starts", "demos.startsx=3", "wandb.notes=demos.starts=x", ""]
)
def test_nothing_else_is_changed(given: str, caplog: pytest.LogCaptureFixture) -> None:
    assert rename_overrides([given]) == [given]
    assert caplog.records == []


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "+"])
def test_the_command_takes_it(prefix: str, in_tmp: Path) -> None:
    done = command(f"{prefix}demos.starts=nowhere.csv", "mode=demos", cwd=in_tmp)
    first, last = done.stderr.splitlines()
    assert first == "demos.starts is called demos.initial_states now"
    assert last.startswith("pusht-act: demos.initial_states=nowhere.csv cannot be read")
    assert done.returncode == 1


def test_python_takes_it(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="demos.initial_states=nowhere.csv cannot be read"):
        pusht_act.run(["demos.starts=nowhere.csv", "mode=demos"])
    assert "demos.starts is called demos.initial_states now" in caplog.text


def test_a_stored_configuration_has_the_new_names() -> None:
    stored = {"demos": {"starts": "x", "speed": 9.0}, "seed": 3}
    assert rename_config(stored) == {"demos": {"initial_states": "x", "speed": 9.0}, "seed": 3}
    assert stored["demos"] == {"starts": "x", "speed": 9.0}, "left as it is"
    assert rename_config({"seed": 3}) == {"seed": 3}
    assert rename_config({"demos": None}) == {"demos": None}


def test_a_checkpoint_of_then_is_continued_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Path(shutil.copytree(FIXTURES / "mid", tmp_path / "run", symlinks=True))
    assert "starts" in yaml.safe_load((run / "config.yaml").read_text())["demos"]
    path = run / "checkpoints/000004/pretrained_model/pusht_act.json"
    record = json.loads(path.read_text())
    record["config"]["demos"]["starts"] = "somewhere.csv"
    path.write_text(json.dumps(record))
    config = inherited(Checkpoint(path.parent))
    assert config.demos.initial_states == "somewhere.csv"
    assert caplog.records == []


def test_a_sweep_of_then_is_continued_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["mode=demos", "demos.starts=x", "demos.seed=1,2"]
    jobs = [["mode=demos", "demos.starts=x", f"demos.seed={seed}"] for seed in (1, 2)]
    (tmp_path / "sweep.json").write_text(json.dumps({"overrides": overrides, "jobs": jobs}))
    now = ["mode=demos", "demos.initial_states=x", "demos.seed=1,2"]
    identity = read_identity(tmp_path)
    assert identity is not None
    assert identity.overrides == now
    folder = f"hydra.sweep.dir={tmp_path}"
    assert expand_resume_args(["-m", f"sweep.resume={tmp_path}"]) == ["-m", *now, folder]
    assert expand_resume_args(["-m", *now, folder]) == ["-m", *now, folder], "the same sweep by its present names"
    assert caplog.records == []
