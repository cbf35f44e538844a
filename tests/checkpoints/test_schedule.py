"""A run with a learning rate schedule is resumed to the step that it was made for, unless a new one is given."""

import json
import re
import shlex
from pathlib import Path

import pytest

import pusht_act
from tests.helpers.runs import tiny_command

pytestmark = pytest.mark.slow

COSINE = [
    *("+scheduler.type=cosine_decay_with_warmup", "+scheduler.num_warmup_steps=1", "+scheduler.num_decay_steps=4"),
    *("+scheduler.peak_lr=1e-4", "+scheduler.decay_lr=1e-5"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedule") / "run"
    return pusht_act.run(tiny_command(*COSINE, "save_freq=2", f"output_dir={folder}")).output_dir


def branch(run: Path, new: Path, *more: str) -> list[str]:
    return ["mode=resume", f"resume.path={run}/checkpoints/000002", f"output_dir={new}", *more]


def rates(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/lr"] for line in lines if "train/lr" in line]


@pytest.mark.parametrize("steps", [["steps=8"], ["steps=3"], []], ids=["longer", "shorter", "by default"])
def test_another_number_of_steps_is_refused_with_two_commands_that_work(
    steps: list[str], run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has a learning rate schedule for steps=4, and the rate would jump") as caught:
        pusht_act.run(branch(run, tmp_path / "new", *steps))
    assert not (tmp_path / "new").exists()
    finish, new = (shlex.split(command)[1:] for command in re.findall("`(.*?)`", str(caught.value)))
    assert rates(pusht_act.run([*finish]).output_dir) == rates(run)[2:]
    if steps:
        assert pusht_act.run([*new, f"output_dir={tmp_path / 'schedule'}"]).step == int(steps[0][6:])


def test_a_finished_schedule_is_said_to_be_complete(run: Path) -> None:
    with pytest.raises(ValueError, match=r"it is complete, `pusht-act mode=resume .*\+scheduler.num_decay_steps=9`"):
        pusht_act.run(["mode=resume", f"output_dir={run}", "steps=9"])
    again = tiny_command(*COSINE, "save_freq=2", f"output_dir={run}", "resume.auto=true", "steps=9")
    with pytest.raises(ValueError, match="steps=9: .* has a learning rate schedule for steps=4"):
        pusht_act.run(again)


def test_a_constant_rate_goes_on(tmp_path: Path) -> None:
    constant = ["+scheduler.type=constant_with_warmup", "+scheduler.num_warmup_steps=2", "steps=2"]
    pusht_act.run(tiny_command(*constant, f"output_dir={tmp_path / 'run'}"))
    assert pusht_act.run(["mode=resume", f"output_dir={tmp_path / 'run'}", "steps=3"]).step == 3


def test_a_resumed_run_keeps_its_choices(run: Path, tmp_path: Path) -> None:
    new = pusht_act.run(branch(run, tmp_path / "new", "steps=4")).output_dir
    saved = [
        json.loads((each / "checkpoints/last/pretrained_model/pusht_act.json").read_text())["choices"]
        for each in (run, new)
    ]
    for group in ("policy", "env", "dataset"):
        assert saved[1][group] == saved[0][group], group
    assert saved[1]["dataset"] == "demos"
