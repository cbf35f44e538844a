"""policy.pretrained_path: a new run that begins with the weights and the statistics of another checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pusht_act
from pusht_act.job import Result
from tests.helpers.runs import TINY
from tests.helpers.training import NORMALIZED, assert_same_bits, metrics

pytestmark = pytest.mark.slow

Tiny = Callable[..., Result]
STILL = ["policy.optimizer_lr=0", "policy.optimizer_lr_backbone=0"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; its statistics are those of four demonstrations."""
    return pusht_act.run([*TINY, NORMALIZED, f"output_dir={tmp_path_factory.mktemp('first') / 'run'}"]).output_dir


def model(run: Path) -> dict[str, torch.Tensor]:
    """Weights and statistics by file and name."""
    folder = run / "checkpoints" / "last" / "pretrained_model"
    tensors = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(tensors) == 3, "model and two processors"
    return {f"{name}/{key}": tensor for name, file in tensors.items() for key, tensor in file.items()}


@pytest.mark.parametrize("part", ["", "checkpoints/last", "checkpoints/000004/pretrained_model"])
def test_weights_and_statistics_are_the_checkpoints(part: str, first: Path, tiny: Tiny) -> None:
    run = tiny(NORMALIZED, f"+policy.pretrained_path={first / part}", *STILL, "seed=5", "demos.n_episodes=2").output_dir
    before, after = model(first), model(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    saved = json.loads((run / "checkpoints/last/pretrained_model/pusht_act.json").read_text())["config"]
    assert saved["policy"]["pretrained_path"] == str(first.resolve() / "checkpoints/000004/pretrained_model")


def test_it_trains_on_with_a_fresh_optimizer_order_and_schedule(first: Path, tiny: Tiny) -> None:
    run = tiny(NORMALIZED, f"+policy.pretrained_path={first}").output_dir
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert metrics(run)[0]["train/loss"] < metrics(first)[0]["train/loss"], "the first step begins where it had ended"
    assert any(not torch.equal(a, b) for a, b in zip(model(first).values(), model(run).values(), strict=True))


def test_a_resume_goes_on_from_its_own_checkpoint(first: Path, tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny(NORMALIZED, f"+policy.pretrained_path={first}", "save_freq=2").output_dir
    parts = Path(shutil.copytree(whole, tmp_path / "parts", symlinks=True))
    (parts / "checkpoints" / "last").unlink()
    (parts / "checkpoints" / "last").symlink_to("000002")
    pusht_act.run(["mode=resume", f"output_dir={parts}", "steps=4"])
    assert_same_bits(whole, parts)


def test_what_does_not_fit_the_checkpoint_is_refused(first: Path, tiny: Tiny, in_tmp: Path) -> None:
    path = f"+policy.pretrained_path={first}"
    for overrides, message in (
        ([NORMALIZED, "policy.dim_model=64"], "holds another policy than policy.. describes"),
        ([], r"policy.normalization_mapping=.* give '\+policy.normalization_mapping={.*ENV: MEAN_STD"),
        ([NORMALIZED, "env=pusht"], "the checkpoint's policy was made for .*environment_state"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(path, *overrides, "output_dir=run")
    with pytest.raises(FileNotFoundError, match=r"policy.pretrained_path=\. holds no checkpoint \(no config.json\)"):
        tiny("+policy.pretrained_path=.", "output_dir=run")
    damaged = Path(shutil.copytree(first, in_tmp / "damaged"))
    (damaged / "checkpoints/000004/pretrained_model/config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        tiny(f"+policy.pretrained_path={damaged}/checkpoints/000004", "output_dir=run")
    with pytest.raises(ValueError, match="policy.pretrained_path=.* has no equivalent"):
        pusht_act.run([path, "print_lerobot_command=true"])
    assert [each.name for each in in_tmp.iterdir()] == ["damaged"]


@pytest.mark.parametrize("mode", ["resume", "eval"])
def test_a_mode_with_a_checkpoint_of_its_own_refuses_another(mode: str, first: Path) -> None:
    given: list[Any] = [f"checkpoint={first}"] if mode == "eval" else [f"output_dir={first}", "steps=9"]
    with pytest.raises(
        ValueError, match=f"policy.pretrained_path=x is for mode=test and mode=full, not for mode={mode}: leave it out"
    ):
        pusht_act.run([f"mode={mode}", *given, "+policy.pretrained_path=x"])
