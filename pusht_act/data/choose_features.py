"""Choose the features of a data set that a policy sees, and compare them with what the environment gives.

People's data sets have other names and more cameras: `rename_map` gives a feature the name that the environment has for
it, `dataset.observations` leaves the others out. Everything here is known before a frame is decoded.
"""

import logging
from itertools import combinations
from typing import Any

from pusht_act.config.lerobot import LeRobotConfig, PushtEnv, observation_keys
from pusht_act.config.schema import Config
from pusht_act.data.lerobot import ACTION, IMAGENET_STATS
from pusht_act.data.lerobot_metadata import Feature, Metadata
from pusht_act.runtime.errors import UserError, join_some

log = logging.getLogger(__name__)

STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""What each of LeRobot's normalizations is made of."""


def choose_features(config: Config, env: PushtEnv, features: dict[str, Feature]) -> dict[str, str]:
    """Return the features to read, by their name in the data set, with the name that the policy has for them.

    Args:
        config: The job's.
        env: The environment that the policy will see.
        features: Those of the data set.

    Raises:
        UserError: They are not what `env` gives; or an option names one that is not there.
    """
    repo_id, chosen = config.dataset["repo_id"], config.dataset.get("observations")
    renamed: dict[str, str] = config.rename_map or {}
    for option, keys in (("rename_map", renamed), ("dataset.observations", chosen or ())):
        if unknown := [key for key in keys if key not in features]:
            raise UserError(
                f"{option}: {unknown[0]} is not in dataset {repo_id}: it has {join_some(_candidates(features))}"
            )
    names = {key: renamed.get(key, key) for key in features}
    names = {key: name for key, name in names.items() if name.startswith("observation.") or name == ACTION}
    if chosen is not None:
        names = {key: name for key, name in names.items() if key in chosen or name == ACTION}
    for one, other in combinations(names, 2):
        if names[one] == names[other]:
            raise UserError(
                f"dataset {repo_id}: {one} and {other} would both be {names[one]}: leave one of them out of "
                f"{_observations(key for key in names if key != one)}"
            )
    _check_names(repo_id, env, features, names)
    return names


def _check_names(repo_id: str, env: PushtEnv, features: dict[str, Feature], names: dict[str, str]) -> None:
    """Compare the policy's names with those of the environment."""
    has, needs = {*names.values()} - {ACTION}, observation_keys(env)
    if ACTION not in names.values():
        raise UserError(
            f"dataset {repo_id} has no action to learn, it has {join_some([*features])}: "
            "give 'rename_map={ITS_NAME: action}'"
        )
    if has == needs:
        return
    said = (
        f"dataset {repo_id} has {', '.join(sorted(has)) or 'no observation'}, but env.obs_type={env.obs_type} gives "
        f"{', '.join(sorted(needs))}"
    )
    raise UserError(f"{said}: {_remedy(env, features, names)}")


def _remedy(env: PushtEnv, features: dict[str, Feature], names: dict[str, str]) -> str:
    """Return what to give where the data set has other observations than the environment."""
    has, needs = {*names.values()} - {ACTION}, observation_keys(env)
    other = {
        "pusht": {"observation.image", "observation.state"},
        "pusht_keypoints": {"observation.environment_state", "observation.state"},
    }
    # The environment that would fit the data set, if there is one.
    if fits := [group for group, keys in other.items() if keys == has]:
        return f"give env={fits[0]}, or a data set that fits the environment"
    # Else what is missing may be there under another name, and what is too much may be left out.
    shapes, free = env_shapes(env), [key for key in names if names[key] not in needs | {ACTION}]
    renamed: dict[str, str] = {}
    for name in sorted(needs - has):
        found = [key for key in free if key not in renamed and _fits(features[key], shapes[name])]
        if not found:
            return f"nothing in it could be {name}; give a data set that fits the environment"
        renamed[found[0]] = name
    pairs = ", ".join(f"{key}: {name}" for key, name in renamed.items())
    kept = [key for key in names if names[key] in needs or key in renamed]
    given = ([f"'rename_map={{{pairs}}}'"] if renamed else []) + (
        [_observations(kept)] if len(kept) + 1 < len(names) else []
    )
    return f"give {' '.join(given)}"


def _observations(keys: Any) -> str:
    return f"'dataset.observations=[{','.join(keys)}]'"


def _candidates(features: dict[str, Feature]) -> list[str]:
    """Return the features that could be something to see or to do; what LeRobot adds to each data set comes last."""
    added = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    return sorted(features, key=lambda key: (key in added, not key.startswith("observation."), key))


def env_shapes(env: PushtEnv) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of each feature of `env` by the policy's name; None for a picture, which may have any size."""
    shapes = {env.features_map[key]: (feature.type.name, tuple(feature.shape)) for key, feature in env.features.items()}
    return {name: None if kind == "VISUAL" else shape for name, (kind, shape) in shapes.items()}


def _fits(feature: Feature, shape: tuple[int, ...] | None) -> bool:
    return feature.is_image if shape is None else not feature.is_image and tuple(feature.shape) == shape


def check_environment(config: Config, env: PushtEnv, metadata: Metadata, names: dict[str, str]) -> None:
    """Compare the features' shapes and the rate of the recording with those of the environment.

    Raises:
        UserError: A shape is another one; the message names both.
    """
    repo_id, shapes = config.dataset["repo_id"], env_shapes(env)
    for key, name in names.items():
        feature, shape = metadata.info.features[key], shapes[name]
        called = key if key == name else f"{key} ({name})"
        if feature.is_image and (len(feature.shape) != 3 or feature.to_dict()["shape"][2] != 3):
            raise UserError(
                f"dataset {repo_id}: {called} has shape {feature.shape}: a picture has height, width and 3 channels"
            )
        if (feature.info or {}).get("is_depth_map"):
            raise UserError(f"dataset {repo_id}: {called} is a depth map, which ACT on PushT does not read")
        if not _fits(feature, shape):
            wanted = f"shape {list(shape)}" if shape is not None else "a picture"
            does = "takes" if name == ACTION else "gives"
            raise UserError(
                f"dataset {repo_id}: {called} has shape {feature.shape}, but env.obs_type={env.obs_type} {does} "
                f"{wanted}: give a data set that was recorded in this environment"
            )
    # The environment's rate is fixed; another env.fps is that of videos.
    if metadata.info.fps != PushtEnv.fps:
        log.warning(
            "dataset %s was recorded at %g Hz, and the environment steps at %d: its actions will be carried out at %g "
            "times their speed",
            repo_id, metadata.info.fps, PushtEnv.fps, PushtEnv.fps / metadata.info.fps,
        )  # fmt: skip


def needed_statistics(lerobot: LeRobotConfig, metadata: Metadata, names: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the names of the statistics that normalize each feature, by its name in the data set."""
    needed = {}
    for key, name in names.items():
        is_image = metadata.info.features[key].is_image
        kind = {ACTION: "ACTION", "observation.environment_state": "ENV"}.get(name, "VISUAL" if is_image else "STATE")
        # ACT leaves what the mapping does not name as it is.
        mode = lerobot.policy.normalization_mapping.get(kind)
        found = STATISTICS.get(mode.name, ()) if mode is not None else ()
        given = IMAGENET_STATS if is_image and lerobot.dataset.use_imagenet_stats else ()
        needed[key] = tuple(statistic for statistic in found if statistic not in given)
    return needed
