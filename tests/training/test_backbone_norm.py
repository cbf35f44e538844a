"""Training from images: batch norm by the command line, exact on resume, over ranks; what is decided by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import pusht_act
from pusht_act.config.schema import Mode
from pusht_act.job import Result
from pusht_act.policy.backbone_weights import available_weights
from pusht_act.policy.torch_internals import cpu_has_bf16
from pusht_act.sweeps.backbone_weights import decide_for_sweep
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits, metrics, train_on_two_ranks

IMAGES = ["env=pusht", "dataset=demos", "demos.n_episodes=2", "policy.dim_model=16", "policy.n_heads=2"]
WITHOUT_NOISE = ["+policy.dropout=0.0", "+policy.use_vae=false"]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return lambda name, *overrides: pusht_act.run(tiny_command(*IMAGES, f"output_dir={tmp_path / name}", *overrides))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights-here"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


def chosen(run: Path) -> tuple[Any, Any, Any]:
    """The precision, norm and weights that a run's checkpoint says it was trained with."""
    config = json.loads((run / "checkpoints/last/pretrained_model/pusht_act.json").read_text())["config"]
    train, policy = config["train"], config["policy"]
    return train["precision"], train["backbone_norm"], policy["pretrained_backbone_weights"]


def norms(run: Path) -> dict[str, torch.Tensor]:
    weights = load_file(run / "checkpoints/last/pretrained_model/model.safetensors")
    return {key: value for key, value in weights.items() if "running_" in key}


@pytest.mark.slow
def test_random_weights_train_with_batch_norm_and_resume_to_the_same_bits(run: Run, tmp_path: Path) -> None:
    """With every augmentation, in bf16, while evaluations and held-out losses come between."""
    options = [
        *("steps=6", "save_freq=2", "eval_freq=3", "dataset.eval_split=0.5", "eval_steps=2"),
        *("train.precision=bf16", "train.mirror=0.5", "train.random_shift=2", "train.state_noise=1"),
    ]
    whole = run("whole", *options).output_dir
    assert chosen(whole) == ("bf16", "batch", None)
    assert all(value.std() > 0 for value in norms(whole).values()), "exact statistics, not the first ones"
    branch = tmp_path / "branch"
    pusht_act.run(["mode=resume", f"resume.path={whole}/checkpoints/000002", "steps=6", f"output_dir={branch}"])
    assert_same_bits(whole, branch)
    for prefix in ("train/", "eval/loss"):
        assert metrics(branch, prefix) == metrics(whole, prefix)[-len(metrics(branch, prefix)) :]


@pytest.mark.slow
def test_the_norm_is_an_option_and_follows_the_checkpoint(run: Run, tmp_path: Path) -> None:
    frozen = run("frozen", "steps=2", "train.backbone_norm=frozen").output_dir
    assert all(bool((value == key.endswith("var")).all()) for key, value in norms(frozen).items()), "0 and 1, for ever"
    tuned = run("tuned", "steps=1", f"+policy.pretrained_path={frozen}").output_dir
    assert chosen(tuned)[1] == "frozen"
    batch = run("batch", "steps=2").output_dir
    assert metrics(batch)[0]["train/loss"] != metrics(frozen)[0]["train/loss"]
    assert chosen(run("tuned_batch", "steps=1", f"+policy.pretrained_path={batch}").output_dir)[1] == "batch"


@pytest.mark.slow
def test_two_ranks_normalize_by_the_batch_of_both(run: Run, tmp_path: Path) -> None:
    """Over an epoch's end: 171 frames in batches of 34 leave one row, and a rank without any."""
    options = [*WITHOUT_NOISE, "batch_size=34", "steps=6", "+optimizer.eps=1e-4"]
    one = run("one", *options).output_dir
    train_on_two_ranks(tiny_command(*IMAGES, *options, f"output_dir={tmp_path / 'two'}"))
    for a, b in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert a == pytest.approx(b, rel=5e-3)


def test_precision_is_decided_by_the_processor_and_kept(tmp_path: Path) -> None:
    keypoints = tiny_command(f"output_dir={tmp_path / 'run'}", "train.precision=auto", "resume.auto=true")
    pusht_act.run(keypoints)
    assert chosen(tmp_path / "run")[0] == ("bf16" if cpu_has_bf16() else "fp32")
    # What another machine decided stays.
    path = tmp_path / "run/checkpoints/last/pretrained_model/pusht_act.json"
    other = "fp32" if cpu_has_bf16() else "bf16"
    path.write_text(
        path.read_text().replace(f'"precision": "{chosen(tmp_path / "run")[0]}"', f'"precision": "{other}"')
    )
    (path.parents[1] / "manifest.json").unlink()
    pusht_act.run([*(each for each in keypoints if not each.startswith("steps=")), "steps=6"])
    assert chosen(tmp_path / "run")[0] == other


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_without_imagenets_weights_the_run_starts_from_random_ones(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    result = run("run", "steps=1", "policy.pretrained_backbone_weights=auto")
    assert chosen(result.output_dir)[1:] == ("batch", None)
    said = [line for line in caplog.messages if "ImageNet" in line]
    assert len(said) == 1
    assert "the backbone starts from random weights, with batch norm" in said[0]


def test_a_cached_file_of_weights_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({}, folder / "resnet18-f37072fd.pth")
    assert available_weights("resnet18") == "ResNet18_Weights.IMAGENET1K_V1"


@pytest.mark.usefixtures("offline")
def test_a_sweep_decides_once(tmp_path: Path) -> None:
    def decided(env: str = "pixels_agent_pos") -> Any:
        cfg = OmegaConf.create(
            {
                "mode": Mode.full,
                "print_lerobot_command": False,
                "env": {"obs_type": env},
                "policy": {"pretrained_backbone_weights": "auto"},
            }
        )
        decide_for_sweep(cfg, tmp_path)
        return cfg.policy.pretrained_backbone_weights

    assert decided("environment_state_agent_pos") == "auto", "no backbone, nothing to decide"
    assert not any(tmp_path.iterdir())
    assert decided() is None
    # The network is there for the second job: it takes what the first one decided all the same.
    (tmp_path / "resnet18_weights.json").write_text('"ResNet18_Weights.IMAGENET1K_V1"')
    assert decided() == "ResNet18_Weights.IMAGENET1K_V1"
