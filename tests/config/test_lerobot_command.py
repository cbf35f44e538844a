"""The printed LeRobot command, read back by LeRobot's own parser, is the job."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import draccus
import hydra
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lerobot.configs import parser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig

import pusht_act
from pusht_act.config.lerobot import decode, train_pipeline_config
from pusht_act.config.lerobot_command import _text, lerobot_command
from pusht_act.config.schema import Config, Mode
from pusht_act.config.validation import to_config
from pusht_act.main import CONFIG_DIR
from tests.helpers.runs import TINY

pytestmark = pytest.mark.slow

HERE = "policy.device=cpu"  # `auto` is left to stock, which warns


def job(*overrides: str) -> Config:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        return to_config(hydra.compose("config", [HERE, *overrides]))


def words(command: str) -> tuple[str, list[str]]:
    """(program, arguments) as a shell hands them over."""
    program, *arguments = shlex.split(command.replace("\\\n", ""))
    return program, arguments


def printed(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[str, list[str]]:
    capsys.readouterr()
    pusht_act.run([*overrides, "print_lerobot_command=true"])
    return words(capsys.readouterr().out)


def stock_train_config(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> TrainPipelineConfig:
    """What `lerobot-train ARGUMENTS` trains with: parsed and validated, as its main does."""
    monkeypatch.setattr("sys.argv", ["lerobot-train", *arguments])
    result: list[TrainPipelineConfig] = []

    def main(cfg: TrainPipelineConfig) -> None:
        cfg.validate()
        result.append(cfg)

    parser.wrap()(main)()
    return result[0]


def differing(ours: Any, stock: Any, prefix: str = "") -> list[str]:
    """Names of the fields that are not equal."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(stock):
        pairs = [(f.name, getattr(ours, f.name), getattr(stock, f.name)) for f in dataclasses.fields(ours)]
        return [name for key, a, b in pairs for name in differing(a, b, f"{prefix}{key}.")]
    return [] if ours == stock else [prefix.rstrip(".")]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["mode=test"],
        ["policy=act_small", "train.backbone_norm=frozen"],
        ["env=pusht_keypoints"],
        ["logging=local"],
        ["dataset.root=/data/a folder", "+dataset.episodes=[0,2]", "+dataset.use_imagenet_stats=false"],
        ["+policy.dropout=0.2", "+policy.n_decoder_layers=7", "+policy.pre_norm=true", "policy.optimizer_lr=1e-5"],
        ["+policy.normalization_mapping={VISUAL:IDENTITY,STATE:MIN_MAX,ACTION:MIN_MAX}", "+policy.tags=[a,b c]"],
        ["+policy.temporal_ensemble_coeff=0.01", "policy.n_action_steps=1"],
        ["eval_steps=10", "dataset.eval_split=0.1", "eval.n_episodes=7", "eval.batch_size=3", "save_freq=0", "seed=3"],
        ["wandb.entity=lab", "wandb.mode=offline", "wandb.notes='a: b, {c} \"d\"'", "job_name='123'"],
        ["env.episode_length=100", "+env.visualization_width=96", "save_checkpoint=false"],
        ["+optimizer.grad_clip_norm=1", "+optimizer.betas=[0.9,0.95]", "+policy.optimizer_weight_decay=1e-3"],
        ["+scheduler.type=cosine_decay_with_warmup", "+scheduler.num_warmup_steps=10", "+scheduler.num_decay_steps=100",
         "+scheduler.peak_lr=1e-4", "+scheduler.decay_lr=1e-6", "+optimizer.eps=1e-6"],
    ],
    ids=lambda overrides: " ".join(overrides[:1]) or "the main job",
)  # fmt: skip
def test_stock_reads_the_job_field_by_field(
    overrides: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(*overrides)
    program, arguments = words(lerobot_command(config))
    assert program == "lerobot-train"
    # Where ours looks whether they can be had, stock has ImageNet's.
    if config.policy["pretrained_backbone_weights"] == "auto":
        config.policy["pretrained_backbone_weights"] = "ResNet18_Weights.IMAGENET1K_V1"
    stock = stock_train_config(arguments, monkeypatch)
    ours = train_pipeline_config(config, decode(config), wandb_run_id=None)
    expected = ["use_policy_training_preset", "scheduler"] if config.optimizer or config.scheduler else []
    if config.scheduler:
        expected.remove("scheduler")
    assert differing(ours, stock) == expected


def test_options_of_the_optimizer_alone_come_with_a_constant_schedule(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock takes optimizer.* only together with a schedule; without one the rate must stay what it is."""
    _, arguments = words(lerobot_command(job("+optimizer.grad_clip_norm=1")))
    stock = stock_train_config(arguments, monkeypatch)
    assert stock.optimizer is not None
    assert stock.scheduler is not None
    assert stock.optimizer.grad_clip_norm == 1
    import torch

    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = stock.scheduler.build(optimizer, 10)
    for _ in range(10):
        assert optimizer.param_groups[0]["lr"] == 3e-4
        optimizer.step()
        scheduler.step()


def test_auto_leaves_the_device_to_stock() -> None:
    assert "policy.device" not in lerobot_command(job("policy.device=auto"))
    assert "--policy.device=cuda" in lerobot_command(job("policy.device=cuda", "+optimizer.eps=1e-6"))  # for elsewhere


@pytest.mark.parametrize(
    "option",
    [
        *("train.backbone_norm=batch", "policy=act_small", "train.mirror=0.5", "train.random_shift=4"),
        *("train.state_noise=2", "train.chunk_discount=0.9", "train.precision=auto"),
    ],
)
def test_a_step_that_stock_does_not_take_has_no_command(option: str) -> None:
    name = "train.backbone_norm=batch" if option == "policy=act_small" else option.partition(".")[2].partition("=")[0]
    with pytest.raises(ValueError, match=f"{name}.* has no equivalent.*give"):
        lerobot_command(job(option))


def test_embedded_data_has_no_stock_command() -> None:
    with pytest.raises(ValueError, match=r"dataset.repo_id=pusht_act/demos .* lerobot-train cannot read it: give"):
        lerobot_command(job("dataset=demos"))


@pytest.mark.parametrize("option", ["dataset.observations=[observation.state]", "rename_map={a.b: c}"])
def test_a_choice_of_features_has_no_stock_command(option: str) -> None:
    """Stock renames for a pretrained policy only, and refuses `rename_map` without one."""
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]}=.* has no equivalent: .*; leave it out"):
        lerobot_command(job(option))


def test_making_demonstrations_has_no_stock_command() -> None:
    with pytest.raises(ValueError, match="print_lerobot_command=true: LeRobot makes no demonstrations"):
        lerobot_command(dataclasses.replace(job(), mode=Mode.demos))


def test_no_secret_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "s3cret-token")
    assert "s3cret" not in lerobot_command(job("policy.push_to_hub=true", "policy.repo_id=me/act"))


@given(st.text(max_size=20) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_any_value_comes_back_from_lerobots_parser(value: Any) -> None:
    holder = dataclasses.make_dataclass("Holder", [("value", type(value))])
    _, arguments = words(shlex.join(["program", f"--value={_text(value)}"]))
    assert draccus.parse(holder, None, args=arguments).value == value


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours on data that stock can read (or so its checkpoint says)."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    pusht_act.run([*TINY, f"output_dir={folder}"])
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace("pusht_act/demos", "lerobot/pusht_keypoints"))
    for path in folder.rglob("manifest.json"):  # it says that the files are others now
        path.unlink()
    return folder


def test_a_resume_names_the_checkpoint_and_what_differs_from_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, arguments = printed(capsys, "mode=resume", f"output_dir={run}", "steps=9", "batch_size=2", "save_freq=3")
    model = (run / "checkpoints" / "last").resolve() / "pretrained_model"
    assert program == "lerobot-train"
    assert sorted(arguments) == sorted(
        [f"--config_path={model}/train_config.json", "--resume=true", "--steps=9", "--batch_size=2", "--save_freq=3"]
    )
    stock = stock_train_config(arguments, monkeypatch)
    assert (stock.steps, stock.batch_size, stock.save_freq, stock.resume) == (9, 2, 3, True)
    assert stock.output_dir == run
    assert stock.checkpoint_path == model.parent


def test_a_resume_elsewhere_says_where(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = f"output_dir={tmp_path / 'branch'}"
    _, arguments = printed(capsys, "mode=resume", f"resume.path={run}", there, "steps=9")
    assert f"--{there}" in arguments


def test_the_gradient_clip_of_a_resume_reaches_stock(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["mode=resume", f"output_dir={run}", "steps=9", "+optimizer.grad_clip_norm=2"]
    _, arguments = printed(capsys, *overrides)
    stock = stock_train_config(arguments, monkeypatch)
    assert stock.optimizer is not None
    assert stock.optimizer.grad_clip_norm == 2


@pytest.mark.parametrize(
    "override", ["policy.optimizer_lr=3e-5", "policy.optimizer_lr_backbone=3e-5", "+optimizer.eps=1e-5"]
)
def test_rates_that_stock_does_not_change_on_a_resume_are_refused(override: str, run: Path) -> None:
    overrides = ["mode=resume", f"output_dir={run}", "steps=9", override, "print_lerobot_command=true"]
    with pytest.raises(ValueError, match=f"{override.strip('+').partition('=')[0]}=.* leave .* out"):
        pusht_act.run(overrides)


def test_the_old_scripts_rates_need_not_be_said_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["policy.optimizer_lr=1e-4", "policy.optimizer_lr_backbone=1e-4"]
    _, arguments = printed(capsys, "mode=resume", f"output_dir={run}", "steps=9", *rates)
    assert not any("optimizer" in argument for argument in arguments)


def stock_eval_config(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> EvalPipelineConfig:
    monkeypatch.setattr("sys.argv", ["lerobot-eval", *arguments])
    result: list[EvalPipelineConfig] = []

    def main(cfg: EvalPipelineConfig) -> None:
        result.append(cfg)

    parser.wrap()(main)()
    return result[0]


@pytest.mark.parametrize("name", [".", "checkpoints/last", "checkpoints/000004/pretrained_model"])
def test_an_evaluation(
    name: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["mode=eval", f"checkpoint={run / name}", "eval.n_episodes=9", "eval.batch_size=3", HERE]
    overrides += ["eval.start_seed=77", "policy.n_action_steps=2", "+policy.use_amp=true"]
    program, arguments = printed(capsys, *overrides)
    assert program == "lerobot-eval"
    assert sum("policy." in argument for argument in arguments) == 3  # path, n_action_steps, use_amp
    stock = stock_eval_config(arguments, monkeypatch)
    assert stock.policy is not None
    assert stock.policy.pretrained_path == run / "checkpoints" / "000004" / "pretrained_model"
    assert (stock.policy.n_action_steps, stock.policy.use_amp) == (2, True)
    assert (stock.eval.n_episodes, stock.eval.batch_size, stock.seed) == (9, 3, 77)
    assert (stock.env.obs_type, stock.env.episode_length) == ("environment_state_agent_pos", 12)


def test_an_evaluations_policy_is_the_checkpoints(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, arguments = printed(capsys, "mode=eval", f"checkpoint={run}", HERE)
    stock = stock_eval_config(arguments, monkeypatch)
    saved = PreTrainedConfig.from_pretrained(run / "checkpoints" / "last" / "pretrained_model")
    saved.pretrained_path = stock.policy.pretrained_path if stock.policy else None
    assert differing(saved, stock.policy) == []


def test_a_resume_of_embedded_data_has_no_stock_command(tmp_path: Path, run: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    path = copy / "checkpoints" / "last" / "pretrained_model" / "pusht_act.json"
    ours = json.loads(path.read_text())
    ours["config"]["dataset"]["repo_id"] = "pusht_act/demos"
    path.write_text(json.dumps(ours))
    with pytest.raises(ValueError, match="lerobot-train cannot read it"):
        pusht_act.run(["mode=resume", f"output_dir={copy}", "steps=9", "print_lerobot_command=true"])
