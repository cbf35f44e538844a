"""mode=resume and mode=eval go on with the checkpoint's configuration; the command line's values replace it."""

import json
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lerobot.configs.default import DatasetConfig, EvalConfig, WandBConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import PushtEnv
from lerobot.optim import AdamWConfig, LRSchedulerConfig, OptimizerConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.transforms import ImageTransformsConfig
from omegaconf import OmegaConf

import pusht_act
from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.checkpoints.merge_config import merge_checkpoint_config
from pusht_act.config.lerobot import decode
from pusht_act.config.schema import Config
from pusht_act.config.validation import to_config
from pusht_act.main import CONFIG_DIR
from tests.helpers.runs import TINY

pytestmark = pytest.mark.slow

STATE = PolicyFeature(FeatureType.STATE, (2,))
KEYPOINTS = PolicyFeature(FeatureType.ENV, (16,))


def inherited(checkpoint: Checkpoint, *overrides: str, mode: str = "resume") -> Config:
    """What the command `mode=MODE OVERRIDES` makes of a checkpoint's configuration."""
    given = [f"mode={mode}", *overrides] + (["checkpoint=x"] if mode == "eval" else [])
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        cfg = hydra.compose("config", given, return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    choices = dict(cfg.pop("hydra").runtime.choices)
    return to_config(merge_checkpoint_config(cfg, checkpoint, given, choices, resume=mode == "resume"))


def checkpoint_of(run: Path) -> Checkpoint:
    return Checkpoint(run / "checkpoints" / "last" / "pretrained_model")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Ours: TINY, with an option in each section that is neither a default nor TINY's."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    options = [
        *("seed=7", "job_name=other", "dataset.eval_split=0.25", "+policy.dropout=0.3", "policy.kl_weight=3"),
        *("+optimizer.grad_clip_norm=2", "wandb.project=elsewhere", "eval.start_seed=123", "save_freq=2"),
        *("+scheduler.type=constant_with_warmup", "+scheduler.num_warmup_steps=2", "+env.visualization_width=200"),
    ]
    pusht_act.run([*TINY, f"output_dir={folder}", *options])
    return checkpoint_of(folder)


def test_a_resume_is_the_run_that_was_begun(ours: Checkpoint) -> None:
    config = inherited(ours)
    begun = json.loads((ours.model_dir / "pusht_act.json").read_text())["config"]
    for key in ("seed", "batch_size", "log_freq", "eval_freq", "save_freq", "job_name", "env", "dataset", "demos"):
        assert _plain(getattr(config, key)) == begun[key], key
    assert config.optimizer == {"grad_clip_norm": 2}
    assert config.scheduler == {"type": "constant_with_warmup", "num_warmup_steps": 2}
    assert (config.policy["dropout"], config.policy["kl_weight"], config.policy["chunk_size"]) == (0.3, 3, 8)
    assert (config.eval.start_seed, config.wandb.project) == (123, "elsewhere")


def test_a_field_younger_than_the_checkpoint_has_its_default(ours: Checkpoint, tmp_path: Path) -> None:
    older = Checkpoint(Path(shutil.copytree(ours.model_dir, tmp_path / "pretrained_model")))
    record = json.loads((older.model_dir / "pusht_act.json").read_text())
    record["config"]["demos"] = {"n_episodes": 4}
    (older.model_dir / "pusht_act.json").write_text(json.dumps(record))
    demos = inherited(older).demos
    assert (demos.n_episodes, demos.start_seed, demos.coverage) == (4, 2_000_000, 0.97)


def _plain(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dataclass_fields__") else value


def test_the_present_command_decides_how_far_and_where_a_resume_goes(ours: Checkpoint) -> None:
    config = inherited(ours)
    assert (config.mode.value, config.steps, config.output_dir) == ("resume", 150_000, "outputs/act_pusht/train")
    assert config.wandb.enable is False  # as in the run
    assert config.policy["device"] == "auto"  # another machine may have another one
    assert inherited(ours, "steps=9", "output_dir=there").output_dir == "there"


def test_wandb_can_be_switched_on_for_a_resume_and_keeps_its_project(ours: Checkpoint) -> None:
    wandb = inherited(ours, "logging=wandb").wandb
    assert (wandb.enable, wandb.project) == (True, "elsewhere")
    assert inherited(ours, "wandb.enable=true").wandb.enable


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("batch_size=2", "batch_size", 2),
        ("seed=8", "seed", 8),
        ("policy.optimizer_lr=3e-5", "policy.optimizer_lr", 3e-5),
        ("+policy.dropout=0.1", "policy.dropout", 0.1),
        ("policy.kl_weight=10", "policy.kl_weight", 10),  # the default, said aloud
        ("dataset.root=/elsewhere", "dataset.root", "/elsewhere"),
        ("+optimizer.grad_clip_norm=5", "optimizer.grad_clip_norm", 5),
        ("env.episode_length=77", "env.episode_length", 77),
        ("eval.n_episodes=3", "eval.n_episodes", 3),
        ("wandb.project=third", "wandb.project", "third"),
        ("job_name=third", "job_name", "third"),
    ],
)
def test_values_of_the_command_line_win(override: str, key: str, value: Any, ours: Checkpoint) -> None:
    extra = ["dataset.repo_id=lerobot/pusht_keypoints"] if key == "dataset.root" else []
    config = inherited(ours, override, *extra)
    assert OmegaConf.select(OmegaConf.structured(config), key) == value


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.fixed_dictionaries({}, optional={
    "batch_size": st.integers(1, 99), "seed": st.integers(0, 99), "policy.kl_weight": st.integers(0, 99),
    "policy.n_action_steps": st.integers(1, 8), "eval.n_episodes": st.integers(1, 99), "save_freq": st.integers(0, 99),
}))  # fmt: skip
def test_each_value_is_the_commands_or_else_the_checkpoints(values: dict[str, int], ours: Checkpoint) -> None:
    keys = ("batch_size", "seed", "policy.kl_weight", "policy.n_action_steps", "eval.n_episodes", "save_freq")

    def flat(config: Config) -> dict[str, Any]:
        return {key: OmegaConf.select(OmegaConf.structured(config), key) for key in keys}

    assert flat(inherited(ours, *(f"{k}={v}" for k, v in values.items()))) == flat(inherited(ours)) | values


def test_an_evaluation_takes_policy_and_environment_from_the_checkpoint(ours: Checkpoint) -> None:
    config = inherited(ours, mode="eval")
    assert (config.policy["dim_model"], config.policy["dropout"]) == (32, 0.3)
    assert config.env["obs_type"] == "environment_state_agent_pos"
    assert (config.env["episode_length"], config.job_name) == (12, "other")
    assert (config.eval.n_episodes, config.eval.start_seed) == (500, 200_000)  # mode=eval's own
    assert inherited(ours, "policy.n_action_steps=2", mode="eval").policy["n_action_steps"] == 2


@pytest.mark.parametrize("mode", ["resume", "eval"])
@pytest.mark.parametrize("group", ["policy=act", "env=pusht", "dataset=pusht", "experiment=quickstart"])
def test_another_choice_of_a_group_is_refused(group: str, mode: str, ours: Checkpoint) -> None:
    with pytest.raises(ValueError, match=rf"{group}: the checkpoint .* brings its own.* give single values instead"):
        inherited(ours, group, mode=mode)


@pytest.mark.parametrize("mode", ["resume", "eval"])
def test_the_checkpoints_own_choice_of_a_group_may_be_said_again(mode: str, ours: Checkpoint) -> None:
    said = inherited(ours, "policy=act_small", "env=pusht_keypoints", "dataset=demos", mode=mode)
    unsaid = inherited(ours, mode=mode)
    assert (said.policy, said.env) == (unsaid.policy, unsaid.env)  # the checkpoint's values, not the group's
    assert mode == "eval" or said.dataset == unsaid.dataset


def test_an_option_of_the_checkpoint_cannot_be_deleted(ours: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"~policy.kl_weight.*give policy.kl_weight=VALUE"):
        inherited(ours, "~policy.kl_weight")


def test_damaged_configuration_is_named(ours: Checkpoint, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(ours.model_dir, tmp_path / "pretrained_model"))
    (copy / "pusht_act.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"pusht_act.json is damaged .* give another checkpoint"):
        inherited(Checkpoint(copy))


@pytest.mark.parametrize(
    ("change", "reason"), [({"type": "diffusion"}, "policy of type diffusion"), ({"use_peft": True}, "use_peft")]
)
def test_another_kind_of_policy_is_refused(
    change: dict[str, Any], reason: str, ours: Checkpoint, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(ours.model_dir, tmp_path / "pretrained_model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=reason):
        inherited(Checkpoint(copy), mode="eval")


def stock(folder: Path, **options: Any) -> Checkpoint:
    """The configuration files of a checkpoint, as stock lerobot-train writes them."""
    policy = ACTConfig(
        device="cpu", chunk_size=20, n_action_steps=10, dim_model=64, optimizer_lr_backbone=2e-5, push_to_hub=False,
        input_features={"observation.state": STATE, "observation.environment_state": KEYPOINTS},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    )  # fmt: skip
    defaults: dict[str, Any] = {
        "dataset": DatasetConfig("lerobot/pusht_keypoints", episodes=[0, 3], eval_split=0.5),
        "env": PushtEnv(obs_type="environment_state_agent_pos", episode_length=250),
        "policy": policy, "output_dir": Path("/elsewhere/outputs"), "job_name": "theirs", "seed": 5, "batch_size": 16,
        "log_freq": 50, "env_eval_freq": 300, "eval_steps": 70, "save_freq": 400,
        "optimizer": AdamWConfig(lr=3e-4, weight_decay=0.01, grad_clip_norm=3.0, betas=(0.8, 0.9)),
        "eval": EvalConfig(n_episodes=5, batch_size=5),
        "wandb": WandBConfig(enable=True, project="theirs", entity="lab"),
    }  # fmt: skip
    model = folder / "checkpoints" / "000100" / "pretrained_model"
    model.mkdir(parents=True)
    policy.save_pretrained(model)
    TrainPipelineConfig(**(defaults | options)).save_pretrained(model)
    return Checkpoint(model)


def test_a_resume_of_stocks_checkpoint_goes_on_as_stock_would(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path)
    config = inherited(checkpoint)
    lerobot = decode(config)
    assert (config.seed, config.batch_size, config.job_name) == (5, 16, "theirs")
    assert (config.log_freq, config.eval_freq, config.eval_steps, config.save_freq) == (50, 300, 70, 400)
    assert (lerobot.dataset.repo_id, lerobot.dataset.episodes) == ("lerobot/pusht_keypoints", [0, 3])
    assert lerobot.dataset.eval_split == 0.5
    assert (lerobot.env.obs_type, lerobot.env.episode_length) == ("environment_state_agent_pos", 250)
    assert (lerobot.policy.chunk_size, lerobot.policy.n_action_steps, lerobot.policy.dim_model) == (20, 10, 64)
    assert (config.wandb.enable, config.wandb.project, config.wandb.entity) == (True, "theirs", "lab")
    assert inherited(checkpoint, "wandb.enable=false").wandb.enable is False
    assert inherited(checkpoint, "logging=local").wandb.enable is False


def test_stocks_rates_are_its_optimizers_not_its_policys(tmp_path: Path) -> None:
    """With use_policy_training_preset=false they differ, and the policy's are never used (but the backbone's)."""
    lerobot = decode(inherited(stock(tmp_path)))
    assert lerobot.optimizer == AdamWConfig(lr=3e-4, weight_decay=0.01, grad_clip_norm=3.0, betas=(0.8, 0.9))
    assert (lerobot.policy.optimizer_lr, lerobot.policy.optimizer_lr_backbone) == (3e-4, 2e-5)
    assert decode(inherited(stock(tmp_path / "2"), "policy.optimizer_lr=1e-6")).optimizer.lr == 1e-6


def test_stocks_schedule_is_kept(tmp_path: Path) -> None:
    schedule = LRSchedulerConfig.get_choice_class("constant_with_warmup")(num_warmup_steps=9)
    assert decode(inherited(stock(tmp_path, scheduler=schedule))).scheduler == schedule


def test_stock_without_a_seed_orders_its_data_by_0(tmp_path: Path) -> None:
    assert inherited(stock(tmp_path, seed=None)).seed == 0


def test_stock_without_periodic_checkpoints(tmp_path: Path) -> None:
    assert inherited(stock(tmp_path, save_freq=-1)).save_freq == 0


def test_an_older_lerobots_checkpoint(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path)
    path = checkpoint.model_dir / "train_config.json"
    config = json.loads(path.read_text())
    config["eval_freq"] = config.pop("env_eval_freq")
    del config["eval_steps"], config["dataset"]["eval_split"]
    path.write_text(json.dumps(config))
    assert (inherited(checkpoint).eval_freq, inherited(checkpoint).eval_steps) == (300, 0)
    assert inherited(checkpoint, mode="eval").env["episode_length"] == 250


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dataset": DatasetConfig("lerobot/pusht", streaming=True)}, "streamed or augmented"),
        (
            {"dataset": DatasetConfig("lerobot/pusht", image_transforms=ImageTransformsConfig(enable=True))},
            "streamed or augmented",
        ),
        ({"optimizer": OptimizerConfig.get_choice_class("sgd")()}, "trained with sgd"),
    ],
)
def test_what_stock_trains_otherwise_is_evaluated_but_not_resumed(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    checkpoint = stock(tmp_path, **options)
    with pytest.raises(ValueError, match=reason):
        inherited(checkpoint)
    assert inherited(checkpoint, mode="eval").policy["dim_model"] == 64


def test_a_model_without_its_training_run_lets_the_command_choose_the_environment(tmp_path: Path) -> None:
    checkpoint = stock(tmp_path)
    (checkpoint.model_dir / "train_config.json").unlink()
    config = inherited(checkpoint, "env=pusht_keypoints", mode="eval")
    assert config.env["obs_type"] == "environment_state_agent_pos"
    with pytest.raises(ValueError, match="policy=act_small: the checkpoint"):
        inherited(checkpoint, "policy=act_small", mode="eval")
