"""The two ways between stock LeRobot and us, through stock's own command lines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pusht_act
from pusht_act.job import Result

pytestmark = pytest.mark.slow

Tiny = Callable[..., Result]


def lerobot(script: str, *flags: str) -> str:
    command = [sys.executable, "-m", f"lerobot.scripts.lerobot_{script}", *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def ours(tiny: Tiny, keypoints_dataset: Path) -> Path:
    return tiny("dataset=pusht_keypoints", f"dataset.root={keypoints_dataset}", "steps=3").output_dir


def test_stock_eval_runs_our_checkpoint_and_gets_our_numbers(ours: Path, tmp_path: Path) -> None:
    lerobot(
        "eval",
        f"--policy.path={ours}/checkpoints/last/pretrained_model",
        "--env.type=pusht",
        "--env.obs_type=environment_state_agent_pos",
        "--env.episode_length=12",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        "--eval.use_async_envs=false",
        "--policy.device=cpu",
        "--seed=400",
        f"--output_dir={tmp_path / 'stock'}",
    )
    stock = json.loads((tmp_path / "stock" / "eval_info.json").read_text())["overall"]
    mine = pusht_act.run(
        ["mode=eval", f"checkpoint={ours}", "eval.n_episodes=2", "eval.batch_size=2", "eval.start_seed=400"]
    ).metrics
    for name in ("pc_success", "avg_max_reward", "avg_sum_reward"):
        assert mine[name] == pytest.approx(stock[name], rel=1e-9), name


def test_stock_train_resumes_ours_and_we_resume_stocks(ours: Path, tmp_path: Path) -> None:
    train_config = ours / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    branch = tmp_path / "branch"
    flags = ["--steps=5", "--num_workers=0", "--env_eval_freq=0", f"--output_dir={branch}"]
    lerobot("train", f"--config_path={train_config}", "--resume=true", *flags)
    stock = branch / "checkpoints" / "000005"
    assert json.loads((stock / "training_state" / "training_step.json").read_text())["step"] == 5
    moved = branch.rename(tmp_path / "moved")  # as if it came from another machine
    result = pusht_act.run(
        ["mode=resume", f"resume.path={moved}/checkpoints/last", "steps=7", "policy.optimizer_lr=3e-5"]
    )
    assert (result.step, result.output_dir) == (7, moved)
    assert result.metrics["lr"] == 3e-5
    # The order goes on where stock stopped: 5 steps of 4 samples in an epoch of 71, then 2 of ours.
    state = json.loads((moved / "checkpoints/last/training_state/pusht_act.json").read_text())
    assert state["sampler"] == {"epoch": 0, "start_index": 28}
