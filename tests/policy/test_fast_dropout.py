"""Dropout by few random bits: what it does to numbers, where it is, and that a run with it resumes to the same bits."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import pusht_act
from pusht_act.config.schema import TrainConfig
from pusht_act.job import Result
from pusht_act.policy.fast_dropout import build_dropout, fast_dropout
from tests.helpers.training import assert_same_bits
from tests.helpers.wandb_runs import lines

Tiny = Callable[..., Result]
DROPS = ["+policy.use_vae=false", "+policy.dropout=0.1"]


@pytest.mark.slow
@given(p=st.floats(0.01, 0.9), shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_it_drops_as_many_and_keeps_the_mean(p: float, shape: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    given = torch.ones(*shape, 1000, requires_grad=True)
    with fast_dropout():
        dropped = F.dropout(given, p)
    share, deviation = (dropped == 0).float().mean().item(), math.sqrt(p * (1 - p) / given.numel())
    assert abs(share - p) < 6 * deviation + 2**-16
    kept = dropped[dropped != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=1e-3)
    dropped.sum().backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    assert torch.equal(given.grad, dropped), "what was dropped has no gradient"


def test_neighbours_are_dropped_independently() -> None:
    """The four that share 64 random bits, and those of two draws."""
    torch.manual_seed(0)
    with fast_dropout():
        dropped = (F.dropout(torch.ones(200_000, 8), 0.5) == 0).float()
    assert (torch.corrcoef(dropped.T) - torch.eye(8)).abs().max() < 0.015


def test_where_it_changes_nothing() -> None:
    given, stock = torch.randn(50, 50), F.dropout
    with fast_dropout():
        assert torch.equal(F.dropout(given, 0.3, training=False), given)
        assert torch.equal(F.dropout(given, 0.0), given)
        assert not F.dropout(given, 1.0).any()
        torch.manual_seed(1)
        drawn = F.dropout(given, 0.3)
    assert F.dropout is stock
    torch.manual_seed(1)
    assert not torch.equal(F.dropout(given, 0.3), drawn)


def test_attention_has_it_too() -> None:
    attention, given = torch.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True), torch.randn(2, 5, 16)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(attention(given, given, given)[0])
        torch.manual_seed(0)
        with fast_dropout():
            found.append(attention(given, given, given)[0])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in lines(run / "metrics.jsonl")]


@pytest.mark.slow
def test_when_a_run_has_it(tiny: Tiny, tmp_path: Path) -> None:
    """Where it is asked for, and where bf16 draws other numbers than stock's anyway."""
    ways = {
        "stock": [], "fast": ["train.fast_dropout=true"],
        "bf16": ["train.precision=bf16"], "bf16 fast": ["train.precision=bf16", "train.fast_dropout=true"],
        "bf16 stock": ["train.precision=bf16", "train.fast_dropout=false"],
    }  # fmt: skip
    found = {
        way: losses(tiny(*DROPS, *given, f"output_dir={tmp_path / way}").output_dir) for way, given in ways.items()
    }
    assert found["fast"] != found["stock"]
    assert found["fast"] == pytest.approx(found["stock"], rel=0.5)
    assert found["bf16"] == found["bf16 fast"]
    assert found["bf16"] != found["bf16 stock"]


def test_a_gpu_does_without() -> None:
    on_gpu = SimpleNamespace(device="cuda", use_amp=True)
    with pytest.raises(ValueError, match="train.fast_dropout=true is for a CPU.*: leave it out"):
        build_dropout(TrainConfig(fast_dropout=True, precision=None), on_gpu)
    assert build_dropout(TrainConfig(fast_dropout=None, precision=None, compile=None), on_gpu) is nullcontext


def test_a_run_with_it_resumes_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    given = [*DROPS, "train.fast_dropout=true", "save_freq=2"]
    whole, branch = tiny(*given).output_dir, tmp_path / "branch"
    pusht_act.run(["mode=resume", f"resume.path={whole}/checkpoints/000002", "steps=4", f"output_dir={branch}"])
    assert_same_bits(whole, branch)
