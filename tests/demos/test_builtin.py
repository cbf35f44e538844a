"""The demonstrations that come with the package."""

import re
from pathlib import Path

import numpy as np
import pytest

from pusht_act.demos import build_builtin, builtin
from pusht_act.demos.expert import demonstrate
from pusht_act.demos.replay import replay


@pytest.fixture
def fresh() -> object:
    """`builtin` without what it has read."""
    builtin._read.cache_clear()
    yield
    builtin._read.cache_clear()


def test_a_sample_succeeds_when_replayed() -> None:
    everything = builtin.load(2000)
    for made in everything[::100]:
        episode = replay(made.start, made.action)
        assert episode.success[-1]
        assert episode.coverage[-1] == pytest.approx(made.coverage, abs=1e-12)
        assert made.coverage > 0.95


def test_contents() -> None:
    everything = builtin.load(2000)
    seeds = [made.start for made in everything]
    assert len(set(seeds)) == 2000
    assert all(isinstance(seed, int) and seed >= 1_000_000 for seed in seeds)
    assert all(made.success and len(made.action) <= 300 for made in everything)
    assert {made.action.dtype for made in everything} == {np.dtype(np.float32)}
    assert builtin.load(7) == everything[:7] or [made.start for made in builtin.load(7)] == seeds[:7]
    assert builtin.PATH.stat().st_size < 2_000_000


def test_the_hash_in_the_code_is_that_of_the_content() -> None:
    with np.load(builtin.PATH, allow_pickle=False) as file:
        assert builtin.content_hash(file["seed"], file["length"], file["action"]) == builtin.SHA256
        changed = file["action"].copy()
        changed[123, 1] += 1e-3
        assert builtin.content_hash(file["seed"], file["length"], changed) != builtin.SHA256


@pytest.mark.parametrize("count", [0, -1, 2001])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count={count}: choose one in \[1, 2000\]"):
        builtin.load(count)


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: object) -> None:
    with np.load(builtin.PATH, allow_pickle=False) as file:
        arrays = dict(file)
    arrays["action"][0, 0] += 1
    np.savez(tmp_path / "other.npz", **arrays)
    monkeypatch.setattr(builtin, "PATH", tmp_path / "other.npz")
    with pytest.raises(ValueError, match="sha256"):
        builtin.load(1)


@pytest.mark.parametrize("content", [None, b"", b"not a zip file"])
def test_a_missing_or_broken_file_is_refused(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: object
) -> None:
    if content is not None:
        (tmp_path / "broken.npz").write_bytes(content)
    monkeypatch.setattr(builtin, "PATH", tmp_path / "broken.npz")
    with pytest.raises(ValueError, match=r"cannot be read .*install the package again"):
        builtin.load(1)


@pytest.mark.slow
def test_build_builtin_writes_file_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: object) -> None:
    source = tmp_path / "builtin.py"
    source.write_text(Path(builtin.__file__).read_text())
    monkeypatch.setattr(builtin, "PATH", tmp_path / "builtin.npz")
    monkeypatch.setattr(builtin, "__file__", str(source))
    made = build_builtin.collect_successes(2, workers=1)
    digest = build_builtin.write_builtin(made)
    assert re.findall(r'^SHA256 = "(.*)"$', source.read_text(), re.MULTILINE) == [digest]
    monkeypatch.setattr(builtin, "SHA256", digest)
    for one, other in zip(builtin.load(2), made, strict=True):
        assert (one.start, one.coverage) == (other.start, other.coverage)
        np.testing.assert_array_equal(one.action, other.action)


@pytest.mark.slow
def test_actions_that_miss_do_not_count() -> None:
    made = demonstrate(1_000_000)
    assert build_builtin.succeeds(made)
    missed = type(made)(made.start, made.action[:-10], made.executed[:-10], made.coverage, True)
    assert not build_builtin.succeeds(missed)
