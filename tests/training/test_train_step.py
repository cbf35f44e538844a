"""The step in all its ways, each against the plain one: precision, compiled, captured, channels last."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR

import pusht_act
from pusht_act.checkpoints.checkpoint_io import TrainComponents
from pusht_act.config.schema import TrainConfig
from pusht_act.data.cache import FrameDataset
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.loader import BatchLoader
from pusht_act.data.open_dataset import normalization_stats
from pusht_act.data.sampler import EpisodeSampler
from pusht_act.job import Result
from pusht_act.policy import act as policy_module
from pusht_act.policy.act import act_loss, make_policy, make_processors
from pusht_act.policy.optim import make_optimizer
from pusht_act.training import train_step as step_module
from pusht_act.training.cuda_graphs import WARM_UP, CudaGraphCallable, GraphBackend
from pusht_act.training.train_step import Loss, StepOptions, TrainStep, compile_loss
from tests.helpers.dataset_config import config as dataset_config
from tests.helpers.graph_backend import Operations
from tests.helpers.runs import tiny_command
from tests.helpers.training import act, assert_same_bits, metrics

Tiny = Callable[..., Result]
BATCH, RATE = 20, 2.0**-10
"""71 samples: an epoch's fourth batch is short. A rate that fp32 has exactly."""


def objects_of(frames: FrameDataset, **policy: Any) -> TrainComponents:
    config = act(frames, optimizer_lr_backbone=RATE, **policy)
    torch.manual_seed(0)
    made = make_policy(config)
    processors = make_processors(config, normalization_stats(frames, True))
    return TrainComponents(made, processors, make_optimizer(made, AdamWConfig(lr=RATE)), None)


def trained(
    frames: FrameDataset,
    objects: TrainComponents,
    steps: int,
    recorder: GraphBackend | None = None,
    precision: str | None = None,
    loss: Loss = act_loss,
) -> list[dict[str, float]]:
    """What each of `steps` steps returned."""
    samples, order = BatchLoader(frames, objects.policy.config.chunk_size, "cpu"), EpisodeSampler(frames, [0, 1, 2], 5)
    take_step = TrainStep(objects, samples, BATCH, StepOptions(10.0, precision, full_batch_loss=loss), recorder)
    torch.manual_seed(1)
    inputs = samples.iter_batches(order, BATCH)
    return [{k: v.item() for k, v in take_step(take_step.batch(next(inputs))).items()} for _ in range(steps)]


def weights(objects: TrainComponents) -> list[torch.Tensor]:
    return list(objects.policy.state_dict().values())


@pytest.fixture
def keypoints(keypoints_dataset: Path) -> FrameDataset:
    return open_lerobot_dataset(dataset_config(keypoints_dataset))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "use_vae", "precision"),
    [
        ("image_dataset", True, "fp32"),  # in bf16 a CPU without bf16 takes minutes
        ("keypoints_dataset", True, "fp32"),
        ("keypoints_dataset", True, "bf16"),
        ("keypoints_dataset", False, "fp32"),
    ],
)
def test_a_captured_step_is_the_plain_one_bit_for_bit(
    kind: str, use_vae: bool, precision: str, request: pytest.FixtureRequest
) -> None:
    """Over two epochs with a short batch each; the random numbers go on where the plain ones would."""
    frames = open_lerobot_dataset(dataset_config(request.getfixturevalue(kind)))
    plain, captured, recorder = objects_of(frames, use_vae=use_vae), objects_of(frames, use_vae=use_vae), Operations()
    expected = trained(frames, plain, 9, precision=precision)
    numbers = torch.get_rng_state()
    assert trained(frames, captured, 9, recorder, precision=precision) == expected
    assert torch.equal(torch.get_rng_state(), numbers)
    assert recorder.recorded == 2, "the batch and the step, nothing of which waits for the device"
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(captured), strict=True))
    assert len({losses["loss"] for losses in expected}) == 9


def test_a_captured_step_follows_the_schedule(keypoints: FrameDataset) -> None:
    runs = []
    for recorder, decay in ((None, 0.5), (Operations(), 0.5), (Operations(), 1.0)):
        made = objects_of(keypoints)
        objects = TrainComponents(made.policy, made.processors, made.optimizer, ExponentialLR(made.optimizer, decay))
        runs.append([losses["loss"] for losses in trained(keypoints, objects, 9, recorder)])
        assert objects.optimizer.param_groups[0]["lr"] == RATE * decay**9, "a number, for schedule and checkpoint"
        assert not objects.optimizer.param_groups[0]["capturable"]
    plain, captured, constant = runs
    assert captured == pytest.approx(plain, rel=1e-4)  # fp32's rates
    assert constant != pytest.approx(plain, rel=1e-4)


def test_what_cannot_be_captured_is_said_and_launched_operation_by_operation(
    keypoints: FrameDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Broken off after the backward pass, whose gradients must not count twice."""

    def that_waits(*arguments: Any) -> torch.Tensor:
        norm = clip_grad_norm_(*arguments)
        assert norm.item() > 0
        return norm

    monkeypatch.setattr(step_module, "clip_grad_norm_", that_waits)
    plain, captured = (objects_of(keypoints, use_vae=False, dropout=0.0) for _ in range(2))
    expected = trained(keypoints, plain, 7)
    recorder = Operations()
    assert trained(keypoints, captured, 7, recorder) == expected
    assert recorder.recorded == 1, "the batch"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.startswith("the step cannot be a CUDA graph (aten._local_scalar_dense.default waits for the device)")


def test_a_captured_function_takes_what_it_is_given_and_leaves_it(keypoints: FrameDataset) -> None:
    recorder = Operations()
    double = CudaGraphCallable("doubling", lambda inputs: {"y": inputs["x"] * 2, "name": "same"}, 3, recorder)
    given = [torch.full((3,), float(i)) for i in range(WARM_UP + 4)]
    for i, x in enumerate(given):
        outputs = double({"x": x})
        assert outputs["y"].tolist() == [2.0 * i] * 3
        assert outputs["name"] == "same"
        outputs.clear()
        assert double({"x": torch.ones(2)})["y"].tolist() == [2.0, 2.0]
    assert recorder.recorded == 1


@pytest.mark.slow
def test_emulated_bf16_is_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for given, expected in (([], False), (["train.precision=bf16"], emulated), (["+policy.use_amp=true"], emulated)):
        caplog.clear()
        pusht_act.run(tiny_command("steps=1", *given, "overwrite=true", f"output_dir={tmp_path / 'run'}"))
        assert ("many times slower than fp32" in caplog.text) is expected


def test_bf16_is_near_fp32_and_is_what_use_amp_asks_for(keypoints: FrameDataset) -> None:
    fp32 = [losses["loss"] for losses in trained(keypoints, objects_of(keypoints), 30)]
    bf16 = [losses["loss"] for losses in trained(keypoints, objects_of(keypoints), 30, precision="bf16")]
    amp = [losses["loss"] for losses in trained(keypoints, objects_of(keypoints, use_amp=True), 30)]
    assert bf16 == amp
    assert bf16 != fp32
    assert fp32[-1] < 0.5 * fp32[0]
    assert bf16 == pytest.approx(fp32, rel=0.1)


@pytest.mark.slow
def test_precision_of_a_run_is_trainings_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Evaluations go by policy.use_amp, so that mode=eval repeats them; a resumed run goes on in its precision."""
    losses = {}
    for name, given in (("fp32", []), ("bf16", ["train.precision=bf16"]), ("amp", ["+policy.use_amp=true"])):
        run = tiny("steps=4", "save_freq=2", "eval_freq=4", f"output_dir={tmp_path / name}", *given)
        losses[name] = metrics(run.output_dir)
        again = pusht_act.run(
            ["mode=eval", f"checkpoint={run.output_dir}", "eval.n_episodes=2", "eval.batch_size=2",
             "eval.start_seed=100000"]
        )  # fmt: skip
        assert {key: run.metrics[key] for key in again.metrics} == again.metrics
        saved = json.loads((run.output_dir / "checkpoints/last/pretrained_model/config.json").read_text())
        assert saved["use_amp"] is (name == "amp")
    assert losses["bf16"] == losses["amp"] != losses["fp32"]
    branch = tmp_path / "branch"
    pusht_act.run(["mode=resume", f"resume.path={tmp_path}/bf16/checkpoints/000002", "steps=4", f"output_dir={branch}"])
    assert_same_bits(tmp_path / "bf16", branch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train.precision=fp16"], "train.precision=fp16 is unknown: give train.precision=fp32, bf16 or auto"),
        (["train.precision=fp32", "+policy.use_amp=true"], "train.precision=fp32 contradicts policy.use_amp=true"),
        (["train.fast_dropout=true", "train.compile=true"], "train.fast_dropout=true: .* give train.compile=false"),
        (
            ["dataset=pusht", "train.precision=bf16", "print_lerobot_command=true"],
            "train.precision=bf16 has no equivalent.*policy.use_amp=true",
        ),
    ],
)
def test_a_precision_that_cannot_be_is_refused(tiny: Tiny, given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(*given)


@pytest.mark.slow
def test_one_size_is_compiled_once_and_no_name_changes(
    keypoints: FrameDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler at its end: the graph that one would get, over two epochs with a short batch each."""
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile_(function, backend=counter, **given))
    plain, compiled = objects_of(keypoints), objects_of(keypoints)
    expected = trained(keypoints, plain, 9)
    counter.clear()
    loss = compile_loss(act_loss, TrainConfig(compile=True), torch.device("cpu"))
    assert trained(keypoints, compiled, 9, loss=loss) == expected
    assert counter.frame_count == 2, "the trial and the loss"
    assert plain.policy.state_dict().keys() == compiled.policy.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(compiled), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_run_resumes_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    """Near the plain run, whose dropout draws other numbers; step 3 is an epoch's short batch, 71 = 32 + 32 + 7."""
    given = ["demos.n_episodes=1", "batch_size=32", "+policy.use_vae=false", "policy.n_encoder_layers=1"]
    given += ["steps=5", "save_freq=2"]
    plain = tiny(*given, f"output_dir={tmp_path / 'plain'}")
    whole = tiny(*given, "train.compile=true", f"output_dir={tmp_path / 'whole'}")
    branch = tmp_path / "branch"
    pusht_act.run(
        ["mode=resume", f"resume.path={whole.output_dir}/checkpoints/000002", "steps=5", f"output_dir={branch}"]
    )
    assert_same_bits(whole.output_dir, branch)
    expected, found = ([line["train/loss"] for line in metrics(run.output_dir)] for run in (plain, whole))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
def test_a_machine_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Asked for, an error; the device's default, a warning: here for a GPU that is not there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "none"),))
    with pytest.raises(ValueError, match="train.compile=true: nothing can be compiled on this machine .*=false"):
        compile_loss(act_loss, TrainConfig(compile=True), torch.device("cpu"))
    assert compile_loss(act_loss, TrainConfig(compile=None), torch.device("cpu")) is act_loss
    assert "compiled" not in caplog.text
    if not torch.cuda.is_available():
        assert compile_loss(act_loss, TrainConfig(compile=None), torch.device("cuda")) is act_loss
        assert "nothing can be compiled on this machine" in caplog.text


@pytest.mark.slow
def test_weights_that_lie_channels_last_are_saved_and_loaded_as_lerobots(
    tiny: Tiny, image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the files are stock's to read, and a resumed run is the whole one to the bit."""
    placed = policy_module._to_device
    monkeypatch.setattr(policy_module, "_to_device", lambda made: placed(made).to(memory_format=torch.channels_last))
    given = ["env=pusht", "dataset=pusht", f"dataset.root={image_dataset}", "steps=4", "save_freq=2"]
    whole, branch = tiny(*given).output_dir, tmp_path / "branch"
    pusht_act.run(["mode=resume", f"resume.path={whole}/checkpoints/000002", "steps=4", f"output_dir={branch}"])
    assert_same_bits(whole, branch)
    model = whole / "checkpoints/last/pretrained_model"
    ours = policy_module.load_policy(PreTrainedConfig.from_pretrained(model), model)
    assert not ours.model.backbone.conv1.weight.is_contiguous()
    stock = ACTPolicy.from_pretrained(model)
    assert stock.model.backbone.conv1.weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))
