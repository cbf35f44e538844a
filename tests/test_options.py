"""Every option in every mode: it has its effect there, or it is refused in a line that says which modes use it.

The pairs of modes and options are generated from the schema and from the fields of LeRobot's sections. An option has
its effect where a small job of the mode reads it (helpers/reads.py), other than to check or to write it down.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import pusht_act
from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.merge_config import merge_checkpoint_config
from pusht_act.config.lerobot_fields import lerobot_fields
from pusht_act.config.options import Option
from pusht_act.config.overrides import check_overrides, is_fixed
from pusht_act.config.schema import TRAIN_MODES, Config, Mode
from pusht_act.config.validation import OPTIONS
from pusht_act.main import CONFIG_DIR
from pusht_act.runtime.errors import UserError
from tests.fixtures.make import FIXTURES
from tests.helpers.reads import recorded_reads
from tests.helpers.runs import tiny_command

SECTIONS = {each.name for each in fields(Config) if is_dataclass(each.type) or each.type == dict[str, Any]}
LEROBOTS = {f"{section}.{name}" for section, described in lerobot_fields().items() for name in described}
KEYS = sorted((OPTIONS.keys() | LEROBOTS) - SECTIONS - {"mode"})
PAIRS = [(mode, key) for mode in Mode for key in KEYS]

ONE_VALUE = {
    *("policy.type", "policy.n_obs_steps", "policy.use_peft", "policy.pretrained_revision"),
    *("env.task", "env.features", "env.features_map", "env.max_parallel_tasks", "env.disable_env_checker"),
    *("env.render_mode", "env.observation_height", "env.observation_width"),
    *("optimizer.lr", "optimizer.weight_decay"),
    *(f"dataset.{name}" for name in ("repo_type", "image_transforms", "video_backend", "return_uint8")),
    *("dataset.depth_output_unit", "dataset.streaming"),
}
"""Fields of LeRobot's of which any other value is refused, in config/refused.py."""
ELSEWHERE = {
    "train.max_rollbacks": "training/test_nan_guard.py",
    "checkpoints.keep_every": "checkpoints/test_retention.py",
    **dict.fromkeys(("policy.repo_id", "policy.private", "policy.tags", "policy.license"), "checkpoints/test_hub.py"),
    **dict.fromkeys(("dataset.root", "dataset.revision"), "data/test_data.py"),
    **dict.fromkeys(("scheduler.num_cycles", "scheduler.num_vqvae_training_steps"), "LeRobot's, of another schedule"),
    "dataset.observations": "data/test_choose_features.py",
    "dataset.allow_change": "training/test_other_dataset.py",
    **dict.fromkeys(("job_name", *(key for key in KEYS if key.startswith("wandb."))), "runs/test_wandb.py"),
    "demos.push_to_hub": "demos/test_dataset_card.py",
    "demos.repo_id": "demos/test_dataset_card.py",
    **dict.fromkeys(
        ("output_dir", "checkpoint", "dir", "resume.path", "overwrite"), "resolve.py reads them as composed"
    ),
}
"""Options that these jobs do not read, and where their effect is shown."""


def value_for(key: str) -> str:
    """Some value of the option's type."""
    kind = OPTIONS.get(key, Option()).kind
    return {bool: "true", int: "1", float: "1.0"}.get(kind, "x")  # type: ignore[arg-type]


@cache
def refusal(mode: Mode, key: str) -> str | None:
    """What is said of the option in a job of the mode."""
    cfg, node = composed(mode)
    HydraConfig.instance().set_config(node)
    with pytest.MonkeyPatch.context() as patched:
        # The same each time, and most of the time.
        patched.setattr("pusht_act.config.overrides.check_secrets", lambda _: None)
        try:
            check_overrides(cfg, [f"++{key}={value_for(key)}"])
        except UserError as error:
            return str(error)
    return None


@cache
def composed(mode: Mode) -> tuple[DictConfig, DictConfig]:
    """The configuration of a job of the mode, without and with Hydra's node."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        node = hydra.compose("config", [f"mode={mode.value}", "dataset=demos"], return_hydra_config=True)
    cfg = copy.deepcopy(node)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg, node


def kind_of(mode: Mode, key: str) -> str:
    """Whether the pair has an effect, or why another value is refused."""
    said = refusal(mode, key)
    if said is not None:
        return "for a sweep" if "is for a sweep" in said else "refused"
    if key in ONE_VALUE:
        return "one value"
    return "the checkpoint's" if is_fixed(key) and mode in (Mode.resume, Mode.eval) else "effect"


def test_each_pair_is_one_or_the_other() -> None:
    counts = Counter(kind_of(mode, key) for mode, key in PAIRS)
    print(f"{len(PAIRS)} pairs of {len(Mode)} modes and {len(KEYS)} options: {dict(counts)}")
    assert counts.total() == len(Mode) * len(KEYS) > 700
    assert counts["effect"] > 250
    assert counts["refused"] > 250


@pytest.mark.parametrize("mode", Mode)
def test_a_refusal_names_the_modes_that_use_the_option(mode: Mode) -> None:
    for key in KEYS:
        if (said := refusal(mode, key)) is None:
            continue
        assert said.removeprefix("++").startswith(f"{key}="), said
        assert "\n" not in said
        if "is for a sweep" in said:
            assert key.startswith(("sweep.", "cluster."))
            continue
        assert f", not for mode={mode.value}: " in said, said
        named = said.partition(" is for ")[2].partition(", not for")[0]
        users = [each for each in Mode if f"not for mode={each.value}" not in str(refusal(each, key))]
        if named == "every mode but mode=status":
            assert users == [each for each in Mode if each is not Mode.status], said
        else:
            assert users == [each for each in Mode if f"mode={each.value}" in named], said


@pytest.mark.parametrize("mode", [Mode.resume, Mode.eval])
@pytest.mark.parametrize("key", [key for key in KEYS if is_fixed(key)])
def test_what_follows_from_the_weights_stays_the_checkpoints(mode: Mode, key: str) -> None:
    checkpoint = Checkpoint(FIXTURES / "run" / "checkpoints" / "000006" / "pretrained_model")
    is_dict = "mapping" in key or "features" in key
    cfg = copy.deepcopy(composed(mode)[0])
    OmegaConf.update(cfg, key, {"STATE": "x"} if is_dict else 77, force_add=True)
    given = f"++{key}={{STATE: x}}" if is_dict else f"++{key}=77"
    if key.startswith("dataset.") and mode is Mode.eval:
        assert "not for mode=eval" in str(refusal(mode, key))
        return
    with pytest.raises(UserError, match=rf"^{key}\S*=.*: \S+/000006 was trained with {key}\S*=.* leave it out"):
        merge_checkpoint_config(cfg, checkpoint, [given], {}, resume=mode is Mode.resume)


class StoppedError(Exception):
    """Before anything is planned, which takes long."""


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], set[str]]:
    """What a small job of each mode reads, made when it is asked for."""
    folder = tmp_path_factory.mktemp("options")
    found: dict[Mode, set[str]] = {}
    jobs = _jobs(folder)

    def read(mode: Mode) -> set[str]:
        if mode not in found:
            if mode in (Mode.resume, Mode.eval, Mode.status):
                read(Mode.test)
            with pytest.MonkeyPatch.context() as patched, recorded_reads(patched) as keys:
                patched.setattr("pusht_act.checkpoints.hub.HfApi", MagicMock())
                patched.setattr("pusht_act.demos.generate.collect", MagicMock(side_effect=StoppedError))
                patched.setenv("HF_TOKEN", "none")
                try:
                    pusht_act.run(jobs[mode])
                except StoppedError:
                    assert mode is Mode.demos
            found[mode] = keys
        return found[mode]

    return read


def _jobs(folder: Path) -> dict[Mode, list[str]]:
    """A job of each mode that has something to do for every option."""
    trains = [
        *("steps=6", "demos.n_episodes=8", "dataset.eval_split=0.25", "eval_freq=2", "eval_steps=2", "save_freq=1"),
        *("ema.enable=true", "train.mirror=0.5", "eval.n_videos=1", "wandb.enable=true", "wandb.mode=disabled"),
        *("checkpoints.keep_last=5", "policy.push_to_hub=true", "policy.repo_id=me/act"),
        *("+scheduler.type=cosine_decay_with_warmup", "+scheduler.decay_lr=1e-5"),
        *("+scheduler.num_warmup_steps=1", "+scheduler.num_decay_steps=4", "+scheduler.peak_lr=1e-4"),
    ]
    logged = ["wandb.enable=true", "wandb.mode=disabled", "policy.push_to_hub=true"]
    return {
        Mode.test: [*tiny_command(*trains), f"output_dir={folder / 'run'}"],
        Mode.full: [
            *(each for each in tiny_command(*trains) if each != "mode=test"),
            *("mode=full", "resume.auto=true", f"output_dir={folder / 'full'}"),
        ],
        Mode.resume: [
            "mode=resume", f"resume.path={folder}/run/checkpoints/000002", f"output_dir={folder / 'branch'}",
            "steps=6", *logged,
        ],
        Mode.eval: ["mode=eval", f"checkpoint={folder / 'run'}", "eval.n_episodes=2", "eval.n_videos=1"],
        Mode.demos: ["mode=demos", "env=pusht_keypoints", "demos.n_episodes=1", f"output_dir={folder / 'demos'}"],
        Mode.status: ["mode=status", f"dir={folder / 'run'}"],
    }  # fmt: skip


def make_image_policy() -> None:
    """Make a policy with a backbone, which the jobs do without."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACT

    inputs = {"observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    ACT(ACTConfig(input_features=inputs, output_features=outputs, dim_model=8, pretrained_backbone_weights=None))


@pytest.mark.slow
@pytest.mark.parametrize("mode", Mode)
def test_what_is_accepted_is_read(mode: Mode, reads: Callable[[Mode], set[str]]) -> None:
    read = set(reads(mode))
    if mode in TRAIN_MODES:
        with pytest.MonkeyPatch.context() as patched, recorded_reads(patched) as more:
            make_image_policy()
        read |= more
    accepted = [key for key in KEYS if kind_of(mode, key) == "effect"]
    assert [key for key in accepted if key not in read and key not in ELSEWHERE] == []
