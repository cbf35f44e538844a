"""Mirror images, shifts and noise: what they do to a batch, who sees them, exact on resume."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lerobot.envs.configs import PushtEnv

import pusht_act
from pusht_act.data.builtin_demos import open_builtin_demos
from pusht_act.data.cache import FrameDataset
from pusht_act.data.mirror import reflect_image, reflect_keypoints, reflect_points, statistics_with_mirror_images
from pusht_act.demos import builtin
from pusht_act.demos.replay import replay
from pusht_act.job import Result
from pusht_act.policy.act import act_loss
from pusht_act.training.augmentation import add_state_noise, mirror, shift_image
from pusht_act.training.train_step import bind_loss
from tests.helpers.mirror import mirror_image
from tests.helpers.policies import policy_for
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits, metrics

Tiny = Callable[..., Result]
IMAGE, STATE, KEYPOINTS, ACTION = "observation.image", "observation.state", "observation.environment_state", "action"


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return lambda name, *overrides: pusht_act.run(tiny_command(f"output_dir={tmp_path / name}", *overrides))


def batch_of(rows: int = 64) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        IMAGE: torch.rand(rows, 3, 96, 96, generator=draw),
        STATE: torch.rand(rows, 2, generator=draw) * 512,
        KEYPOINTS: torch.rand(rows, 16, generator=draw) * 512,
        ACTION: torch.rand(rows, 8, 2, generator=draw) * 512,
        "action_is_pad": torch.zeros(rows, 8, dtype=torch.bool),
    }


def test_the_reflection_is_that_of_the_simulator() -> None:
    """What gym-pusht shows of a mirrored demonstration is the mirror image of what it shows of the demonstration."""
    (demo,) = builtin.load(1)
    shown, mirrored = replay(demo.start, demo.executed, image=True), replay(*mirror_image(demo), image=True)
    # Contacts amplify the last bits, and images are drawn in whole pixels.
    first = slice(0, 5)
    state, keypoints = (torch.from_numpy(each[first]) for each in (shown.observation_state, shown.environment_state))
    assert np.allclose(reflect_points(state), mirrored.observation_state[first], atol=1e-2)
    assert np.allclose(reflect_keypoints(keypoints), mirrored.environment_state[first], atol=1e-2)
    assert shown.image is not None
    assert mirrored.image is not None
    pixels = torch.from_numpy(shown.image[first]).permute(0, 3, 1, 2)
    there = torch.from_numpy(mirrored.image[first]).permute(0, 3, 1, 2)
    difference = (reflect_image(pixels).float() - there.float()).abs()
    assert difference.mean() < 2
    assert (pixels.float() - there.float()).abs().mean() > 4 * difference.mean()


@given(st.integers(0, 2**31 - 1))
def test_a_reflection_twice_is_none(seed: int) -> None:
    points = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 512
    assert torch.allclose(reflect_keypoints(reflect_keypoints(points)), points)
    image = points.reshape(3, 4, 4)
    assert torch.equal(reflect_image(reflect_image(image)), image)


def test_each_sample_is_mirrored_as_a_whole_or_not_at_all() -> None:
    batch = batch_of()
    torch.manual_seed(0)
    mixed = mirror(batch, 0.5, [IMAGE])
    wholly = mirror(batch, 1.0, [IMAGE])
    chosen = [not torch.equal(mixed[ACTION][row], batch[ACTION][row]) for row in range(64)]
    assert 16 < sum(chosen) < 48
    for row, is_mirrored in enumerate(chosen):
        source = wholly if is_mirrored else batch
        assert all(torch.equal(mixed[key][row], source[key][row]) for key in batch)
    assert all(not torch.equal(wholly[key], batch[key]) for key in (IMAGE, STATE, KEYPOINTS, ACTION))
    assert wholly["action_is_pad"] is batch["action_is_pad"]


def test_images_are_shifted_each_by_its_own_offset_and_the_border_is_repeated() -> None:
    batch, most = batch_of(), 3
    torch.manual_seed(0)
    shifted = shift_image(batch, IMAGE, most)[IMAGE]
    padded = torch.nn.functional.pad(batch[IMAGE], (most,) * 4, mode="replicate")
    offsets = set()
    for row in range(64):
        found = [
            (top, left)
            for top in range(2 * most + 1)
            for left in range(2 * most + 1)
            if torch.equal(padded[row, :, top : top + 96, left : left + 96], shifted[row])
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 25
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(7))


def test_noise_is_on_the_state_alone() -> None:
    batch = batch_of(4096)
    noisy = add_state_noise(batch, 3.0)
    assert float((noisy[STATE] - batch[STATE]).std()) == pytest.approx(3.0, rel=0.05)
    assert all(noisy[key] is batch[key] for key in batch if key != STATE)


def test_statistics_are_those_of_frames_and_mirror_images() -> None:
    frames = open_builtin_demos(3, PushtEnv(obs_type="environment_state_agent_pos"))
    statistics = statistics_with_mirror_images(frames)
    state = frames.arrays[STATE][:].astype(np.float64)
    both = np.concatenate([state, 512 - state[:, ::-1]])
    assert np.allclose(statistics[STATE]["mean"], both.mean(0))
    assert np.allclose(statistics[STATE]["std"], both.std(0))
    assert np.allclose(statistics[STATE]["max"], both.max(0))
    # The axis: x and 512 - y have the same distribution.
    mean = np.array(statistics["action"]["mean"])
    assert mean[0] == pytest.approx(512 - mean[1])
    assert statistics[KEYPOINTS].keys() == frames.stats[KEYPOINTS].keys()


def test_later_actions_weigh_less() -> None:
    policy, _ = policy_for(PushtEnv(obs_type="environment_state_agent_pos"), use_vae=False, dropout=0.0)
    batch = {
        STATE: torch.zeros(2, 2), KEYPOINTS: torch.zeros(2, 16),
        ACTION: torch.zeros(2, 12, 2), "action_is_pad": torch.zeros(2, 12, dtype=torch.bool),
    }  # fmt: skip
    with torch.no_grad():
        error = policy.eval().predict_action_chunk(batch).abs()
        weights = 0.5 ** torch.arange(12)
        expected = (error * (weights / weights.mean())[:, None]).mean()
        assert float(bind_loss(None, 0.5)(policy, batch)[0]) == pytest.approx(float(expected), rel=1e-5)
        assert float(bind_loss(None, 1.0)(policy, batch)[0]) == float(act_loss(policy, batch)[0])


@pytest.mark.parametrize(
    "option", ["train.mirror=0.5", "train.state_noise=5", "train.chunk_discount=0.9"], ids=lambda each: each
)
def test_an_option_changes_training_and_resumes_to_the_same_bits(option: str, tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("plain", "steps=6").output_dir
    whole = tiny("whole", "steps=6", "save_freq=2", option).output_dir
    assert [line["train/loss"] for line in metrics(plain)] != [line["train/loss"] for line in metrics(whole)]
    branch = tmp_path / "branch"
    again = ["mode=resume", f"resume.path={whole}/checkpoints/000002", "steps=6", f"output_dir={branch}"]
    pusht_act.run(again)
    assert_same_bits(whole, branch)


def test_a_shift_without_images_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.random_shift=4: pusht_act/demos has no images"):
        tiny("run", "train.random_shift=4")
    assert not (tmp_path / "run").exists()


def test_a_feature_without_a_known_mirror_image_is_refused() -> None:
    frames = open_builtin_demos(1, PushtEnv(obs_type="environment_state_agent_pos"))
    other = FrameDataset(
        "me/mine", {**frames.arrays, "observation.force": np.zeros((len(frames), 3), np.float32)}, frames.episodes,
        frames.tasks, frames.features, frames.stats, frames.fps,
    )  # fmt: skip
    from pusht_act.data.mirror import check_mirror

    with pytest.raises(ValueError, match=r"mirror image of observation.force \[3\] of me/mine is not known"):
        check_mirror(other)
