"""Checkpoints of others: weights that are not finite, statistics that are missing, files of another LeRobot."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pusht_act
from pusht_act.checkpoints.checkpoint import latest_valid
from pusht_act.checkpoints.processor_files import STATISTICS
from pusht_act.checkpoints.safe_loading import check_safe_to_load
from pusht_act.checkpoints.tensor_file import find_damage
from pusht_act.config.errors import explain
from pusht_act.main import CONFIG_DIR, USER_ERRORS
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.errors import UserError
from tests.helpers.runs import tiny_command

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run"
PRE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
POST = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a run, whose checkpoint has no manifest."""
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run", symlinks=True))
    (run / "checkpoints/000006/manifest.json").unlink()
    return run


@pytest.fixture
def model(run: Path) -> Path:
    return run / "checkpoints/000006/pretrained_model"


def refusal(model: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_safe_to_load(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_found(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.full((3,), torch.finfo(dtype).max, dtype=dtype), "n": torch.tensor([-1, 2**31 - 1])}
    save_file({**tensors, "b": torch.zeros(0, dtype=dtype)}, path)
    assert find_damage(path) is None
    save_file({**tensors, "b": torch.tensor([1.0, value], dtype=dtype)}, path)
    assert find_damage(path) == "is damaged (b is not finite)"


@pytest.mark.parametrize("name", ["model.safetensors", PRE, POST])
def test_a_model_with_numbers_that_are_not_finite_is_refused(name: str, model: Path) -> None:
    check_safe_to_load(model)
    key = sorted(load_file(model / name))[0]
    change(model / name, lambda tensors: tensors[key].view(-1)[:1].fill_(torch.nan))
    assert refusal(model) == f"{model / name} is damaged ({key} is not finite): give another checkpoint"


def test_a_resume_passes_over_weights_that_are_not_finite(run: Path, model: Path) -> None:
    older = Path(shutil.copytree(model.parent, run / "checkpoints/000004"))
    change(model / "model.safetensors", lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(torch.nan))
    found, wrong = latest_valid(RunDir(run))
    assert found is not None
    assert found.directory == older
    assert "pretrained_model/model.safetensors is damaged (" in wrong[0]
    assert "is not finite" in wrong[0]


@pytest.mark.parametrize(("file", "key"), [(PRE, "observation.state"), (PRE, "action"), (POST, "action")])
def test_each_feature_that_is_normalized_needs_its_statistics(file: str, key: str, model: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{key}.")]:
            tensors[name.replace(key, f"{key}s")] = tensors.pop(name)

    change(model / file, rename)
    said = refusal(model)
    assert said.startswith(f"{model / file} has no mean of {key}, which is normalized (")
    assert f"{key}s" in said


@pytest.mark.parametrize("mode", [mode for mode in STATISTICS if mode != "MEAN_STD"])
def test_what_is_needed_follows_from_the_mode(mode: str, model: Path) -> None:
    change(model / POST, lambda tensors: [tensors.pop(name) for name in [*tensors] if "min" in name or "q" in name])
    path = model / "policy_postprocessor.json"
    content = json.loads(path.read_text())
    content["steps"][0]["config"]["norm_map"]["ACTION"] = mode
    path.write_text(json.dumps(content))
    if mode == "IDENTITY":
        check_safe_to_load(model)
    else:
        assert f"{POST} has no {STATISTICS[mode][0]} of action" in refusal(model)


def test_statistics_of_another_shape_are_refused(model: Path) -> None:
    change(model / POST, lambda tensors: tensors.update({"action.std": torch.ones(3)}))
    assert f"{POST}: action.std has shape [3], the policy's is [2]" in refusal(model)


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_step_that_normalizes_is_needed(name: str, model: Path) -> None:
    content = json.loads((model / name).read_text())
    content["steps"] = [step for step in content["steps"] if "normalizer" not in step["registry_name"]]
    (model / name).write_text(json.dumps(content))
    assert f"{model / name} has no step " in refusal(model)


def test_a_model_of_an_older_lerobot_is_told_how_to_convert_it(model: Path) -> None:
    for path in model.glob("policy_*"):
        path.unlink()
    assert refusal(model).startswith(f"{model}/policy_preprocessor.json: the processors are missing")
    old = {"normalize_inputs.buffer_observation_state.mean": torch.zeros(2)}
    change(model / "model.safetensors", lambda tensors: tensors.update(old))
    said = refusal(model)
    assert "an older LeRobot wrote it" in said
    assert f"python -m lerobot.processor.migrate_policy_normalization --pretrained-path {model}`" in said


def test_a_model_of_a_newer_lerobot_is_called_one(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "compile_mode": None, "attention": "flash"}))
    said = refusal(model)
    assert said.startswith(f"{path} has attention, compile_mode, which LeRobot 0.6.1 does not know: it was written ")
    assert "by a newer LeRobot" in said


def test_an_environment_that_the_policy_cannot_look_at_is_refused(run: Path, model: Path, in_tmp: Path) -> None:
    evaluated = ["mode=eval", f"checkpoint={run}", "env.obs_type=pixels_agent_pos", "output_dir=out"]
    with pytest.raises(UserError, match="^env.obs_type=pixels_agent_pos: .* was trained with env.obs_type=env"):
        pusht_act.run(evaluated)
    # A model alone does not tell its environment.
    for name in ("pusht_act.json", "train_config.json"):
        (model / name).unlink()
    with pytest.raises(UserError, match="^env.obs_type=pixels_agent_pos observes .*, the checkpoint's policy looks "):
        pusht_act.run(evaluated)


@pytest.mark.parametrize(("key", "text"), [("repo_id", "x"), ("vision_backbone", "x"), ("device", "' of type ")])
def test_a_long_text_is_answered_at_once(key: str, text: str, run: Path, model: Path, in_tmp: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: text * (100_000 // len(text))}))
    begin = time.process_time()
    evaluated = ["mode=eval", f"checkpoint={run}", "eval.n_episodes=1", "eval.n_videos=0", "eval.workers=1"]
    try:
        pusht_act.run([*evaluated, "output_dir=out"])
    except USER_ERRORS as error:
        said = explain(error, CONFIG_DIR)
        assert len(said) < 3000
        assert "config.json" in said
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_a_checkpoint(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run = pusht_act.run(tiny_command(f"output_dir={tmp_path / 'run'}", "steps=1")).output_dir
    finally:
        os.umask(before)
    files: list[Any] = [path for path in (run / "checkpoints/000001").rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}
    assert any(path.suffix == ".safetensors" for path in files)
