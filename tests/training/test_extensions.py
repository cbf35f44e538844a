"""Another loss and training transforms: who sees them, one and two ranks, resume; the code of docs/extending.md."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pusht_act
from pusht_act.job import Result
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits, metrics

DOC = Path(__file__).parents[2] / "docs" / "extending.md"
WITHOUT_NOISE = ["+policy.dropout=0.0", "+policy.use_vae=false"]


def half_squared(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (predicted - target).square()


def absolute(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (target - predicted).abs()


def jitter(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = batch["observation.state"]
    return {**batch, "observation.state": state + 3.0 * torch.randn_like(state)}


class Seen:
    """A loss and a transform that note the number of rows they are given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __repr__(self) -> str:
        return "Seen()"

    def loss(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert predicted.shape == target.shape
        self.rows.append(len(predicted))
        return (predicted - target).square()

    def transform(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert batch["action"].max() > 10, "not normalized yet"
        self.rows.append(len(batch["action"]))
        return batch


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    def run(*overrides: str, **extensions: Any) -> Result:
        return pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}", *overrides), **extensions)

    return run


def test_a_loss_is_seen_by_every_batch_by_validation_and_by_the_guard(run: Callable[..., Result]) -> None:
    seen = Seen()
    options = ["batch_size=100", "steps=4", "dataset.eval_split=0.25", "eval_steps=4", "save_freq=4"]
    result = run(*options, loss=seen.loss)
    checked, *full, short = seen.rows[:5]
    assert checked == 100, "before training"
    assert full == [100, 100, 100]
    assert 0 < short < 100, "an epoch's last batch"
    # After the last step: a sample of zeros before the save, and the held-out episode.
    assert seen.rows[5] == 1
    assert sum(seen.rows[6:]) == 377 - sum(seen.rows[1:5])
    lines = metrics(result.output_dir)
    assert len(lines) == 4
    assert all("train/action_loss" in line and "train/l1_loss" not in line for line in lines)


def test_the_same_loss_under_another_name_trains_to_the_same_bits(run: Callable[..., Result], tmp_path: Path) -> None:
    ours, theirs = run(f"output_dir={tmp_path / 'ours'}"), run(f"output_dir={tmp_path / 'theirs'}", loss=absolute)
    a, b = ([line["train/loss"] for line in metrics(each.output_dir)] for each in (ours, theirs))
    assert a == b
    other = run(f"output_dir={tmp_path / 'other'}", loss=half_squared)
    assert [line["train/loss"] for line in metrics(other.output_dir)] != a


def test_a_transform_is_seen_by_training_batches_alone(run: Callable[..., Result]) -> None:
    seen = Seen()
    run("batch_size=100", "steps=4", "dataset.eval_split=0.25", "eval_steps=1", transforms=[seen.transform])
    checked, *full, short = seen.rows
    assert checked == 100, "before training"
    assert full == [100, 100, 100]
    assert 0 < short < 100


def test_a_transforms_random_numbers_are_those_of_a_run_that_was_not_stopped(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    whole = run("steps=6", "save_freq=2", transforms=[jitter], loss=half_squared).output_dir
    branch = tmp_path / "branch"
    again = ["mode=resume", f"resume.path={whole}/checkpoints/000002", "steps=6", f"output_dir={branch}"]
    pusht_act.run(again, transforms=[jitter], loss=half_squared)
    assert_same_bits(whole, branch)
    plain = run("steps=6", f"output_dir={tmp_path / 'plain'}", loss=half_squared).output_dir
    assert [line["train/loss"] for line in metrics(plain)] != [line["train/loss"] for line in metrics(whole)]


def test_a_resume_without_the_same_functions_is_refused(run: Callable[..., Result], tmp_path: Path) -> None:
    whole = run("steps=2", "save_freq=1", transforms=[jitter], loss=half_squared).output_dir
    again = ["mode=resume", f"output_dir={whole}", "steps=4"]
    for given, message in (
        ({}, "trained with loss=tests.training.test_extensions.half_squared, now loss=the default"),
        ({"loss": absolute}, "half_squared, now loss=tests.training.test_extensions.absolute"),
        ({"loss": half_squared}, "trained with transforms=tests.training.test_extensions.jitter, now transforms=the"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            pusht_act.run(again, **given)  # type: ignore[arg-type]
    assert pusht_act.run(["mode=eval", f"checkpoint={whole}", "eval.n_episodes=1", "eval.n_videos=0"]).episodes
    assert pusht_act.run(again, transforms=[jitter], loss=half_squared).step == 4


def test_a_function_without_a_name_is_refused(run: Callable[..., Result], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a lambda has no name"):
        run(loss=lambda predicted, target: predicted - target)
    assert not (tmp_path / "run").exists()


SCRIPT = """
import sys
import torch
import pusht_act

def half_squared(predicted, target):
    return 0.5 * (predicted - target).square()

def upside_down(batch):
    state = batch["observation.state"]
    return {**batch, "observation.state": 512 - state}

pusht_act.run(sys.argv[1:], loss=half_squared, transforms=[upside_down])
"""


@pytest.mark.slow
def test_two_ranks_come_to_what_one_does(tmp_path: Path) -> None:
    """Over an epoch's end, whose last batch of one row leaves a rank without any."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    options = tiny_command(*WITHOUT_NOISE, "batch_size=94", "steps=6", "+optimizer.eps=1e-4")
    one = [sys.executable, str(script), *options, f"output_dir={tmp_path / 'one'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    for command in (one, [*launch, *options, f"output_dir={tmp_path / 'two'}"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    expected, found = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_code_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for the size of the runs."""
    monkeypatch.chdir(tmp_path)
    real = pusht_act.run
    results: list[Result] = []

    def smaller(overrides: list[str], **extensions: Any) -> Result:
        steps = "steps=6" if "mode=resume" in overrides else "steps=4"
        tiny = [] if "mode=resume" in overrides else [*tiny_command(), "overwrite=true"]
        kept = [each for each in overrides if not each.startswith("steps=")]
        results.append(real([*dict.fromkeys([*tiny, *kept, steps])], **extensions))
        return results[-1]

    monkeypatch.setattr(pusht_act, "run", smaller)
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL))
    # As a script that is started.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, str(DOC), "exec"), namespace)
    assert [result.step for result in results] == [4, 4, 6]

    batch = {"observation.image": torch.rand(2, 3, 96, 96)}
    shifted = namespace["shift_image"](batch)["observation.image"]
    assert shifted.shape == (2, 3, 96, 96)
