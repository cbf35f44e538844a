"""What is used of the private interfaces of Hydra and submitit is still there, and does what it did."""

from importlib.metadata import version
from pathlib import Path

import pytest

from pusht_act.sweeps.hydra_internals import HYDRA_VERSION, expand_grid, is_basic_sweeper
from pusht_act.sweeps.submitit_internals import SUBMITIT_VERSION, make_sbatch_script


@pytest.mark.parametrize(
    ("package", "written_for", "module"),
    [("hydra-core", HYDRA_VERSION, "hydra_internals"), ("submitit", SUBMITIT_VERSION, "submitit_internals")],
)
def test_a_library_is_of_the_version_that_its_internals_were_read_in(
    package: str, written_for: str, module: str
) -> None:
    installed = version(package)
    assert installed.startswith(f"{written_for}."), (
        f"pusht_act/sweeps/{module}.py was written for {package} {written_for}, this is {installed}: read its sources "
        "again, then raise the version there and the bound in pyproject.toml"
    )


def test_a_grid_is_in_hydras_order() -> None:
    assert expand_grid(["a=1,2", "b=x", "c=range(2)"]) == [
        ["a=1", "b=x", "c=0"], ["a=1", "b=x", "c=1"], ["a=2", "b=x", "c=0"], ["a=2", "b=x", "c=1"],
    ]  # fmt: skip
    assert expand_grid(["a=choice(1"]) == []
    assert is_basic_sweeper("hydra._internal.core_plugins.basic_sweeper.BasicSweeper")
    assert not is_basic_sweeper("hydra_plugins.pusht_act_optuna.OptunaSweeper")


def test_a_script_is_submitits() -> None:
    options = {
        "mem_gb": 7,
        "timeout_min": 60,
        "name": "me",
        "cpus_per_task": 2,
        "array_parallelism": 2,
        "gpus_per_node": None,
    }
    lines = make_sbatch_script(Path("/logs/%j"), options, 3).splitlines()
    expected = ("--array=0-2%2", "--mem=7GB", "--time=60", "--job-name=me", "--cpus-per-task=2", "--open-mode=append")
    assert {f"#SBATCH {line}" for line in expected} <= set(lines)
    assert not any("gpu" in line for line in lines)
    assert lines[-1].endswith("-u -m submitit.core._submit /logs/%j")
    assert "--array" not in "".join(make_sbatch_script(Path("/logs/%j"), options, 1))
