"""Checkpoints and data sets from elsewhere: nothing in them is run, nothing outside of them is read or written."""

import ast
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.processor_act import make_act_pre_post_processors

import pusht_act
from pusht_act.checkpoints.processor_files import STEPS
from pusht_act.checkpoints.safe_loading import check_safe_to_load
from pusht_act.config.errors import explain
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.main import CONFIG_DIR, USER_ERRORS
from tests.helpers.command_line import command
from tests.helpers.dataset_config import config as dataset_config
from tests.helpers.runs import TINY, tiny_command
from tests.helpers.sampling import some_not_slow

PACKAGE = Path(pusht_act.__file__).parent
RUN_IT = {"_target_": "os.system", "command": "touch pwned"}


class Pickled:
    """Makes a file when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = pusht_act.run([*TINY, f"output_dir={tmp_path_factory.mktemp('trained') / 'run'}", "steps=1"]).output_dir
    (run / "checkpoints/last/manifest.json").unlink()  # whoever makes a hostile checkpoint makes its manifest fit
    return run


@pytest.fixture
def hostile(trained: Path, in_tmp: Path) -> Path:
    """A checkpoint to make hostile, in a working directory of its own."""
    return Path(shutil.copytree((trained / "checkpoints/last").resolve(), in_tmp / "hostile"))


def change(name: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file."""

    def apply(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def step(number: int, name: str = "policy_preprocessor.json", **values: Any) -> Callable[[Path], None]:
    """Set keys of a processor's step; None removes one."""

    def apply(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text())
        entry = content["steps"][number] | values
        content["steps"][number] = {key: value for key, value in entry.items() if value is not None}
        path.write_text(json.dumps(content))

    return apply


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


def pickled_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))


def pickle_named_safetensors(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Pickled()))


def header_of(length: int) -> Callable[[Path], object]:
    return lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")


def not_a_file(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").mkdir()


# What is done to the folder, and what the one line must contain.
HOSTILE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "pickled weights": (pickled_only, ("pytorch_model.bin, a pickle", "never read", "model.safetensors")),
    "a pickle by another name": (pickle_named_safetensors, ("model.safetensors is damaged (",)),
    "an endless header": (header_of(2**62), ("model.safetensors is damaged (",)),
    "type": (change("config.json", type="diffusion"), ("holds a policy of type diffusion",)),
    "no type": (change("config.json", type=None), ("holds a policy of type None",)),
    "type is a path": (change("config.json", type="os.system"), ("policy of type os.system",)),
    "an unknown field": (
        change("config.json", run_me="x"),
        ("config.json has run_me, which", "a newer LeRobot"),
    ),
    "_target_": (change("config.json", _target_="os.system"), ("config.json has the key _target_",)),
    "_target_ within": (change("config.json", normalization_mapping=RUN_IT), ("has the key _target_",)),
    "_target_ in ours": (change("pusht_act.json", config={"env": RUN_IT}), ("pusht_act.json has the key _target_",)),
    "interpolation": (change("config.json", repo_id="${oc.env:HOME}"), ("repo_id='${oc.env:HOME}' asks to be",)),
    "interpolation in a list": (change("config.json", tags=[["${oc.env:HOME}"]]), ("asks to be evaluated",)),
    "interpolation in stock's": (change("train_config.json", job_name="${oc.env:HOME}"), ("train_config.json: job",)),
    "a value of no enumeration": (
        change("config.json", normalization_mapping=dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "EVAL")),
        ("policy.normalization_mapping", "NormalizationMode"),
    ),
    "a backbone that is a path": (change("config.json", vision_backbone="os.system"), ("policy.vision_backbone",)),
    "memory for a width": (change("config.json", dim_model=10**9), ("dim_model=1000000000 does not fit",)),
    "memory for layers": (change("config.json", n_encoder_layers=10**7), ("n_encoder_layers=10000000 does not",)),
    "memory for a chunk": (change("config.json", chunk_size=10**12), ("chunk_size=1000000000000 does not fit",)),
    "deep JSON": (text("config.json", "[" * 10**5), ("config.json is damaged (recursion",)),
    "a list": (text("config.json", "[]"), ("config.json is damaged (it should be an object)",)),
    "no text": (lambda model: (model / "config.json").write_bytes(b"\xff\xfe\0"), ("config.json is damaged",)),
    "vast JSON": (text("train_config.json", " " * 17_000_000), ("train_config.json is damaged (no file of a plaus",)),
    "a folder for a file": (not_a_file, ("holds no checkpoint",)),
    "ours without a config": (text("pusht_act.json", "{}"), ("pusht_act.json is damaged",)),
    "ours of another form": (text("pusht_act.json", '{"config": 3, "choices": 4}'), ("pusht_act.json is damaged",)),
    "a section of another form": (
        change("pusht_act.json", config={"eval": [1]}, choices={}),
        ("pusht_act.json is damaged (eval is no",),
    ),
    "stock's of another form": (change("train_config.json", dataset="x"), ("train_config.json is damaged (dataset",)),
    "a class to import": (
        step(1, registry_name=None, **{"class": "os.system"}),
        ("policy_preprocessor.json names a class to import (os.system)", "never done"),
    ),
    "a class of LeRobot's": (
        step(1, registry_name=None, **{"class": "lerobot.processor.DeviceProcessorStep"}),
        ("names a class to import",),
    ),
    "another step": (step(1, registry_name="tokenizer_processor"), ("tokenizer_processor is none of those",)),
    "a step of no name": (step(1, registry_name=None), ("a step None is none of those",)),
    "a step that is a list": (step(1, registry_name=["to_batch_processor"]), ("is none of those",)),
    "no steps": (text("policy_postprocessor.json", "{}"), ("policy_postprocessor.json is damaged (no list of steps)",)),
    "a state file above": (
        step(3, state_file="../outside.safetensors"),
        ("policy_preprocessor.json: state_file='../outside.safetensors' is no .safetensors file of this folder",),
    ),
    "a state file elsewhere": (
        step(0, "policy_postprocessor.json", state_file="/etc/outside.safetensors"),
        ("policy_postprocessor.json: state_file='/etc/outside.safetensors' is no",),
    ),
    "options of a step": (
        step(3, config={"features": 3}),
        ("preprocessor.json is damaged (steps.3.config.fea",),
    ),
    "no processors": (lambda model: (model / "policy_preprocessor.json").unlink(), ("processors are missing",)),
}


@pytest.mark.parametrize("kind", some_not_slow([*HOSTILE], every=5))
def test_a_hostile_model_is_refused_in_one_line(kind: str, hostile: Path) -> None:
    apply, fragments = HOSTILE[kind]
    apply(hostile / "pretrained_model")
    (hostile.parent / "outside.safetensors").write_bytes(b"")
    evaluated = ["mode=eval", f"checkpoint={hostile}", "output_dir=out", "eval.n_episodes=1", "eval.n_videos=0"]
    resumed = ["mode=resume", f"resume.path={hostile}", "output_dir=out", "steps=3"]
    with pytest.raises(USER_ERRORS) as caught:
        pusht_act.run(resumed if "class" in kind or "ours" in kind else evaluated)
    printed = explain(caught.value, CONFIG_DIR)
    assert [fragment for fragment in fragments if fragment not in printed] == [], printed
    assert "\n" not in printed
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["hostile", "outside.safetensors"]


NO_STATE_FILES: list[Any] = [
    *("..", "../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", ".safetensors", "..safetensors"),
    *("\\\\x.safetensors", "x.safetensors\n", 3, ["x"]),
]


@pytest.mark.parametrize("file", NO_STATE_FILES)
@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_state_file_is_a_safetensors_file_of_the_folder(name: str, file: Any, hostile: Path) -> None:
    step(0, name, state_file=file)(hostile / "pretrained_model")
    with pytest.raises(ValueError, match=rf"{name}: state_file=.* is no .safetensors file of this folder"):
        check_safe_to_load(hostile / "pretrained_model")


def test_weights_to_begin_with_are_looked_at_too(hostile: Path) -> None:
    step(1, registry_name=None, **{"class": "os.system"})(hostile / "pretrained_model")
    with pytest.raises(ValueError, match="names a class to import"):
        pusht_act.run([*TINY, f"+policy.pretrained_path={hostile}", "output_dir=out"])


def test_the_command_says_so_in_one_line_and_exits_with_1(hostile: Path, tmp_path: Path) -> None:
    pickled_only(hostile / "pretrained_model")
    done = command("mode=eval", f"checkpoint={hostile}", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("pusht-act: ")


def test_the_steps_let_through_are_lerobots() -> None:
    pipelines = make_act_pre_post_processors(ACTConfig(device="cpu"), {})
    assert {entry["registry_name"] for each in pipelines for entry in each.get_config()["steps"]} == set(STEPS)


def test_a_sound_model_passes(trained: Path) -> None:
    check_safe_to_load(trained / "checkpoints/last/pretrained_model")


# Nothing in the package can load a pickle.

PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"joblib.parallel", "joblib.parallel.LokyBackend", "joblib.parallel.register_parallel_backend"}
"""Names of those modules that load nothing."""


def offences(source: str) -> list[str]:
    """Imports that unpickle, and calls that may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        names = (name for name in modules if name not in HARMLESS)
        found += [name for name in names if name.partition(".")[0] in PICKLING or name == "torch.load"]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load", "torch.hub.load"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found += [] if ast.unparse(node.value) == "False" and node.arg == "allow_pickle" else [f"{node.arg}="]
    return found


def test_no_line_of_the_package_loads_a_pickle() -> None:
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 30
    assert {str(path): found for path in sources if (found := offences(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "from torch import load", "torch.load(x)", "import dill as d",
     "np.load(x, allow_pickle=True)", "np.load(x, allow_pickle=flag)", "f(weights_only=False)", "read = torch.load"],
)  # fmt: skip
def test_a_line_that_does_would_be_found(source: str) -> None:
    assert offences(source)
    assert not offences("np.load(x, allow_pickle=False); import torch; from safetensors.torch import load_file")


# Data sets.


@pytest.fixture
def dataset(keypoints_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(keypoints_dataset, tmp_path / "data"))


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize(
    "template",
    ["../{video_key}.mp4", "/etc/passwd", "videos/../../x.mp4", "{nothing}.mp4", "{", "{0}", 3, "{video_key.x}"],
)
def test_a_template_that_leaves_the_data_set_is_refused(key: str, template: Any, dataset: Path) -> None:
    change("info.json", **{key: template})(dataset / "meta")
    with pytest.raises(ValueError, match=f"info.json: {key}=.* names no file within the data set: fetch it from"):
        open_lerobot_dataset(dataset_config(dataset))


def test_a_job_on_a_hostile_data_set_ends_in_one_line(dataset: Path) -> None:
    change("info.json", video_path="/etc/{video_key}")(dataset / "meta")
    with pytest.raises(ValueError, match=r"^.*info.json: video_path='/etc/{video_key}' names no file within the .*$"):
        pusht_act.run(tiny_command("dataset=pusht_keypoints", f"dataset.root={dataset}", f"output_dir={dataset}/run"))
    assert not (dataset / "run").exists()


@pytest.mark.parametrize("key", ["observation.../../../../x", "observation./etc/x", "observation.\n", ".x"])
def test_a_feature_that_is_no_name_is_refused(key: str, dataset: Path) -> None:
    """Each is a file of the cache, observation.state.npy."""
    features = json.loads((dataset / "meta/info.json").read_text())["features"]
    change("info.json", features=features | {key: features["action"]})(dataset / "meta")
    with pytest.raises(ValueError, match="info.json: feature .* is no name with a dtype and a shape"):
        open_lerobot_dataset(dataset_config(dataset))


@pytest.mark.parametrize(
    "damage", [{"features": None}, {"features": {"action": 3}}, {"total_frames": "many"}, {"fps": None}]
)
def test_an_info_that_lacks_something_is_named(damage: dict[str, Any], dataset: Path) -> None:
    change("info.json", **damage)(dataset / "meta")
    with pytest.raises(ValueError, match=r"info.json"):
        open_lerobot_dataset(dataset_config(dataset))
    (dataset / "meta/info.json").write_text("[]")
    with pytest.raises(ValueError, match=r"info.json: holds \[\], no JSON object: fetch"):
        open_lerobot_dataset(dataset_config(dataset))


def test_a_videos_place_in_the_episodes_table_cannot_leave_the_data_set(dataset: Path) -> None:
    from pusht_act.data.lerobot_metadata import path_within

    for values in ({"video_key": "../../x"}, {"file_index": "../../../x"}):
        with pytest.raises(ValueError, match="names no file within the data set"):
            path_within(
                dataset,
                "videos/{video_key}/{file_index}.mp4",
                "video_path",
                **{"video_key": "k", "file_index": 0} | values,
            )
    assert path_within(dataset, "v/{file_index:03d}.mp4", "video_path", file_index=7) == dataset / "v/007.mp4"
