"""Checkpoints: LeRobot's layout, complete or not there, damage is named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import pusht_act
from pusht_act.checkpoints import checkpoint_io as checkpoints
from pusht_act.job import Result

Tiny = Callable[..., Result]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.runs import TINY

    run = tmp_path_factory.mktemp("trained") / "run"
    pusht_act.run([*TINY, f"output_dir={run}", "steps=2"])
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def test_layout_is_lerobots_and_holds_no_pickle(run: Path) -> None:
    last = run / "checkpoints" / "last"
    assert {path.name for path in last.iterdir()} == {"pretrained_model", "training_state", "manifest.json"}
    listed = json.loads((last / "manifest.json").read_text())
    assert set(listed) == {str(path.relative_to(last)) for path in last.glob("*/*")}
    for name, entry in listed.items():
        content = (last / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {path.name for path in (last / "pretrained_model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "train_config.json",
        "policy_preprocessor.json",
        "policy_preprocessor_step_3_normalizer_processor.safetensors",
        "policy_postprocessor.json",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
        "pusht_act.json",
    }
    assert {path.name for path in (last / "training_state").iterdir()} == {
        "optimizer_param_groups.json",
        "optimizer_state.safetensors",
        "rng_state.safetensors",
        "training_step.json",
        "pusht_act.json",
    }


DAMAGED = [
    "pretrained_model/config.json",
    "pretrained_model/model.safetensors",
    "pretrained_model/policy_preprocessor.json",
    "pretrained_model/policy_preprocessor_step_3_normalizer_processor.safetensors",
    "pretrained_model/policy_postprocessor.json",
    "pretrained_model/pusht_act.json",
    "training_state/optimizer_param_groups.json",
    "training_state/optimizer_state.safetensors",
    "training_state/rng_state.safetensors",
    "training_state/training_step.json",
    "training_state/pusht_act.json",
]


@pytest.mark.parametrize("file", DAMAGED)
def test_without_a_manifest_a_truncated_file_is_named(run: Path, file: str) -> None:
    """As in a checkpoint of stock LeRobot; with one, see test_damaged_files.py."""
    last = run / "checkpoints" / "000002"
    (last / "manifest.json").unlink()
    path = last / file
    content = path.read_bytes()
    before = (run / "metrics.jsonl").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises((ValueError, OSError)) as caught:
        pusht_act.run(["mode=resume", f"resume.path={last}", f"output_dir={run}", "steps=4"])
    assert str(last) in str(caught.value), caught.value
    assert "\n" not in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000002", "last"]


def test_a_policy_of_another_kind_is_refused(run: Path) -> None:
    path = run / "checkpoints" / "000002" / "pretrained_model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"type": "diffusion"}))
    (run / "checkpoints" / "000002" / "manifest.json").unlink()
    for mode in (["mode=resume", f"output_dir={run}"], ["mode=eval", f"checkpoint={run}"]):
        with pytest.raises(ValueError, match="holds a policy of type diffusion"):
            pusht_act.run(mode)


def test_another_architecture_is_refused(run: Path) -> None:
    with pytest.raises(
        ValueError, match="policy.dim_model=64: .* was trained with policy.dim_model=32, which it keeps"
    ):
        pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4", "policy.dim_model=64"])


@pytest.mark.slow
def test_the_environments_observations_must_be_the_datas(run: Path) -> None:
    with pytest.raises(
        ValueError, match="env.obs_type=pixels_agent_pos: .* was trained with env.obs_type=environment_state"
    ):
        pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4", "env.obs_type=pixels_agent_pos"])


def test_a_data_set_must_have_what_the_environment_shows(keypoints_dataset: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has observation.environment_state.*give env=pusht_keypoints"):
        tiny("env=pusht", "dataset=pusht", f"dataset.root={keypoints_dataset}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_crash_while_saving_leaves_the_last_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is cut short lies under a hidden name and is replaced by the next save."""
    for doomed in ("save_optimizer_state", "fsync", "replace_dir"):
        with monkeypatch.context() as patch:

            def crash(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(checkpoints, doomed, crash)
            with pytest.raises(KeyboardInterrupt):
                pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4"])
        assert (run / "checkpoints" / "last").resolve().name == "000002"
        visible = [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")]
        assert sorted(visible) == ["000002", "last"]
    assert pusht_act.run(["mode=resume", f"output_dir={run}", "steps=4"]).step == 4
    assert not list((run / "checkpoints").glob(".*"))


def test_a_checkpoint_can_be_named_in_every_way(run: Path, tmp_path: Path) -> None:
    for name in (
        "",
        "checkpoints/last",
        "checkpoints/000002/pretrained_model",
        "checkpoints/000002/pretrained_model/config.json",
    ):
        result = pusht_act.run(
            ["mode=eval", f"checkpoint={run / name}", "eval.n_episodes=1", "eval.batch_size=1", "eval.n_videos=0"]
        )
        assert result.checkpoint == (run / "checkpoints" / "000002").resolve()


def test_a_checkpoint_moved_to_another_place_resumes_and_evaluates(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "elsewhere" / "model"
    shutil.copytree(run / "checkpoints" / "000002", bare)
    shutil.rmtree(run)
    assert pusht_act.run(["mode=resume", f"resume.path={bare}", f"output_dir={tmp_path / 'new'}", "steps=3"]).step == 3
    result = pusht_act.run(
        ["mode=eval", f"checkpoint={bare}", f"output_dir={tmp_path / 'e'}", "eval.n_episodes=1", "eval.batch_size=1"]
    )
    assert result.output_dir.parent == tmp_path / "e" / "eval"
