"""Training: parity with LeRobot's own step, exact resume, what is logged, what stops it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lerobot.optim import AdamWConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from safetensors.torch import load_file, save_file

import pusht_act
from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.loader import BatchLoader
from pusht_act.data.open_dataset import normalization_stats
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.job import Result
from pusht_act.policy.act import act_loss, make_policy, make_processors
from pusht_act.policy.optim import make_optimizer
from pusht_act.runtime.errors import UserError
from pusht_act.training.train_step import StepOptions, train_step
from tests.helpers.dataset_config import config as dataset_config
from tests.helpers.sampling import some_not_slow
from tests.helpers.training import NORMALIZED, act, assert_same_bits, metrics

Tiny = Callable[..., Result]


@pytest.mark.parametrize("kind", ["image_dataset", "keypoints_dataset"])
@pytest.mark.parametrize("use_vae", [True, False])
def test_loss_is_lerobots(kind: str, use_vae: bool, request: pytest.FixtureRequest) -> None:
    frames = open_lerobot_dataset(dataset_config(request.getfixturevalue(kind)))
    config = act(frames, use_vae=use_vae, kl_weight=3.0)
    policy, pre = make_policy(config), make_processors(config, normalization_stats(frames, True)).pre
    batch = pre(BatchLoader(frames, config.chunk_size, "cpu").batch(torch.tensor([0, 20, 22, 50, 70])))
    for training in (True, False):
        policy.train(training)
        torch.manual_seed(0)
        stock, stock_parts = policy.forward(batch)
        torch.manual_seed(0)
        ours, parts = act_loss(policy, batch)
        assert ours.item() == stock.item()
        assert {key: value.item() for key, value in parts.items()} == stock_parts


@pytest.mark.parametrize("kind", some_not_slow(["keypoints_dataset", "image_dataset"], every=2))
def test_first_twenty_losses_and_gradient_norms_are_lerobots(kind: str, request: pytest.FixtureRequest) -> None:
    """Parity of the step: the same weights, batches and noise through LeRobot's `update_policy` and ours, in fp32."""
    frames = open_lerobot_dataset(dataset_config(request.getfixturevalue(kind)))
    config = act(frames)
    stats = normalization_stats(frames, True)

    def losses(step: Callable[[ACTPolicy, Any, Any], tuple[float, float]]) -> list[tuple[float, float]]:
        torch.manual_seed(1)
        policy = make_policy(config)
        optimizer = make_optimizer(policy, AdamWConfig(lr=1e-3))
        pre, data = make_processors(config, stats).pre, BatchLoader(frames, config.chunk_size, "cpu")
        order = EpisodeSampler(frames, [0, 1, 2], seed=5)
        torch.manual_seed(2)
        return [step(policy, optimizer, pre(data.batch(order.next_batch(8)))) for _ in range(20)]

    def ours(policy: ACTPolicy, optimizer: Any, batch: Any) -> tuple[float, float]:
        values = train_step(TrainComponents(policy, None, optimizer, None), batch, StepOptions(10.0))  # type: ignore[arg-type]
        return values["loss"].item(), values["grad_norm"].item()

    accelerator = Accelerator(cpu=True)

    def stock(policy: ACTPolicy, optimizer: Any, batch: Any) -> tuple[float, float]:
        meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
        tracker, _ = update_policy(
            MetricsTracker(8, len(frames), 3, meters), policy, batch, optimizer, 10.0, accelerator=accelerator
        )
        return tracker.loss.avg, tracker.grad_norm.avg

    for a, b in zip(losses(ours), losses(stock), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_the_fused_update_is_that_of_lerobots_adamw(keypoints_dataset: Path) -> None:
    """To a rounding; gradients that a ReLU cuts off can differ by more some steps later."""
    frames = open_lerobot_dataset(dataset_config(keypoints_dataset))
    config, adamw = act(frames), AdamWConfig(lr=1e-3, weight_decay=0.1, betas=(0.8, 0.99))
    torch.manual_seed(0)
    fused, plain = make_policy(config), make_policy(config)
    plain.load_state_dict(fused.state_dict())
    optimizers = make_optimizer(fused, adamw), adamw.build(plain.get_optim_params())
    assert all(group["fused"] for group in optimizers[0].param_groups)
    for _ in range(3):
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("at", some_not_slow([3, 20], every=2))
def test_n_steps_resume_n_more_equals_2n_bit_for_bit(tiny: Tiny, tmp_path: Path, scheduler: bool, at: int) -> None:
    """On the CPU; step 20 is in a later epoch, step 3 within a logging window of 7."""
    cosine = "+scheduler={type: cosine_annealing_with_warmup, num_warmup_steps: 2}"
    options = ["log_freq=7", "batch_size=32", "demos.n_episodes=2", *([cosine] if scheduler else [])]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny(*options, f"steps={2 * at}", f"save_freq={at}", f"output_dir={whole}")
    # Saved at `at` by the same command, stopped there: with steps=at a schedule would already be over.
    tiny(*options, f"steps={2 * at}", f"save_freq={at}", f"output_dir={parts}")
    run = parts / "checkpoints"
    (run / "last").unlink()
    (run / "last").symlink_to(f"{at:06d}")
    result = pusht_act.run(["mode=resume", f"output_dir={parts}", f"steps={2 * at}"])
    assert result.step == 2 * at
    assert_same_bits(whole, parts)
    assert metrics(whole) == metrics(parts)


@pytest.mark.slow
def test_learning_rates_given_on_resume_take_effect(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("steps=2").output_dir
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4"])
    assert metrics(run)[-1]["train/lr"] == 1e-4
    pusht_act.run(
        ["mode=resume", f"output_dir={run}", "steps=6", "policy.optimizer_lr=3e-5", "policy.optimizer_lr_backbone=7e-6"]
    )
    assert metrics(run)[-1]["train/lr"] == 3e-5
    groups = json.loads((run / "checkpoints/last/training_state/optimizer_param_groups.json").read_text())
    assert [group["lr"] for group in groups] == [3e-5, 7e-6]


def test_options_of_the_optimizer_and_schedule_take_effect(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("steps=3", f"output_dir={tmp_path / 'a'}").output_dir
    other = tiny(
        "steps=3", f"output_dir={tmp_path / 'b'}", "+optimizer.betas=[0.5,0.9]", "+policy.optimizer_weight_decay=0.3",
        "+scheduler={type: cosine_annealing_with_warmup, num_warmup_steps: 2}",
    ).output_dir  # fmt: skip
    group = json.loads((other / "checkpoints/last/training_state/optimizer_param_groups.json").read_text())[0]
    assert (group["betas"], group["weight_decay"]) == ([0.5, 0.9], 0.3)
    assert metrics(plain)[-1]["train/lr"] == 1e-4
    assert metrics(other)[-1]["train/lr"] < 1e-4
    clipped = tiny("steps=3", f"output_dir={tmp_path / 'c'}", "+optimizer.grad_clip_norm=1e-6").output_dir
    assert metrics(clipped)[-1]["train/loss"] != metrics(plain)[-1]["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["seed=7", "batch_size=5", "policy.kl_weight=1", "+policy.use_amp=true", NORMALIZED])
def test_an_option_changes_the_losses(tiny: Tiny, tmp_path: Path, option: str) -> None:
    a = tiny("steps=2", f"output_dir={tmp_path / 'a'}").output_dir
    b = tiny("steps=2", f"output_dir={tmp_path / 'b'}", option).output_dir
    same = tiny("steps=2", f"output_dir={tmp_path / 'c'}").output_dir
    assert metrics(a) == metrics(same)
    assert metrics(a) != metrics(b)


def test_validation_loss_on_held_out_episodes(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("dataset.eval_split=0.25", "eval_steps=2", "steps=4").output_dir
    losses = [line["eval/loss"] for line in metrics(run, "eval/loss")]
    assert len(losses) == 2
    assert losses[0] != losses[1]


def test_frequencies(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("steps=7", "log_freq=3", "save_freq=2", "eval_freq=4").output_dir
    assert [line["step"] for line in metrics(run)] == [3, 6, 7]
    assert [line["step"] for line in metrics(run, "eval/")] == [4, 7]
    saved = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"000002", "000004", "000006", "000007", "last", "best"} <= saved
    assert (run / "checkpoints" / "last").resolve().name == "000007"
    off = tiny("steps=2", "save_checkpoint=false", f"output_dir={tmp_path / 'off'}").output_dir
    assert not (off / "checkpoints").exists()


@pytest.mark.slow
def test_best_is_the_best_evaluation_and_the_disk_does_not_fill_with_former_ones(tiny: Tiny) -> None:
    run = tiny("steps=12", "eval_freq=1", "save_freq=0", "env.episode_length=40", "policy.optimizer_lr=1e-2").output_dir
    scores = {line["step"]: (line["eval/pc_success"], line["eval/avg_max_reward"]) for line in metrics(run, "eval/")}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert int((run / "checkpoints" / "best").resolve().name) == best
    folders = {path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
    assert folders == {f"{best:06d}", "000012"}


def test_the_run_directory_tells_where_it_comes_from(tiny: Tiny) -> None:
    run = tiny("steps=1").output_dir
    entry = json.loads((run / "runs.jsonl").read_text().splitlines()[0])
    assert "steps=1" in entry["command"]
    assert entry["versions"]["lerobot"] == "0.6.1"
    assert entry["versions"]["gym-pusht"] == "0.1.8"
    assert "steps: 1" in (run / "config.yaml").read_text()
    assert "run directory" in (run / "train.log").read_text()


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_resumed(tiny: Tiny) -> None:
    run = tiny("steps=2").output_dir
    model = run / "checkpoints" / "000002" / "pretrained_model" / "model.safetensors"
    weights = load_file(model)
    save_file({key: torch.full_like(value, torch.nan) for key, value in weights.items()}, model)
    (run / "checkpoints" / "000002" / "manifest.json").unlink()
    before = model.read_bytes()
    with pytest.raises(UserError, match=r"000002: .*model\.safetensors is damaged \(.* is not finite\)"):
        pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4", "log_freq=0"])
    assert (run / "checkpoints" / "last").resolve().name == "000002"
    assert model.read_bytes() == before
    assert metrics(run)[-1]["step"] == 2, "nothing broken is logged as progress"


def test_another_batch_size_on_resume_goes_on_in_the_order(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("steps=3", "batch_size=4").output_dir
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=5", "batch_size=2"])
    state = json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text())
    assert state["sampler"] == {"epoch": 0, "start_index": 3 * 4 + 2 * 2}


def test_branching_off_leaves_the_first_run_alone(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("steps=4", "save_freq=2").output_dir
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    new = tmp_path / "new"
    pusht_act.run(["mode=resume", f"resume.path={run}/checkpoints/000002", f"output_dir={new}", "steps=4"])
    assert_same_bits(run, new)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="its run has reached 4"):
        pusht_act.run(["mode=resume", f"resume.path={run}/checkpoints/000002", "steps=4"])


def test_overwrite_moves_the_old_run_aside(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("steps=1").output_dir
    with pytest.raises(FileExistsError, match="mode=resume.*job_name=.*overwrite=true"):
        tiny("steps=2")
    assert tiny("steps=2", "overwrite=true").step == 2
    assert (tmp_path / "run.old-1" / "checkpoints" / "000001").is_dir()
    assert (run / "checkpoints" / "last").resolve().name == "000002"


def test_a_refused_overwrite_moves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    run = tiny("steps=1").output_dir
    with pytest.raises(ValueError, match="eval_split"):
        tiny("steps=2", "overwrite=true", "dataset.eval_split=0.99", "demos.n_episodes=1")
    assert (run / "checkpoints" / "000001").is_dir()


def test_a_normalization_that_leaves_something_out_is_refused(tiny: Tiny) -> None:
    """LeRobot replaces its whole mapping by the one given, and the actions would go unnormalized."""
    with pytest.raises(ValueError, match="says nothing of VISUAL, ACTION"):
        tiny("+policy.normalization_mapping={STATE: MEAN_STD}")


def test_noise_and_initialisation_are_apart(keypoints_dataset: Path) -> None:
    """Dropout's stream does not depend on how many numbers initialisation drew."""
    from pusht_act.runtime.seeding import seed_initialisation, seed_training_noise

    frames = open_lerobot_dataset(dataset_config(keypoints_dataset))
    draws = []
    for width in (32, 64):
        seed_initialisation(3)
        make_policy(dataclasses.replace(act(frames), dim_model=width))
        seed_training_noise(3)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)
