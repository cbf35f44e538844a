"""An evaluation is a record: stored once under its identity, printed again at once, gone on with if interrupted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pusht_act
from pusht_act.evaluation.identity import digest
from pusht_act.evaluation.rollout import rollout
from pusht_act.job import Result
from tests.helpers.runs import TINY
from tests.helpers.wandb_runs import lines

Tiny = Callable[..., Result]
EVAL = ["mode=eval", "eval.n_episodes=5", "eval.batch_size=2", "eval.n_videos=0", "eval.workers=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    pusht_act.run([*TINY, "steps=2", "eval_freq=2", f"output_dir={run}"])
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def evaluated(checkpoint: Path | str, *overrides: str) -> Result:
    return pusht_act.run([*EVAL, f"checkpoint={checkpoint}", *overrides])


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a batch is run again")


@pytest.mark.slow
def test_another_option_is_another_record(run: Path) -> None:
    one = evaluated(run)
    before = {path: path.read_bytes() for path in one.output_dir.iterdir()}
    others = [
        evaluated(run, option).output_dir
        for option in (
            *("policy.n_action_steps=4", "eval.batch_size=5", "eval.start_seed=7", "eval.n_episodes=4"),
            "env.episode_length=9",
        )
    ]
    assert len({one.output_dir, *others}) == 6
    assert {path: path.read_bytes() for path in before} == before
    listed = lines(run / "evaluations.jsonl")
    assert [line["origin"] for line in listed] == ["training"] + ["mode=eval"] * 6
    assert [line["folder"] for line in listed[1:]] == [one.output_dir.name, *(path.name for path in others)]
    assert listed[2]["options"] == ["policy.n_action_steps=4"]
    assert {"identity", "step", "start_seed", "n_episodes", "pc_success", "avg_max_reward", "date"} <= listed[0].keys()
    in_training = json.loads((run / "eval" / listed[0]["folder"] / "metrics.json").read_text())
    assert in_training["command"] == lines(run / "runs.jsonl")[0]["command"]


def test_the_same_again_is_read_and_printed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluated(run)
    printed = capsys.readouterr().out
    assert f"; {first.output_dir}\n" in printed
    monkeypatch.setattr("pusht_act.evaluation.evaluate.rollout", refuse)
    for option in ("eval.n_videos=0", "eval.workers=2", "job_name=another"):
        again = evaluated(run, option)
        assert again.episodes == first.episodes
        assert again.metrics == first.metrics
        assert capsys.readouterr().out == printed
    assert len(lines(run / "evaluations.jsonl")) == 2
    with pytest.raises(AssertionError, match="run again"):
        evaluated(run, "overwrite=true")
    assert evaluated(run).episodes == first.episodes


def test_equal_values_are_one_identity_whatever_their_type() -> None:
    assert digest({"policy": {"a": False, "b": [2]}}) == digest({"policy": {"b": (2.0,), "a": 0}})
    assert digest({"policy": {"a": False}}) != digest({"policy": {"a": 1}})
    assert digest({"policy": {"a": None}}) != digest({"policy": {"a": 0}})


def test_videos_that_are_missing_are_added(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluated(run)
    before = {path.name: path.read_bytes() for path in first.output_dir.iterdir()}
    more = evaluated(run, "eval.n_videos=3")
    assert more.output_dir == first.output_dir
    assert [path.name for path in more.video_paths] == ["episode-0.mp4", "episode-1.mp4", "episode-2.mp4"]
    assert all(path.stat().st_size for path in more.video_paths)
    assert {name: (first.output_dir / name).read_bytes() for name in before} == before
    assert [path.name for path in (run / "eval").iterdir() if path.name.startswith(".")] == []
    monkeypatch.setattr("pusht_act.evaluation.evaluate.rollout", refuse)
    evaluated(run, "eval.n_videos=2")


def test_what_metrics_json_says(run: Path) -> None:
    result = evaluated(run, "policy.n_action_steps=4")
    found = json.loads((result.output_dir / "metrics.json").read_text())
    manifest = json.loads((run / "checkpoints/000002/manifest.json").read_text())
    assert found["identity"]["model"]["weights"] == manifest["pretrained_model/model.safetensors"]["sha256"]
    assert found["checkpoint"] == str(run / "checkpoints/000002")
    assert "policy.n_action_steps=4" in found["overrides"]
    assert found["command"].startswith("pusht-act mode=eval")
    assert {"commit", "versions", "machine", "date", "eval_s"} <= found.keys()
    assert found["step"] == 2
    assert found["avg_steps"] == pytest.approx(np.mean([episode.steps for episode in result.episodes]))
    assert found["avg_coverage"] == pytest.approx(np.mean([episode.coverage for episode in result.episodes]))


def test_the_episodes_have_their_starts_and_their_coverage(run: Path) -> None:
    result = evaluated(run)
    with np.load(result.output_dir / "episodes.npz") as found:
        assert found["seeds"].tolist() == [200000 + i for i in range(5)]
        assert found["starts"].shape == (5, 5)
        assert len(np.unique(found["starts"], axis=0)) == 5
        assert (found["starts"][:, :4] > 0).all()
        assert (found["starts"][:, :4] < 512).all()
        assert found["lengths"].tolist() == [episode.steps for episode in result.episodes]
        for episode, covered in zip(result.episodes, found["coverage"], strict=True):
            values = covered[~np.isnan(covered)]
            assert len(values) == episode.steps
            assert values[-1] == episode.coverage
            assert min(values.max() / 0.95, 1) == episode.max_reward


def test_an_interrupted_evaluation_goes_on_where_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluated(run, f"output_dir={run.parent / 'whole'}")
    begun = list[int]()

    def interrupted(actor: Any, envs: Any, spec: Any, seeds: Any, *rest: Any) -> Any:
        begun.append(seeds[0] - 200000)
        if begun == [0, 2, 4]:
            raise KeyboardInterrupt
        return rollout(actor, envs, spec, seeds, *rest)

    monkeypatch.setattr("pusht_act.evaluation.evaluate.rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run)
    assert not list(run.glob("eval/step*-200004_*"))
    result = evaluated(run)
    assert begun == [0, 2, 4, 4]
    assert [asdict(each) for each in result.episodes] == [asdict(each) for each in whole.episodes]
    for name in ("episodes.csv", "episodes.npz"):
        assert (result.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()
    assert sorted(path.name for path in result.output_dir.iterdir()) == ["episodes.csv", "episodes.npz", "metrics.json"]
    assert [path.name for path in (run / "eval").iterdir() if path.name.startswith(".")] == []


def test_two_at_once_do_not_disturb_each_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = list[Result]()

    def while_another_runs(*arguments: Any) -> Any:
        monkeypatch.setattr("pusht_act.evaluation.evaluate.rollout", rollout)
        # The lock is held: the second one is given a folder of its own, and is the first to be done.
        inner.append(evaluated(run))
        return rollout(*arguments)

    monkeypatch.setattr("pusht_act.evaluation.evaluate.rollout", while_another_runs)
    outer = evaluated(run)
    assert outer.episodes == inner[0].episodes
    assert outer.output_dir == inner[0].output_dir
    assert [path.name for path in (run / "eval").iterdir() if path.name.startswith(".")] == []
    assert "lock" not in [path.name for path in outer.output_dir.iterdir()]
    assert len(lines(run / "evaluations.jsonl")) == 2


def test_models_from_elsewhere_have_folders_of_their_own(run: Path, in_tmp: Path) -> None:
    pusht_act.run([*TINY, "steps=1", "seed=5", f"output_dir={in_tmp / 'other'}"])
    shutil.copytree(run / "checkpoints/000002/pretrained_model", in_tmp / "a/model")
    shutil.copytree(in_tmp / "other/checkpoints/000001/pretrained_model", in_tmp / "b/model")
    places = {evaluated(in_tmp / name / "model").output_dir.parents[1] for name in ("a", "b")}
    assert len(places) == 2
    for place in places:
        assert place.parent == Path("outputs/evaluations")
        assert place.name.startswith("model-")
        assert len(lines(place / "evaluations.jsonl")) == 1
    assert not (in_tmp / "outputs/act_pusht").exists()
