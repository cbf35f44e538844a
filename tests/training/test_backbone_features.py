"""train.freeze_backbone_at: the same training as from images with a frozen backbone, exact on resume, over ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

import pusht_act
from pusht_act.data.cache import cache_root
from pusht_act.data.loader import Batch
from pusht_act.job import Result
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits, metrics, train_on_two_ranks

IMAGES = ["env=pusht", "dataset=demos", "demos.n_episodes=2", "policy.dim_model=16", "policy.n_heads=2"]
WITHOUT_NOISE = ["+policy.dropout=0.0", "+policy.use_vae=false"]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return lambda name, *overrides: pusht_act.run(tiny_command(*IMAGES, f"output_dir={tmp_path / name}", *overrides))


def weights(run: Path, step: int, folder: str = "pretrained_model") -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/{step:06d}" / folder / "model.safetensors")


def resume(start: Path, step: int, name: str, *overrides: str) -> Path:
    """Resume the run in `start` from a step in a folder beside it."""
    branch = start.with_name(name)
    pusht_act.run(["mode=resume", f"resume.path={start}/checkpoints/{step:06d}", f"output_dir={branch}", *overrides])
    return branch


def identity(batch: Batch) -> Batch:
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_features_train_as_images_through_a_frozen_backbone_do(run: Run, probability: float) -> None:
    """A rate of 0 and frozen norms freeze a backbone, too."""
    options = ["steps=6", f"train.mirror={probability}", *WITHOUT_NOISE, "+optimizer.grad_clip_norm=0.0"]
    start = run("start", *options, "steps=2").output_dir
    features = resume(start, 2, "features", "steps=6", "train.freeze_backbone_at=2")
    images = resume(start, 2, "images", "steps=6", "train.backbone_norm=frozen", "policy.optimizer_lr_backbone=0")
    losses = [[line["train/loss"] for line in metrics(branch)] for branch in (features, images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for key, value in weights(images, 6).items():
        assert value == pytest.approx(weights(features, 6)[key], abs=1e-4), key


@pytest.mark.slow
def test_a_backbone_that_is_frozen_stays_and_the_run_resumes_to_the_same_bits(run: Run) -> None:
    """Before the backbone is frozen, at that step and after it, while evaluations and held-out losses come between."""
    options = [
        *("steps=7", "save_freq=2", "eval_freq=3", "dataset.eval_split=0.5", "eval_steps=2", "ema.enable=true"),
        *("train.freeze_backbone_at=4", "train.precision=bf16", "train.mirror=0.5", "train.state_noise=1"),
    ]
    whole = run("whole", *options).output_dir
    for name, before in weights(whole, 4, "pretrained_model_ema").items():
        after, average = weights(whole, 7)[name], weights(whole, 7, "pretrained_model_ema")[name]
        if name.startswith("model.backbone."):
            assert (after == before).all()
            assert (average == before).all(), "the average's backbone is the one that both have"
    for part in ("model.encoder.layers.0.linear1.weight", "model.encoder_img_feat_input_proj.weight"):
        assert (weights(whole, 7)[part] != weights(whole, 4)[part]).any(), "the rest learns on"
    for step in (2, 4, 6):
        branch = resume(whole, step, f"branch{step}", "steps=7")
        assert_same_bits(whole, branch)
        for prefix in ("train/", "eval/loss"):
            assert metrics(branch, prefix) == [line for line in metrics(whole, prefix) if line["step"] > step]
        # The evaluation of step 6 was under way when that step was saved, and is done again from the saved average.
        again = metrics(branch, "eval/pc_success")
        assert again == metrics(whole, "eval/pc_success")[-len(again) :]
    assert not [*cache_root().glob("features-*")], "nothing is left in the cache"


@pytest.mark.slow
def test_two_ranks_share_the_features_of_the_first(run: Run, tmp_path: Path) -> None:
    options = [*WITHOUT_NOISE, "batch_size=34", "steps=6", "train.freeze_backbone_at=3", "+optimizer.eps=1e-4"]
    one = run("one", *options).output_dir
    train_on_two_ranks(tiny_command(*IMAGES, *options, f"output_dir={tmp_path / 'two'}"))
    for a, b in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert a == pytest.approx(b, rel=3e-2)


def test_a_run_that_ends_before_does_not_freeze(run: Run) -> None:
    frozen, plain = (run(str(at), "steps=2", f"train.freeze_backbone_at={at}").output_dir for at in (2, "null"))
    assert_same_bits(frozen, plain)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.random_shift=2"], r"train.random_shift=2 would do nothing"),
        (["env=pusht_keypoints"], r"pusht_act/demos has no images"),
    ],
)
def test_what_would_do_nothing_is_refused(run: Run, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run("run", "train.freeze_backbone_at=2", *overrides)
    assert not (tmp_path / "run").exists()


def test_transforms_of_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images are not read, which transforms= may need"):
        pusht_act.run(
            tiny_command(*IMAGES, "train.freeze_backbone_at=2", f"output_dir={tmp_path / 'run'}"), transforms=[identity]
        )
