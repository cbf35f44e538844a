"""The average of the weights: what it is, where it is saved and evaluated, exact on resume."""

import logging
from pathlib import Path

import pytest
import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from safetensors.torch import load_file

import pusht_act
from pusht_act.checkpoints.checkpoint import Checkpoint, find_checkpoint
from pusht_act.checkpoints.state import TrainerState
from pusht_act.job import Result
from pusht_act.training.async_evaluation import find_pending
from tests.helpers.config import config
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits, metrics

ON = ["ema.enable=true", "policy.optimizer_lr=1e-2", "policy.optimizer_lr_backbone=1e-2"]
STEPS = 6


def train(directory: Path, *overrides: str) -> Result:
    return pusht_act.run(tiny_command(f"steps={STEPS}", f"output_dir={directory}", *overrides))


def weights(run: Path, step: int | str, folder: str = "pretrained_model") -> dict[str, torch.Tensor]:
    name = step if isinstance(step, str) else f"{step:06d}"
    return load_file(run / "checkpoints" / name / folder / "model.safetensors")


def diffusers_decay(
    step: int,
    update_after_step: int = 0,
    inv_gamma: float = 1,
    power: float = 0.75,
    low: float = 0,
    high: float = 0.9999,
) -> float:
    """EMAModel.get_decay of diffusers 0.35 with use_ema_warmup."""
    t = max(0, step - update_after_step - 1)
    return 0.0 if t <= 0 else max(low, min(1 - (1 + t / inv_gamma) ** -power, high))


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ([], diffusers_decay),
        (["ema.decay=0.7"], lambda step: 0.7 if step > 1 else 0.0),
        (["ema.update_after_step=3"], lambda step: diffusers_decay(step, update_after_step=3)),
        (["ema.inv_gamma=4"], lambda step: diffusers_decay(step, inv_gamma=4)),
        (["ema.power=0.3"], lambda step: diffusers_decay(step, power=0.3)),
        (["ema.min_decay=0.65"], lambda step: diffusers_decay(step, low=0.65)),
        (["ema.max_decay=0.5"], lambda step: diffusers_decay(step, high=0.5)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
def test_the_average_is_that_of_the_steps(options: list[str], decay: object, tmp_path: Path) -> None:
    assert callable(decay)
    run = train(tmp_path / "run", *ON, "save_freq=1", *options).output_dir
    expected = {key: value.double() for key, value in weights(run, 1).items()}
    for step in range(1, STEPS + 1):
        for key, value in weights(run, step).items():
            expected[key] = decay(step) * expected[key] + (1 - decay(step)) * value.double()
        for key, value in weights(run, step, "pretrained_model_ema").items():
            assert torch.allclose(value.double(), expected[key], rtol=1e-5, atol=1e-7), (step, key)


def test_training_is_the_same_and_stock_reads_the_average(tmp_path: Path) -> None:
    plain, run = train(tmp_path / "plain", *ON[1:]).output_dir, train(tmp_path / "run", *ON).output_dir
    assert metrics(plain) == metrics(run)
    assert not (plain / "checkpoints" / "last" / "pretrained_model_ema").exists()
    trained, average = weights(run, "last"), weights(run, "last", "pretrained_model_ema")
    assert all(torch.equal(value, trained[key]) for key, value in weights(plain, "last").items())
    assert any(not torch.equal(value, trained[key]) for key, value in average.items())
    stock = ACTPolicy.from_pretrained(run / "checkpoints" / "last" / "pretrained_model_ema")
    assert all(torch.equal(value, average[key]) for key, value in stock.state_dict().items())


def test_a_resume_comes_to_the_same_bits(tmp_path: Path) -> None:
    whole, branch = train(tmp_path / "whole", *ON, "save_freq=2").output_dir, tmp_path / "branch"
    pusht_act.run(["mode=resume", f"resume.path={whole}/checkpoints/000002", f"steps={STEPS}", f"output_dir={branch}"])
    assert_same_bits(whole, branch)


def test_an_average_is_not_resumed(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *ON).output_dir
    average = run / "checkpoints" / "last" / "pretrained_model_ema"
    with pytest.raises(ValueError, match=r"is an average of the weights.*checkpoints/000006, or start from it with"):
        pusht_act.run(["mode=resume", f"resume.path={average}", "steps=9", f"output_dir={tmp_path / 'branch'}"])
    assert not (tmp_path / "branch" / "checkpoints").exists()


def test_it_can_begin_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train(tmp_path / "run").output_dir
    with caplog.at_level(logging.WARNING):
        pusht_act.run(["mode=resume", f"output_dir={run}", f"steps={STEPS + 2}", "ema.enable=true", "ema.decay=1"])
    assert f"has no average of the weights: it begins with those of step {STEPS}" in caplog.text
    begun = weights(run, "last", "pretrained_model_ema")
    assert all(torch.equal(value, begun[key]) for key, value in weights(run, STEPS).items())


@pytest.mark.parametrize("is_used", [True, False])
def test_it_is_what_evaluations_run(is_used: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"eval_freq={STEPS}", "env.episode_length=40", "eval.n_episodes=4", f"ema.use_for_eval={is_used}"]
    run = train(tmp_path / "run", *ON, *options)
    seeds = ["eval.start_seed=100000", "eval.n_episodes=4", "eval.batch_size=2"]
    results = {
        name: pusht_act.run(["mode=eval", f"checkpoint={run.output_dir}{name}", *seeds])
        for name in ("", "/checkpoints/last/pretrained_model", "/checkpoints/last/pretrained_model_ema")
    }
    printed = capsys.readouterr().out.splitlines()
    assert ("pretrained_model_ema:" in printed[0]) == is_used
    own, trained, average = (result.metrics["avg_max_reward"] for result in results.values())
    assert own == (average if is_used else trained) == run.metrics["avg_max_reward"]
    assert trained != average


def test_an_interrupted_evaluation_is_of_the_average(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *ON).output_dir
    start = find_checkpoint(str(run), "resume.path")
    assert start.model_dir.name == "pretrained_model"
    found = find_pending(start, TrainerState(step=STEPS, pending=[STEPS]), config(f"steps={STEPS}"))
    assert found == {STEPS: start.directory / "pretrained_model_ema"}
    assert start.evaluated == Checkpoint(start.directory / "pretrained_model_ema")


@pytest.mark.slow
def test_its_batch_norms_have_statistics_of_their_own(tmp_path: Path) -> None:
    image = ["env=pusht", "train.backbone_norm=batch", "policy.pretrained_backbone_weights=null", "ema.decay=0.9"]
    run = train(tmp_path / "run", *ON, *image).output_dir
    key = "model.backbone.layer1.0.bn1.running_var"
    trained, average = weights(run, "last"), weights(run, "last", "pretrained_model_ema")
    assert not torch.equal(trained[key], average[key])
    # Those of the average's weights: a run that begins with them has the same.
    branch = tmp_path / "branch"
    own = ["steps=1", f"+policy.pretrained_path={run}/checkpoints/last/pretrained_model_ema", "policy.optimizer_lr=0"]
    again = pusht_act.run(tiny_command(*image[:2], *own, "policy.optimizer_lr_backbone=0", f"output_dir={branch}"))
    assert torch.allclose(weights(again.output_dir, "last")[key], average[key], rtol=0.2)
