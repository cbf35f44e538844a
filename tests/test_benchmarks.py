"""The benchmarks run; what they measure is for a quiet machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = ("__init__.py", "measure.py", "clocked.py", "gpu_checks.py")
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in SHARED)


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
    assert "| first step     |" in printed


def test_the_suite_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "suite.json"
    printed = benchmark(
        "gpu_suite.py", "--device", "cpu", "--tiny", "--no-compile", "--batch-sizes", "4", "--steps", "2",
        "--warm-up", "1", "--precisions", "fp32", "--output", str(output),
    )  # fmt: skip
    record = json.loads(output.read_text())
    assert record["checks"] == {"pictures read ahead": "ok"}
    assert [row["side"] for row in record["rows"]] == ["plain", "compute", "stock"]
    row = record["rows"][0]
    hours = row["step, ms"] / 1000 * 100_000 / 3600
    assert (row["100,000 steps, h"], row["with evaluations, h"]) == pytest.approx((hours, hours + 40 * 30 / 3600))
    assert re.search(r"\| +4 \| fp32 +\| plain +\|", printed)


def test_the_curves_of_precision_stand_beside_those_of_seeds(tmp_path: Path) -> None:
    from tests.helpers.runs import TINY

    printed = benchmark(
        "precision_curves.py", "--steps", "5", "--seeds", "2", "--ways", "bf16", "--folder", str(tmp_path),
        "--overrides", *TINY,
    )  # fmt: skip
    rows = json.loads((tmp_path / "precision_curves.json").read_text())["rows"]
    assert [row[""] for row in rows] == ["fp32, seed 1", "fp32, seed 2", "bf16"]
    assert len({row["loss, fifth 1"] for row in rows}) == 3
    assert rows[0]["loss, fifth 1"] == pytest.approx(rows[2]["loss, fifth 1"], rel=0.05)
    assert "standard deviations from fp32" in printed
