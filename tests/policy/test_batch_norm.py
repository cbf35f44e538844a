"""Live batch norm: it trains by the batch, evaluates by exact statistics, and is stock's frozen layer on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.envs.configs import PushtEnv
from lerobot.policies.act.modeling_act import ACTPolicy
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from pusht_act.policy.act import act_loss, load_policy, make_policy
from pusht_act.policy.batch_norm import RESIDUAL_SCALE, LiveBatchNorm2d, live_norms, update_statistics
from tests.helpers.policies import policy_for


@pytest.fixture
def config() -> Any:
    return policy_for(PushtEnv(), use_vae=False, dropout=0.0)[0].config


def batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "observation.image": torch.rand(rows, 3, 96, 96, generator=draw) * 3,
        "observation.state": torch.rand(rows, 2, generator=draw),
        "action": torch.rand(rows, 12, 2, generator=draw),
        "action_is_pad": torch.zeros(rows, 12, dtype=torch.bool),
    }


def test_it_is_torchs_batch_norm_in_training_and_the_frozen_layer_otherwise() -> None:
    x = torch.rand(5, 7, 4, 3) * 9 + 100
    live, torchs, frozen = LiveBatchNorm2d(7), nn.BatchNorm2d(7), FrozenBatchNorm2d(7)
    assert torch.allclose(live.train()(x), torchs.train()(x), atol=1e-5)
    before = {key: value.clone() for key, value in live.state_dict().items()}
    assert before.keys() == frozen.state_dict().keys()
    assert torch.equal(live.running_mean, torch.zeros(7)), "training keeps no average"
    live.running_mean.fill_(100)
    frozen.load_state_dict(live.state_dict())
    assert torch.equal(live.eval()(x), frozen(x))


def test_a_single_value_per_channel_is_normalized_to_nothing() -> None:
    assert LiveBatchNorm2d(3).train()(torch.rand(1, 3, 1, 1)).abs().max() < 1e-3


def test_only_a_fresh_policy_with_batch_norm_is_changed(config: Any) -> None:
    torch.manual_seed(3)
    frozen = make_policy(config)
    torch.manual_seed(3)
    live = make_policy(config, "batch")
    assert (len(live_norms(frozen)), len(live_norms(live))) == (0, 20)
    # The same weights, parameters and state, but for the residual scale.
    assert [name for name, _ in live.named_parameters()] == [name for name, _ in frozen.named_parameters()]
    ours, stocks = live.state_dict(), frozen.state_dict()
    assert ours.keys() == stocks.keys()
    differing = {key for key in ours if not torch.equal(ours[key], stocks[key])}
    assert len(differing) == 8
    assert all(key.endswith("bn2.weight") and (ours[key] == RESIDUAL_SCALE).all() for key in differing)


def test_images_look_different_to_a_fresh_policy_with_batch_norm_alone(config: Any) -> None:
    """The reason for all of it: the spread between images, relative to the activations, after random layers."""
    spreads = {}
    for norm in ("frozen", "batch"):
        torch.manual_seed(0)
        policy = make_policy(config, norm).train()
        with torch.no_grad():
            features = policy.model.backbone(batch(16)["observation.image"])["feature_map"]
        spreads[norm] = float(features.std(0).mean() / features.abs().mean())
    assert spreads["batch"] > 4 * spreads["frozen"]


def test_statistics_are_those_of_all_batches(config: Any) -> None:
    policy = make_policy(config, "batch")
    parts = [batch(8, seed) for seed in range(4)]
    random_state = torch.get_rng_state()
    update_statistics(policy, parts)
    assert torch.equal(torch.get_rng_state(), random_state)
    # The first layer has nothing before it that is normalized by the batch: its statistics are those of all images.
    first = policy.model.backbone.conv1(torch.cat([part["observation.image"] for part in parts]))
    norm = live_norms(policy)[0]
    assert torch.allclose(norm.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, first.var((0, 2, 3), correction=0), rtol=1e-4)
    again = {key: value.clone() for key, value in policy.state_dict().items()}
    update_statistics(policy, parts)
    assert all(torch.equal(value, policy.state_dict()[key]) for key, value in again.items())


def test_evaluation_sees_nearly_what_training_saw(config: Any) -> None:
    policy = make_policy(config, "batch")
    data = batch(64)
    update_statistics(policy, [data])
    with torch.no_grad():
        trained, _ = act_loss(policy.train(), data)
        evaluated, _ = act_loss(policy.eval(), data)
    assert float(evaluated) == pytest.approx(float(trained), rel=1e-3)


def test_stock_reads_it_and_predicts_the_same(config: Any, tmp_path: Path) -> None:
    policy = make_policy(config, "batch")
    update_statistics(policy, [batch(16)])
    policy.save_pretrained(tmp_path)
    stock = ACTPolicy.from_pretrained(tmp_path).eval()
    loaded = load_policy(config, tmp_path, "batch").eval()
    assert len(live_norms(loaded)) == 20
    seen = batch(3, seed=9)
    with torch.inference_mode():
        expected = stock.predict_action_chunk(seen)
        assert torch.equal(policy.eval().predict_action_chunk(seen), expected)
        assert torch.equal(loaded.predict_action_chunk(seen), expected)
