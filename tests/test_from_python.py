"""pusht_act.run within another Hydra application, in a thread and where nobody has configured logging."""

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import pusht_act
from pusht_act.job import Result
from pusht_act.main import CONFIG_DIR
from pusht_act.runtime.errors import UserError


def test_the_hydra_application_around_it_is_left_as_it_was(in_tmp: object) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        config = compose("config", ["seed=7"], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        for overrides in (["print_lerobot_command=true"], ["stepz=3"], ["mode=status", "dir=nowhere"]):
            with nullcontext() if "print" in overrides[0] else pytest.raises((UserError, FileNotFoundError)):
                pusht_act.run(overrides)
            assert HydraConfig.get().overrides.task == ["seed=7"]
            assert compose("config", ["seed=8"]).seed == 8
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.slow
def test_it_runs_in_a_thread(tiny: Callable[..., Result]) -> None:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(tiny()))
    thread.start()
    thread.join()
    assert results[0].step == 4


@pytest.mark.slow
def test_what_the_command_shows_is_shown_where_nobody_has_configured_logging(
    tiny: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    tiny()
    assert " INFO step 4/4: loss " in capsys.readouterr().err
    assert root.handlers == []


@pytest.mark.parametrize(
    "overrides",
    [["a"], ["=3"], ["~steps"], ["steps=${x}"], ["experiment=[a,b]"], ["policy=3"], ["hydra.mode=MULTIRUN"], [""], 3],
)
def test_what_is_wrong_is_one_of_the_documented_errors(overrides: list[str]) -> None:
    with pytest.raises((UserError, OSError)):
        pusht_act.run(overrides)
