"""The card of a generated data set, and its upload to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard

from pusht_act.config.schema import Config
from pusht_act.demos.dataset_stats import format_stats
from pusht_act.demos.lerobot_writer import render_card, upload
from pusht_act.runs.provenance import package_versions

LICENSE = "mit"
# Not config.yaml and runs.jsonl, which name this machine.
UPLOADED_FILES = [
    *("data/*", "meta/*", "videos/*"),
    *("quality.json", "demonstrations.npz", "film_strip.png", "episode-0.mp4"),
]
CITATION = """@inproceedings{chi2023diffusionpolicy,
  title={Diffusion Policy: Visuomotor Policy Learning via Action Diffusion},
  author={Chi, Cheng and Feng, Siyuan and Du, Yilun and Xu, Zhenjia and Cousineau, Eric and Burchfiel, Benjamin and Song, Shuran},
  booktitle={Proceedings of Robotics: Science and Systems (RSS)},
  year={2023}
}"""  # noqa: E501


def make_card(root: Path, config: Config, figures: dict[str, float], command: str) -> DatasetCard:
    """Make README.md of the data set at `root`: LeRobot's template with our figures, the command and the versions."""
    fields = _fields(config, figures, command)
    # The template links to the page of repo_id, which exists only after an upload.
    if config.demos.push_to_hub:
        fields["repo_id"] = config.demos.repo_id
    return render_card(root, fields)


def push(root: Path, config: Config, figures: dict[str, float], command: str) -> str:
    """Upload the data set at `root` with its card and return its address.

    Raises:
        OSError: The upload failed; the data set on disk is complete all the same.
    """
    repo_id = str(config.demos.repo_id)
    try:
        upload(root, repo_id, UPLOADED_FILES, _fields(config, figures, command))
    except Exception as error:
        # The Hub client and httpx raise classes of their own.
        raise OSError(
            f"the data set is complete in {root}, but could not be pushed to {repo_id} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}): push it with LeRobotDataset({repo_id!r}, "
            f"root={str(root)!r}).push_to_hub()"
        ) from error
    return f"https://huggingface.co/datasets/{repo_id}"


def _fields(config: Config, figures: dict[str, float], command: str) -> dict[str, Any]:
    """Return the fields of LeRobot's card template."""
    # How the demonstrations came about, in words.
    from_seeds = config.demos.initial_states is None
    start = "reset seed" if from_seeds else "start (agent x, y, block x, y in px, block angle in rad)"
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    description = (
        "Demonstrations of PushT (Chi et al. 2023), push the T onto its target, by a planner that knows the "
        "simulator's state. Every episode ended in success in gym-pusht itself. The features are those of "
        f"`lerobot/{'pusht' if config.env['obs_type'] == 'pixels_agent_pos' else 'pusht_keypoints'}`.\n\n"
        "![an episode](film_strip.png)\n\n" + "\n".join(format_stats(figures)) + "\n\n"
        f"Made by\n\n```\n{command}\n```\n\nwith {versions}.\n\n"
        f"`demonstrations.npz` has the {start} of each episode and the actions that were executed, which differ "
        "from the data set's by the injected noise, if there is any."
    )
    return {
        "license": LICENSE,
        "tags": ["pusht", "gym-pusht", "imitation-learning", "synthetic"],
        "dataset_description": description,
        "url": "https://github.com/huggingface/gym-pusht",
        "paper": "https://arxiv.org/abs/2303.04137",
        "citation_bibtex": CITATION,
    }
