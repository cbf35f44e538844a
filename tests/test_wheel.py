"""A built wheel carries conf/ and works from an empty folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
SOURCES = ("pusht_act", "hydra_plugins", "conf", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is not installed"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel holds, unpacked; built from a copy, so that nothing is written into the checkout."""
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", built], cwd=source, check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    return site


def command(site: Path, cwd: Path, *arguments: str) -> str:
    """Without site-packages' own link to the checkout, PYTHONPATH comes first."""
    done = subprocess.run(
        [sys.executable, "-m", "pusht_act", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_all_of_conf(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}

    assert files(installed / "pusht_act" / "conf") == files(ROOT / "conf")


def test_the_wheel_holds_the_embedded_demonstrations(installed: Path) -> None:
    assert (installed / "pusht_act" / "demos" / "builtin.npz").is_file()


def test_the_wheel_holds_the_command_and_no_tests(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info")
    assert "pusht-act = pusht_act.main:command" in (metadata / "entry_points.txt").read_text()
    assert not (installed / "tests").exists()


def test_the_wheel_composes_and_answers_from_an_empty_folder(installed: Path, in_tmp: Path) -> None:
    config = OmegaConf.create(command(installed, in_tmp, "--cfg", "job", "mode=test", "policy=act_small"))
    assert (config.steps, config.policy.dim_model) == (10_000, 64)
    assert "Examples" in command(installed, in_tmp, "--help")
    assert list(in_tmp.iterdir()) == []


def test_it_is_the_wheels_own_configuration_that_is_read(installed: Path, in_tmp: Path) -> None:
    path = installed / "pusht_act" / "conf" / "mode" / "test.yaml"
    text = path.read_text()
    path.write_text(text.replace("10000", "123"))
    try:
        assert OmegaConf.create(command(installed, in_tmp, "--cfg", "job", "mode=test")).steps == 123
    finally:
        path.write_text(text)
