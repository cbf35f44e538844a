"""Tokens: in the environment they are used and written nowhere, in an argument they are refused and written nowhere."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from pusht_act import main
from pusht_act.config.secrets_check import refuse_tokens
from pusht_act.job import Result
from pusht_act.runs.loggers import LoggerCollection
from pusht_act.runs.run_dir import RunDir
from tests.helpers.config import config
from tests.helpers.wandb_runs import records
from tests.helpers.wandb_server import Server

pytestmark = pytest.mark.slow

WANDB = "0123456789abcdef0123456789abcdef01234567"
HUB = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"
OTHER = "correct-horse-battery-staple"
SECRETS = (WANDB, HUB, OTHER)


@pytest.fixture
def logged_in(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """To W&B (the fixture's server) and to the Hub."""
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("HF_TOKEN", HUB)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", OTHER)


def holding(folder: Path) -> list[str]:
    """Files under `folder` that hold a secret in their content or name."""
    return [
        str(path)
        for path in folder.rglob("*")
        for secret in SECRETS
        if secret in str(path) or (path.is_file() and secret.encode() in path.read_bytes())
    ]


def test_a_runs_files_and_output_hold_no_token_of_the_environment(
    tiny: Callable[..., Result],
    in_tmp: Path,
    logged_in: None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pushed: list[bytes] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_file", lambda *_, path_or_fileobj, **__: pushed.append(path_or_fileobj))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: type("Commit", (), {"commit_url": "there"}))
    with caplog.at_level("DEBUG"):
        tiny("wandb.enable=true", "wandb.mode=offline", "policy.push_to_hub=true", "policy.repo_id=me/act")
    run = in_tmp / "run"
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert any(record.HasField("history") for record in records(file))
    assert {"config.yaml", "runs.jsonl", "metrics.jsonl", "train.log"} <= {path.name for path in run.iterdir()}
    assert holding(in_tmp) == []
    (card,) = pushed
    output = "".join(capfd.readouterr()) + caplog.text + card.decode()
    assert "pushed to there" in output
    assert [secret for secret in SECRETS if secret in output] == []


def test_wandbs_files_of_a_run_that_it_sends_hold_no_token(
    in_tmp: Path, logged_in: None, server: Server, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"), LoggerCollection(config("wandb.enable=true"), RunDir(in_tmp), 0, None) as metrics:
        metrics.log("train", {"loss": 0.5}, 1)
        server.broken = "says 500"  # W&B has more to say of that, and would ask a sound server for more than ours knows
    assert list((in_tmp / "wandb").glob("run-*/*.wandb"))
    assert holding(in_tmp) == []
    output = "".join(capfd.readouterr()) + caplog.text
    assert [secret for secret in SECRETS if secret in output] == []


ARGUMENTS = [
    (f"wandb.notes={HUB}", "wandb.notes"),
    (f"job_name=run_with_{OTHER}", "job_name"),
    (f"output_dir=outputs/{WANDB}", "output_dir"),
    (f"+policy.tags=[mine,{HUB}]", "+policy.tags"),
    (f"policy.batch_size={HUB}", "policy.batch_size"),
    (f"seed={WANDB}", "seed"),
    (f"wandb={{api_key:{'f' * 40}}}", "wandb"),
    (f"+wandb.api_key={'f' * 40}", "+wandb.api_key"),
    (f"HF_TOKEN={'e' * 40}", "HF_TOKEN"),
    (f"hydra.launcher.setup=[export HF_TOKEN={HUB}]", "hydra.launcher.setup"),
    (f"wandb.notes=wandb_v1_{'x' * 77}", "wandb.notes"),
    (f"policy.repo_id=https://me:{HUB}@huggingface.co/me/act", "policy.repo_id"),
    (HUB, "the command line"),
    (f"{HUB}=3", "the command line"),
]


@pytest.mark.parametrize("others", [[], ["-m"], ["print_lerobot_command=true"], ["mode=demos"], ["--cfg", "job"]])
def test_a_token_in_an_argument_is_refused_without_a_trace(
    others: list[str],
    in_tmp: Path,
    logged_in: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = set(in_tmp.rglob("*"))
    for argument, named in ARGUMENTS:
        monkeypatch.setattr(sys, "argv", ["pusht-act", *others, argument])
        with pytest.raises(SystemExit) as left:
            main.main()
        printed = str(left.value.code) + "".join(capfd.readouterr())
        assert printed.startswith(f"pusht-act: {named} holds "), printed
        assert "take it out; tokens are read from the environment (HF_TOKEN, WANDB_API_KEY)" in printed
        assert "\n" not in printed
        assert not any(secret in printed for secret in (*SECRETS, "f" * 40, "e" * 40, "x" * 77))
    assert set(in_tmp.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("wandb.notes=${oc.env:MY_SERVICE_PASSWORD}", "wandb.notes holds the value of MY_SERVICE_PASSWORD"),
        ("steps=${oc.env:HF_TOKEN}", "steps holds the value of HF_TOKEN"),
        ("+policy.tags=[{a:${oc.env:HF_TOKEN}}]", "policy.tags.a holds the value of HF_TOKEN"),
        (f"job_name={HUB}", "job_name holds"),
    ],
)
def test_a_token_that_comes_by_another_way_is_refused_too(
    override: str, named: str, tiny: Callable[..., Result], in_tmp: Path, logged_in: None
) -> None:
    with pytest.raises(ValueError, match="would be written into files") as caught:
        tiny(override)
    assert str(caught.value).startswith(named)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert not (in_tmp / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset.revision", WANDB.replace("0", "a")),  # a commit
        ("job_name", "hf_small"),
        ("job_name", "shelf_abcdefghijklmnopqrstuvwxyz"),
        ("wandb.notes", "false"),
        ("policy.tags", ["tokens", "the key to it: deadbeef"]),
        ("output_dir", "outputs/secret=0123456789abcdef0123456789abcdef012345678"),  # 41 digits
    ],
)
def test_what_is_no_token_passes(key: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SHORT_TOKEN", "false")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    refuse_tokens(key, value)
