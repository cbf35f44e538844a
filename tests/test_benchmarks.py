"""The benchmarks run; what they measure is for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in ("measure.py", "clocked.py"))


def benchmark(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_explains_itself(script: str) -> None:
    assert f"python benchmarks/{script}" in benchmark(script, "--help")


def test_a_benchmark_prints_a_table_and_writes_what_it_depends_on(keypoints_dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "startup.json"
    printed = benchmark(
        "startup.py", "--data", str(keypoints_dataset), "--ours-only", "--repeats", "1", "--warm-up", "0",
        "--threads", "1", "--policy", "policy=act_small", "policy.dim_model=32", "--output", str(output),
    )  # fmt: skip
    record = json.loads(output.read_text())
    assert {"command", "date", "commit", "versions", "machine", "options", "rows"} <= record.keys()
    assert [row["from launch to"] for row in record["rows"]] == ["first step", "--help", "--cfg job", "a config error"]
    assert all(row["ours, s"] > 0 for row in record["rows"])
    assert "| first step |" in printed
