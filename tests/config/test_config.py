"""The composed configuration: the parameter table of the old scripts, the groups, the schema."""

import ast
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from pusht_act.config import schema
from pusht_act.config.schema import Config
from pusht_act.config.validation import to_config
from pusht_act.main import CONFIG_DIR

CONF = Path(CONFIG_DIR)
TABLE = [  # key, default, another value: one row for each of the scripts' parameters
    ("dataset.repo_id", "lerobot/pusht", "me/pusht"),
    ("env.type", "pusht", None),
    ("policy.type", "act", None),
    ("policy.device", "auto", "cpu"),
    ("policy.chunk_size", 100, 60),
    ("policy.n_action_steps", 50, 16),
    ("policy.kl_weight", 10, 5.5),
    ("policy.dim_model", 512, 256),
    ("steps", 100_000, 7),
    ("batch_size", 32, 8),
    ("policy.optimizer_lr", 1e-4, 2e-5),
    ("policy.optimizer_lr_backbone", 1e-4, 2e-5),
    ("eval_freq", 2500, 0),
    ("save_checkpoint", True, False),
    ("save_freq", 5000, 0),
    ("output_dir", "outputs/act_pusht/train", "elsewhere"),
    ("job_name", "act_pusht", "other"),
    ("policy.repo_id", "YOUR_PROJECT_NAME/act_pusht", "me/act"),
    ("policy.push_to_hub", False, True),
    ("wandb.enable", True, False),
    ("wandb.project", "lerobot_pusht", "other"),
]
FROM_SCRATCH = "policy.pretrained_backbone_weights=null"
"""LeRobot knows no `auto`, which a job replaces before it asks LeRobot."""


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        cfg: DictConfig = hydra.compose("config", list(overrides))
    return cfg


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"policy.chunk_size": 100, ...} of a composed configuration."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}".strip(".")).items()}


def values(*overrides: str) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(compose(*overrides), resolve=True, enum_to_str=True)
    return flat(plain)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def no_project_name() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("YOUR_PROJECT_NAME", raising=False)
        yield


@pytest.fixture(scope="module")
def full(no_project_name: None) -> dict[str, Any]:
    return values("mode=full", "policy=act", "env=pusht")


@pytest.fixture(scope="module")
def overridden(no_project_name: None) -> dict[str, Any]:
    return values(*(f"{key}={other}" for key, _, other in TABLE if other is not None))


@pytest.mark.parametrize(("key", "default"), [row[:2] for row in TABLE])
def test_the_parameter_table_is_the_default(key: str, default: Any, full: dict[str, Any]) -> None:
    assert (full[key], type(full[key])) == (default, type(default))


def test_full_training_of_act_on_pusht_is_what_no_argument_means(full: dict[str, Any]) -> None:
    assert values() == full


@pytest.mark.parametrize(("key", "other"), [(key, other) for key, _, other in TABLE if other is not None])
def test_each_parameter_can_be_overridden(key: str, other: Any, overridden: dict[str, Any]) -> None:
    assert overridden[key] == other


def test_the_modes_differ_from_full_as_documented(full: dict[str, Any]) -> None:
    def changes(mode: str) -> dict[str, Any]:
        return {key: value for key, value in values(f"mode={mode}").items() if value != full[key]}

    assert changes("test") == {"mode": "test", "steps": 10_000, "output_dir": "outputs/act_pusht/test"}
    assert changes("resume") == {"mode": "resume", "steps": 150_000, "wandb.enable": False}
    assert changes("eval") == {
        "mode": "eval", "wandb.enable": False, "eval.n_episodes": 500, "eval.start_seed": 200_000,
    }  # fmt: skip


def test_selection_and_report_use_seeds_apart_from_each_other_and_from_the_demonstrations() -> None:
    training, report = values(), values("mode=eval")
    selection = range(training["eval.start_seed"], training["eval.start_seed"] + training["eval.n_episodes"])
    assert min(selection) > 205
    assert report["eval.start_seed"] not in selection
    assert report["eval.start_seed"] > max(selection)


def test_the_job_name_names_the_output_directory() -> None:
    assert values("job_name=wide")["output_dir"] == "outputs/wide/train"
    assert values("job_name=wide", "mode=test")["output_dir"] == "outputs/wide/test"


def test_the_project_name_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOUR_PROJECT_NAME", "lab")
    assert values()["policy.repo_id"] == "lab/act_pusht"


def test_keypoints_bring_their_data_set_unless_another_is_given() -> None:
    assert values("env=pusht_keypoints")["dataset.repo_id"] == "lerobot/pusht_keypoints"
    assert values("env=pusht_keypoints")["env.obs_type"] == "environment_state_agent_pos"
    assert values("env=pusht_keypoints", "dataset=demos")["dataset.repo_id"] == "pusht_act/demos"
    assert values("env=pusht")["dataset.repo_id"] == "lerobot/pusht"


def test_act_small_is_act_with_smaller_layers_and_no_downloaded_weights() -> None:
    act, small = values("policy=act"), values("policy=act_small")
    assert small["policy.dim_model"] < act["policy.dim_model"]
    assert small["policy.pretrained_backbone_weights"] is None
    assert all(small[key] == act[key] for key in ("policy.chunk_size", "policy.n_action_steps", "policy.kl_weight"))


@pytest.mark.slow
def test_every_combination_of_groups_composes() -> None:
    groups = ("mode", "policy", "env", "dataset", "logging")
    for combination in itertools.product(*map(choices, groups)):
        overrides = [f"{group}={choice}" for group, choice in zip(groups, combination, strict=True)]
        given = {"mode=eval": ["checkpoint=x"], "mode=status": ["dir=x"]}.get(overrides[0], [])
        config = to_config(compose(*overrides, *given))
        assert config.mode.value == combination[0]
        assert config.wandb.enable == (combination[4] == "wandb")


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes(name: str) -> None:
    to_config(compose(f"experiment={name}"))


def classes() -> list[ast.ClassDef]:
    nodes = ast.parse(inspect.getsource(schema)).body
    return [n for n in nodes if isinstance(n, ast.ClassDef) and any(isinstance(s, ast.AnnAssign) for s in n.body)]


def test_every_field_of_the_schema_is_explained_below_it() -> None:
    sections = {node.name for node in classes()}  # explained by their own docstrings
    for node in classes():
        assert ast.get_docstring(node), node.name
        for statement, after in itertools.pairwise([*node.body, None]):
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.annotation) not in sections:
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert explained, f"{node.name}.{ast.unparse(statement.target)}"


def test_every_field_of_the_schema_has_a_default_in_conf() -> None:
    fields = flat(OmegaConf.to_container(OmegaConf.structured(Config)))
    assert "eval.start_seed" in fields
    composed = compose()
    missing = [key for key in fields if OmegaConf.select(composed, key, default="?", throw_on_missing=True) == "?"]
    assert missing == []


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("+policy.dropout=0.2", "dropout", 0.2),
        ("+policy.latent_dim=16", "latent_dim", 16),
        ("+policy.pre_norm=true", "pre_norm", True),
        ("+policy.n_decoder_layers=7", "n_decoder_layers", 7),
        ("+policy.feedforward_activation=gelu", "feedforward_activation", "gelu"),
        ("policy.dim_model=256", "dim_model", 256),
        ("policy.optimizer_lr=3e-5", "optimizer_lr", 3e-5),
    ],
)
def test_every_field_of_lerobots_act_is_reached(override: str, field: str, value: Any) -> None:
    from pusht_act.config.lerobot import decode

    assert getattr(decode(to_config(compose(override, FROM_SCRATCH))).policy, field) == value


def test_fields_of_the_other_sections_reach_lerobot() -> None:
    from pusht_act.config.lerobot import decode

    lerobot = decode(
        to_config(
            compose(
                FROM_SCRATCH,
                *("env.episode_length=40", "+dataset.use_imagenet_stats=false", "+dataset.episodes=[0,2]"),
                *("+optimizer.grad_clip_norm=1", "+optimizer.betas=[0.9,0.95]", "+policy.optimizer_weight_decay=0.1"),
                *("+scheduler.type=constant_with_warmup", "+scheduler.num_warmup_steps=5"),
            )
        )
    )
    assert lerobot.env.episode_length == 40
    assert not lerobot.dataset.use_imagenet_stats
    assert lerobot.dataset.episodes == [0, 2]
    assert (lerobot.optimizer.grad_clip_norm, lerobot.optimizer.betas) == (1, (0.9, 0.95))
    assert (lerobot.optimizer.lr, lerobot.optimizer.weight_decay) == (1e-4, 0.1)  # the policy's
    assert lerobot.scheduler is not None
    assert lerobot.scheduler.num_warmup_steps == 5


def test_auto_takes_cuda_when_there_is_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from pusht_act.config.lerobot import _say_device, resolve_device

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    _say_device.cache_clear()
    with caplog.at_level("INFO"):
        assert resolve_device("auto") == resolve_device("auto") == expected
    assert caplog.text.count(f"device: {expected}") == 1, "not for each job of a sweep"
    assert resolve_device("cpu") == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    from pusht_act.config.lerobot import resolve_device

    with pytest.raises(ValueError, match="policy.device=cuda is not on this machine"):
        resolve_device("cuda")
