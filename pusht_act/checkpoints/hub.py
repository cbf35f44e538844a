"""Download models from the Hugging Face Hub, and upload those that were trained."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from pusht_act.checkpoints.checkpoint import MODEL_DIR, Checkpoint
from pusht_act.config.schema import EMBEDDED_REPO_ID, Config
from pusht_act.runs.provenance import package_versions
from pusht_act.runtime.errors import UserError

MODEL_FILES = ("*.json", "*.safetensors")
"""What is downloaded and uploaded: weights and configuration, never a pickle."""


def download(repo_id: str, key: str) -> Path:
    """Return the folder of a model, fetched from the Hub or from its cache.

    Args:
        repo_id: The model, as USER/NAME.
        key: The option to name in the message.

    Raises:
        FileNotFoundError: it cannot be downloaded, or is not a policy.
    """
    # The Hub's client and httpx raise classes of their own, without a common base.
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=list(MODEL_FILES)))
    except Exception as error:
        raise FileNotFoundError(
            f"{key}={repo_id} is not a local path and cannot be fetched from the Hub ({type(error).__name__}): "
            "give a path such as outputs/act_pusht/train/checkpoints/last"
        ) from error
    # A repository of any kind can be downloaded.
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{key}={repo_id} holds no LeRobot policy (no config.json)")
    return folder


def check_can_push(repo_id: str | None, section: str = "policy") -> None:
    """Refuse an upload before the work of hours that would only fail after it.

    Args:
        repo_id: Where to push to.
        section: The section of the configuration that has push_to_hub and repo_id, for the message.

    Raises:
        UserError: there is no token, or the repo_id is missing or malformed.
    """
    # The presets have a placeholder in it, which YOUR_PROJECT_NAME in the environment replaces.
    if repo_id is None or repo_id.startswith("YOUR_PROJECT_NAME/"):
        raise UserError(
            f"{section}.push_to_hub=true needs a place to push to: give {section}.repo_id=USER/NAME or set "
            "YOUR_PROJECT_NAME"
        )
    # The Hub would refuse a malformed name only at the upload.
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{section}.repo_id={repo_id} is not a name for the Hub: give {section}.repo_id=USER/NAME"
        ) from error
    if get_token() is None:
        raise UserError(f"{section}.push_to_hub=true needs a Hub token: log in with `hf auth login` or set HF_TOKEN")


def push(config: Config, checkpoint: Path, metrics: dict[str, float], command: str) -> str:
    """Upload the model of a checkpoint with its card.

    Args:
        config: The run's, which has the repo_id.
        checkpoint: The folder of the step.
        metrics: Those of its evaluation, for the card; empty if there was none.
        command: The command that trained it, for the card.

    Returns:
        The address of the commit.

    Raises:
        OSError: the upload failed; the model is still in its folder.
    """
    repo_id, folder = str(config.policy["repo_id"]), Checkpoint(checkpoint / MODEL_DIR).evaluated.model_dir
    card = model_card(config, metrics, command).encode()
    api = HfApi()
    # As above: any class may be raised.
    try:
        api.create_repo(repo_id, private=config.policy.get("private"), exist_ok=True)
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(MODEL_FILES))
    except Exception as error:
        raise OSError(
            f"policy.repo_id={repo_id}: the upload failed ({type(error).__name__}), the model is in {folder}: "
            f"send it with `hf upload {repo_id} {folder}`"
        ) from error
    return str(commit.commit_url)


def model_card(config: Config, metrics: dict[str, float], command: str) -> str:
    """Return the README.md of a model: task, data, result with its interval, command, versions."""
    from huggingface_hub import ModelCardData

    # The built-in demonstrations are not on the Hub, so there is nothing to link to.
    data = ModelCardData(
        library_name="lerobot",
        pipeline_tag="robotics",
        license=config.policy.get("license") or "apache-2.0",
        datasets=None if config.dataset["repo_id"] == EMBEDDED_REPO_ID else [config.dataset["repo_id"]],
        tags=["robotics", "lerobot", "act", "pusht", *(config.policy.get("tags") or [])],
    )
    # The number that a visitor looks for, with how sure it is.
    result = "No evaluation was made."
    if "pc_success" in metrics:
        m = metrics
        result = (
            f"Success {m['pc_success']:.1f} % (95 % interval {m['pc_success_low']:.1f} to {m['pc_success_high']:.1f}), "
            f"mean max reward {m['avg_max_reward']:.3f}, over {m['n_episodes']:.0f} episodes of gym-pusht, "
            f"environment seeds from {config.eval.start_seed}."
        )
    versions = "\n".join(f"- {name} {number}" for name, number in package_versions().items())
    lines: list[Any] = [
        f"---\n{data.to_yaml()}\n---",
        f"# {config.job_name}: ACT on PushT",
        "LeRobot's ACT (Zhao et al. 2023) on PushT (Chi et al. 2023): push the T onto its target.",
        f"Trained on `{config.dataset['repo_id']}` for {config.steps} steps of {config.batch_size} samples.",
        f"## Result\n\n{result}",
        f"## Command\n\n```\n{command}\n```",
        f"## Versions\n\n{versions}",
    ]
    return "\n\n".join(lines) + "\n"
