"""Choose the features of a data set that a policy sees, and compare them with what the environment gives.

People's data sets have other names and more cameras: `rename_map` gives a feature the name that the environment has for
it, `dataset.observations` leaves the others out. Everything here is known before a frame is decoded.
"""

import logging
from itertools import combinations

from pusht_act.checkpoints.processor_files import STATISTICS
from pusht_act.config.lerobot import LeRobotConfig, PushtEnv
from pusht_act.config.schema import Config
from pusht_act.data.lerobot import ACTION, IMAGENET_STATS
from pusht_act.data.lerobot_metadata import Feature, Metadata
from pusht_act.runtime.errors import UserError, join_some

log = logging.getLogger(__name__)


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
                f"dataset {repo_id}: {one} and {other} would both be {names[one]}: rename both, or leave one of them "
                "out by dataset.observations="
            )
    _check_names(repo_id, env, features, names)
    return names


def _check_names(repo_id: str, env: PushtEnv, features: dict[str, Feature], names: dict[str, str]) -> None:
    """Compare the policy's names with those of the environment."""
    has, needs = {*names.values()}, {*env_shapes(env)}
    if has == needs:
        return
    if ACTION not in has:
        said = f"dataset {repo_id} has no action to learn, it has {join_some(_candidates(features))}"
    else:
        seen = ", ".join(sorted(has - {ACTION})) or "no observation"
        gives = ", ".join(sorted(needs - {ACTION}))
        said = f"dataset {repo_id} has {seen}, but env.obs_type={env.obs_type} gives {gives}"
    # The environment that would fit the data set, if there is one.
    other = {
        "pusht": {ACTION, "observation.image", "observation.state"},
        "pusht_keypoints": {ACTION, "observation.environment_state", "observation.state"},
    }
    fits = [
        f"give env={group}, or a data set that fits the environment" for group, keys in other.items() if keys == has
    ]
    raise UserError(f"{said}: {fits[0] if fits else _propose_options(env, features, names)}")


def _propose_options(env: PushtEnv, features: dict[str, Feature], names: dict[str, str]) -> str:
    """Return options by which the data set would fit: what is missing may have another name or be left out."""
    shapes = env_shapes(env)
    found = {name: key for key, name in names.items() if name in shapes}
    for name in sorted(shapes):
        free = [key for key in (name, *_candidates(features)) if key in features and key not in found.values()]
        spare = [key for key in free if _could_be(key, features[key], name, shapes[name])]
        if name not in found and not spare:
            return f"nothing in it could be {name}; give a data set that fits the environment"
        if name not in found:
            found[name] = spare[0]
    renamed = {key: name for name, key in found.items() if key != name}
    pairs = ", ".join(f"{key}: {name}" for key, name in renamed.items())
    kept = [key for key in features if key in found.values() and renamed.get(key, key) != ACTION]
    others = [key for key in features if key.startswith("observation.") and key not in kept]
    options = [f"'rename_map={{{pairs}}}'"] if renamed else []
    options += [f"'dataset.observations=[{','.join(kept)}]'"] if others or not renamed else []
    return f"give {' '.join(options)}"


def _candidates(features: dict[str, Feature]) -> list[str]:
    """Return what there may be to see or to do: observations come first, and not what LeRobot adds to each data set."""
    added = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    return sorted({*features} - {*added}, key=lambda key: (not key.startswith("observation."), key))


def _could_be(key: str, feature: Feature, name: str, shape: tuple[int, ...] | None) -> bool:
    """Return whether feature `key` could be what the policy calls `name`."""
    # A reward or the robot's next position is nothing to see, nor is a second action.
    like = key.startswith("observation.") if name != ACTION else "action" in key
    other = "action" not in key and not key.startswith("next.")
    return (like or (name != ACTION and other)) and _fits(feature, shape)


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
