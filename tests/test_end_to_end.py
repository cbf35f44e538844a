"""Each mode through the real command line, in an empty folder, as a user types it; and the README's commands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pusht_act.config.validation import to_config
from pusht_act.main import CONFIG_DIR
from tests.helpers.runs import TINY

README = (Path(__file__).parents[1] / "README.md").read_text()


def pusht_act(*overrides: str) -> str:
    """All that the command prints; it must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pusht_act", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_every_mode(in_tmp: Path) -> None:
    tiny = [option for option in TINY if not option.startswith(("mode=", "steps="))]
    shown = pusht_act("mode=test", *tiny, "steps=4", "eval_freq=4", "wandb.enable=true")
    assert "step 4/4: loss" in shown
    assert re.search(r"success \d+\.\d % \(95 %: \d+\.\d to \d+\.\d\)", shown)
    assert "so the run is kept here; `wandb sync" in shown
    run = in_tmp / "outputs" / "act_pusht" / "test"
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1

    shown = pusht_act("mode=resume", "output_dir=outputs/act_pusht/test", "steps=6")
    assert "step 6/6: loss" in shown
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2, "mode=resume keeps the run's trackers"

    shown = pusht_act("mode=eval", "checkpoint=outputs/act_pusht/test", "eval.n_episodes=2", "eval.batch_size=2")
    assert "seeds 200000 to 200001" in shown

    pusht_act("mode=full", *tiny, "steps=2")
    assert (in_tmp / "outputs/act_pusht/train/checkpoints/last/pretrained_model/model.safetensors").is_file()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert sorted(path.name for path in in_tmp.iterdir()) == ["outputs"]


def readme_commands() -> list[str]:
    commands = re.findall(r"^pusht-act .*$", README, flags=re.MULTILINE)
    commands += re.findall(r"`(pusht-act [^`]*)`", README)
    return [c for c in commands if "..." not in c and "--" not in c]


@pytest.mark.parametrize("command", readme_commands())
def test_the_readmes_commands_compose(command: str) -> None:
    overrides = [word for word in shlex.split(command)[1:] if word != "-m" and "interval(" not in word]
    # Of a sweep the first job.
    overrides = [re.sub(r"=([^,\[{]+),.*", r"=\1", word) for word in overrides if not word.startswith("hydra.sweep")]
    with initialize_config_dir(config_dir=CONFIG_DIR, version_base="1.3"):
        to_config(compose("config", overrides))


def test_the_readmes_commands_are_found() -> None:
    assert len(readme_commands()) >= 5


@pytest.mark.slow
def test_the_readmes_first_command_trains_and_evaluates(in_tmp: Path) -> None:
    match = re.search(r"uv run -q (pusht-act .*)$", README, flags=re.MULTILINE)
    assert match is not None
    short = ["steps=20", "demos.n_episodes=4", "eval.n_episodes=2", "eval.batch_size=2", "env.episode_length=20"]
    shown = pusht_act(*shlex.split(match[1])[1:], *short)
    assert "seeds 100000 to 100001" in shown
    assert list(in_tmp.glob("outputs/quickstart/train/eval/*/film_strip.png"))
