"""The Hub: refused early, a card that says what the model is worth, nothing but weights and configuration uploaded."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

import pusht_act
from pusht_act.checkpoints import hub
from tests.helpers.config import config
from tests.helpers.runs import TINY

pytestmark = pytest.mark.slow

METRICS = {
    "pc_success": 61.4, "pc_success_low": 57.1, "pc_success_high": 65.5, "avg_max_reward": 0.8765, "n_episodes": 500,
}  # fmt: skip
COMMAND = "pusht-act seed=3 policy.push_to_hub=true"


def card(*overrides: str, metrics: dict[str, float] | None = None) -> ModelCard:
    return ModelCard(hub.model_card(config(*overrides), METRICS if metrics is None else metrics, COMMAND))


def test_the_card_says_task_data_result_and_command() -> None:
    text = card("steps=7000", "batch_size=64", "job_name=wide", "eval.start_seed=4321").text
    for part in (
        "# wide: ACT on PushT",
        "`lerobot/pusht` for 7000 steps of 64 samples",
        "Success 61.4 % (95 % interval 57.1 to 65.5)",
        "mean max reward 0.876",
        "500 episodes",
        "seeds from 4321",
        COMMAND,
        f"gym-pusht {version('gym-pusht')}",
    ):
        assert part in text, part


def test_the_cards_metadata_is_read_by_the_hub() -> None:
    data = card("+policy.tags=[mine]", "+policy.license=mit").data
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("lerobot", "robotics", "mit")
    assert data["datasets"] == ["lerobot/pusht"]
    assert {"robotics", "act", "pusht", "mine"} <= set(data["tags"])
    assert card().data["license"] == "apache-2.0"


def test_embedded_data_is_no_data_set_of_the_hub() -> None:
    embedded = card("dataset=demos")
    assert embedded.data.get("datasets") is None
    assert "pusht_act/demos" in embedded.text


def test_a_run_without_evaluation_says_so() -> None:
    assert "No evaluation was made." in card(metrics={}).text


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "give policy.repo_id=USER/NAME or set YOUR_PROJECT_NAME"),
        (["policy.repo_id=null"], "give policy.repo_id=USER/NAME or set YOUR_PROJECT_NAME"),
        (["policy.repo_id=a/b/c"], "policy.repo_id=a/b/c is not a name for the Hub"),
        (["policy.repo_id=me/act"], "log in with `hf auth login` or set HF_TOKEN"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_trained(
    overrides: list[str], reason: str, in_tmp: Path
) -> None:
    """In a process of its own, which has nobody's token."""
    environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key and "PROJECT_NAME" not in key}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pusht_act", "policy.push_to_hub=true", *overrides],
        env=environment | {"HF_HOME": str(in_tmp.parent / "no-token-here")},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 1
    assert len(lines) == 1
    assert reason in lines[0]
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert list(in_tmp.iterdir()) == []


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would go to the Hub, which no test can reach."""
    seen: dict[str, Any] = {}

    class Recorder:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            seen["repo"] = (repo_id, options["private"])

        def upload_file(self, **options: Any) -> None:
            seen[options["path_in_repo"]] = options["path_or_fileobj"].decode()

        def upload_folder(self, **options: Any) -> SimpleNamespace:
            files = [p for pattern in options["allow_patterns"] for p in options["folder_path"].glob(pattern)]
            seen["files"] = {path.name for path in files}
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(hub, "HfApi", Recorder)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return seen


PUSH = ["policy.push_to_hub=true", "policy.repo_id=me/act", "+policy.private=true"]


def test_a_finished_run_is_pushed_with_its_card(in_tmp: Path, uploads: dict[str, Any]) -> None:
    pusht_act.run([*TINY, *PUSH, "eval_freq=4", "output_dir=run"])
    assert uploads["repo"] == ("me/act", True)
    assert {"config.json", "model.safetensors", "train_config.json"} <= uploads["files"]
    assert all(name.endswith((".json", ".safetensors")) for name in uploads["files"])
    metadata, text = ModelCard(uploads["README.md"]).data, uploads["README.md"]
    assert metadata["library_name"] == "lerobot"
    assert "95 % interval" in text
    assert "policy.repo_id=me/act" in text
    assert "hf_secret" not in text


def test_no_token_is_written_into_the_run(in_tmp: Path, uploads: dict[str, Any]) -> None:
    pusht_act.run([*TINY, *PUSH, "output_dir=run"])
    texts = [path.read_bytes() for path in (in_tmp / "run").rglob("*") if path.is_file()]
    assert texts
    assert not any(b"hf_secret" in text for text in texts)


def test_a_run_is_not_pushed_unless_asked(in_tmp: Path, uploads: dict[str, Any]) -> None:
    pusht_act.run([*TINY, "output_dir=run"])
    assert uploads == {}


def test_a_failed_upload_names_the_model_that_is_still_there(
    in_tmp: Path, uploads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, repo_id: str, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("pusht_act.checkpoints.hub.HfApi.create_repo", refuse)
    with pytest.raises(OSError, match=r"policy.repo_id=me/act: the upload failed .* `hf upload me/act (\S+)`") as error:
        pusht_act.run([*TINY, *PUSH, "output_dir=run"])
    folder = Path(str(error.value).rpartition("hf upload me/act ")[2].rstrip("`"))
    assert (folder / "model.safetensors").is_file()
    assert OmegaConf.load("run/config.yaml").steps == 4
    assert f"hf upload me/act {folder}" in Path("run/train.log").read_text().splitlines()[-1]


def test_a_model_of_the_hub_is_evaluated_by_its_name(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pusht_act.run([*TINY, "output_dir=run"])
    assert run.checkpoint is not None
    repository = in_tmp / "hub" / "models--me--act"  # as the Hub's client keeps what it has fetched
    shutil.copytree(run.checkpoint / "pretrained_model", repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(in_tmp / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = pusht_act.run(
        ["mode=eval", "checkpoint=me/act", "output_dir=evaluated", "eval.n_episodes=1", "eval.n_videos=0"]
    )
    assert result.output_dir.is_relative_to("evaluated")
    assert len(result.episodes) == 1
