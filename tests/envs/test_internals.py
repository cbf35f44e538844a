"""The private names of gym-pusht and pymunk that the package uses, and what other versions of them get to read."""

import importlib
from types import ModuleType

import numpy as np
import pymunk
import pytest
from pymunk._chipmunk_cffi import ffi, lib

from pusht_act.envs import gym_pusht_internals, physics
from pusht_act.envs.gym_pusht_internals import block_corners, controller, draw_screen, last_action, set_last_action
from pusht_act.envs.pusht import make_env
from pusht_act.runtime import versions


def test_gym_pushts_private_names_are_there() -> None:
    env = make_env()
    env.reset(seed=1)
    assert controller(env) == (10, 0.01, 100, 20)
    assert block_corners(env).shape == (8, 2)
    assert draw_screen(env).get_size() == (512, 512)
    assert last_action(env) is None
    env.step(np.array([3.0, 4.0]))
    assert last_action(env).tolist() == [3.0, 4.0]
    set_last_action(env, None)
    assert env._last_action is None


def test_pymunks_private_names_are_there() -> None:
    assert all(hasattr(lib, name) for name in physics._NAMES)
    space, body = pymunk.Space(), pymunk.Body(1.0, 1.0)
    assert {ffi.typeof(space._space).cname, ffi.typeof(body._body).cname} == {"struct cpSpace *", "struct cpBody *"}


@pytest.mark.parametrize(
    ("module", "package", "written_for"), [(gym_pusht_internals, "gym-pusht", "0.1.8"), (physics, "pymunk", "6")]
)
def test_another_version_is_refused(
    module: ModuleType, package: str, written_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(versions, "version", lambda _name: "9.9")
        message = rf"^{package} 9.9 is installed, but {module.__name__} uses private names of {package} {written_for}: "
        with pytest.raises(ValueError, match=message + f"install '{package}=={written_for}"):
            importlib.reload(module)
    importlib.reload(module)


def test_which_versions_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, fits in (("6", True), ("6.11.1", True), ("60.1", False), ("7.0", False)):
        monkeypatch.setattr(versions, "version", lambda _name, installed=installed: installed)
        if fits:
            versions.require_version("pymunk", "6", "me")
        else:
            with pytest.raises(ValueError, match="private names"):
                versions.require_version("pymunk", "6", "me")
