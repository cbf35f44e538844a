"""Runs compared bit by bit, and the configuration of a small policy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.act.configuration_act import ACTConfig
from safetensors.torch import load_file

from pusht_act.data.cache import FrameDataset
from pusht_act.data.open_dataset import policy_features


def state_files(run: Path, processes: int = 1) -> dict[str, Any]:
    """Return the tensors of a run's last checkpoint by file."""
    last = run / "checkpoints" / "last"
    tensors = {str(path.relative_to(last)): load_file(path) for path in last.rglob("*.safetensors")}
    models = len(list(last.glob("pretrained_model*")))
    assert len(tensors) == 3 * models + 1 + processes, "model and two processors each, optimizer, random streams"
    return tensors


def act(frames: FrameDataset, **options: Any) -> ACTConfig:
    """Return the configuration of a small ACT for `frames`."""
    inputs, outputs = policy_features(frames)
    return ACTConfig(
        device="cpu",
        input_features=inputs,
        output_features=outputs,
        pretrained_backbone_weights=None,
        chunk_size=10,
        n_action_steps=10,
        dim_model=32,
        n_heads=4,
        dim_feedforward=64,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        **options,
    )


def assert_same_bits(a: Path, b: Path, processes: int = 1) -> None:
    """Assert that the last checkpoints of two runs hold the same numbers to the bit."""
    first, second = state_files(a, processes), state_files(b, processes)
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[name][key]), (name, key)


def metrics(run: Path, prefix: str = "train/") -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have a key with `prefix`, without times and device."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("_s", "samples_per_s")  # also elapsed_s
    return [
        {k: v for k, v in line.items() if k not in ("time", "device") and not k.endswith(timings)}
        for line in lines
        if any(key.startswith(prefix) for key in line)
    ]


NORMALIZED = "+policy.normalization_mapping={VISUAL: MEAN_STD, STATE: MEAN_STD, ENV: MEAN_STD, ACTION: MEAN_STD}"


def train_on_two_ranks(command: list[str]) -> None:
    """Run `command` with torchrun in two processes; it has to succeed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pusht_act.main"]
    done = subprocess.run([sys.executable, *torchrun, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
