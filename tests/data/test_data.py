"""Data: what the cache holds, the order of samples, batches equal to LeRobot's, damaged files."""

import json
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.configs.default import DatasetConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.sampler import EpisodeAwareSampler, compute_sampler_state

from pusht_act.data import lerobot_reader as lerobot_dataset
from pusht_act.data.cache import FrameDataset, cache_root
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.loader import BatchLoader
from pusht_act.data.open_dataset import normalization_stats, split_episodes
from pusht_act.data.sampler import EpisodeSampler
from tests.helpers.dataset_config import config


def made_up(lengths: list[int]) -> FrameDataset:
    """FrameDataset whose action is the frame's number."""
    bounds = np.cumsum([0, *lengths])
    action = np.arange(bounds[-1], dtype=np.float32)[:, None].repeat(2, axis=1)
    return FrameDataset(
        "made/up",
        {"observation.state": action.copy(), "action": action},
        np.stack([bounds[:-1], bounds[1:]], axis=1),
        ["push"] * len(lengths),
        {key: {"dtype": "float32", "shape": [2], "names": None} for key in ("observation.state", "action")},
        {},
        10,
    )


@pytest.mark.parametrize("kind", ["image_dataset", "keypoints_dataset"])
def test_batches_equal_lerobots_samples(kind: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(kind)
    frames, chunk = open_lerobot_dataset(config(root)), 20
    stock = LeRobotDataset(
        "local/tiny", root, video_backend="pyav", delta_timestamps={"action": [i / 10 for i in range(chunk)]}
    )
    batch = BatchLoader(frames, chunk, "cpu").batch(torch.arange(len(frames)))
    for i in range(len(frames)):
        sample = stock[i]
        for key, values in batch.items():
            assert torch.equal(values[i], sample[key]), (key, i)


def test_a_video_decoded_in_parts_is_the_same(
    image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_lerobot_dataset(config(image_dataset)).arrays["observation.image"]
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path))
    monkeypatch.setattr(lerobot_dataset, "FRAMES_PER_PART", 7)
    assert np.array_equal(open_lerobot_dataset(config(image_dataset)).arrays["observation.image"], whole)


@pytest.mark.parametrize("name", ["pusht", "pusht_keypoints"])
def test_human_frames_equal_lerobots(human: Path, name: str) -> None:
    frames = open_lerobot_dataset(config(human / name, f"lerobot/{name}"))
    stock = LeRobotDataset(f"lerobot/{name}", human / name, video_backend="pyav", return_uint8=True)
    assert len(frames) == len(stock) == 25_650
    for i in [0, 160, 161, *np.random.default_rng(0).integers(0, len(frames), 20).tolist(), 25_649]:
        for key, array in frames.arrays.items():
            assert np.array_equal(stock[i][key].numpy(), array[i]), (key, i)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 7),
    data=st.data(),
)
def test_order_is_episode_aware_samplers(lengths: list[int], seed: int, batch_size: int, data: st.DataObject) -> None:
    frames = made_up(lengths)
    episodes = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    stock = EpisodeAwareSampler(
        frames.episodes[:, 0], frames.episodes[:, 1], episode_indices_to_use=episodes, shuffle=True, seed=seed
    )
    order = EpisodeSampler(frames, episodes, seed)
    step = 0
    for _ in range(3):
        epoch = torch.tensor(list(stock))
        for expected in torch.split(epoch, batch_size):
            assert order.state_at(step, batch_size) == compute_sampler_state(step, len(order), batch_size, 1)
            fresh = EpisodeSampler(frames, episodes, seed)
            fresh.load_state_dict(order.state_at(step, batch_size))
            assert torch.equal(fresh.next_batch(batch_size), expected)
            batch = order.next_batch(batch_size)
            assert torch.equal(batch, expected)
            step += 1


def test_order_goes_on_from_its_state() -> None:
    frames = made_up([7, 5])
    order = EpisodeSampler(frames, [0, 1], 3)
    for _ in range(4):
        order.next_batch(5)
    again = EpisodeSampler(frames, [0, 1], 3)
    again.load_state_dict(json.loads(json.dumps(order.state_dict())))
    for _ in range(5):
        assert torch.equal(order.next_batch(5), again.next_batch(5))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), chunk=st.integers(1, 12), index=st.integers(0, 1000)
)
def test_actions_past_an_episodes_end_are_its_last_and_marked(lengths: list[int], chunk: int, index: int) -> None:
    frames = made_up(lengths)
    index %= len(frames)
    start, stop = next(b for b in frames.episodes.tolist() if b[0] <= index < b[1])
    batch = BatchLoader(frames, chunk, "cpu").batch(torch.tensor([index]))
    wanted = np.arange(index, index + chunk)
    assert batch["action"][0, :, 0].tolist() == np.minimum(wanted, stop - 1).tolist()
    assert batch["action_is_pad"][0].tolist() == (wanted >= stop).tolist()
    assert start <= batch["action"].min()


def test_eval_split_holds_out_what_stock_holds_out(keypoints_dataset: Path) -> None:
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import make_train_eval_datasets
    from lerobot.policies.act.configuration_act import ACTConfig

    dataset = DatasetConfig("local/tiny", root=str(keypoints_dataset), eval_split=0.4, video_backend="pyav")
    stock = make_train_eval_datasets(TrainPipelineConfig(dataset=dataset, policy=ACTConfig(device="cpu")))
    ours = split_episodes(open_lerobot_dataset(dataset), None, 0.4)
    assert ours == (stock[0].episodes, stock[1].episodes)
    with pytest.raises(ValueError, match="eval_split=0.9 leaves none of 1"):
        split_episodes(open_lerobot_dataset(dataset), [0], 0.9)
    with pytest.raises(ValueError, match=r"dataset.episodes=\[3\] are not in local/tiny: it has 0 to 2"):
        split_episodes(open_lerobot_dataset(dataset), [0, 3], 0)


def test_imagenet_statistics_are_an_option(image_dataset: Path) -> None:
    frames = open_lerobot_dataset(config(image_dataset))
    imagenet, own = normalization_stats(frames, True), normalization_stats(frames, False)
    assert imagenet["observation.image"]["mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert own["observation.image"]["mean"].flatten().tolist() != pytest.approx([0.485, 0.456, 0.406])
    assert torch.equal(imagenet["action"]["std"], own["action"]["std"])


def test_demos_equal_their_replay(cache: Path) -> None:
    from lerobot.envs.configs import PushtEnv

    from pusht_act.data.builtin_demos import open_builtin_demos
    from pusht_act.demos import builtin
    from pusht_act.demos.replay import replay

    frames = open_builtin_demos(2, PushtEnv(obs_type="pixels_agent_pos"))
    assert set(frames.arrays) == {"observation.image", "observation.state", "action"}
    second = builtin.load(2)[1]
    episode = replay(second.start, second.action, image=True)
    start, stop = frames.episodes[1]
    assert episode.image is not None
    assert np.array_equal(frames.arrays["observation.image"][start:stop], episode.image.transpose(0, 3, 1, 2))
    assert np.array_equal(frames.arrays["action"][start:stop], second.action)
    image = frames.arrays["observation.image"] / 255.0
    assert np.allclose(np.ravel(frames.stats["observation.image"]["mean"]), image.mean((0, 2, 3)))
    assert np.allclose(np.ravel(frames.stats["observation.image"]["std"]), image.std((0, 2, 3)))
    assert np.allclose(frames.stats["action"]["std"], frames.arrays["action"].std(0), rtol=1e-4)


def test_the_cache_is_where_it_is_asked_to_be(
    keypoints_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "mine"))
    open_lerobot_dataset(config(keypoints_dataset))
    assert list((tmp_path / "mine").glob("*/action.npy"))
    monkeypatch.delenv("PUSHT_ACT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "pusht_act"


def test_changed_content_is_decoded_again_and_many_may_ask_at_once(
    keypoints_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    shutil.copytree(keypoints_dataset, root)
    found: list[FrameDataset] = []
    threads = [threading.Thread(target=lambda: found.append(open_lerobot_dataset(config(root)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 1
    stats = json.loads((root / "meta" / "stats.json").read_text())
    stats["action"]["mean"] = [1.0, 2.0]
    (root / "meta" / "stats.json").write_text(json.dumps(stats))
    assert open_lerobot_dataset(config(root)).stats["action"]["mean"] == [1.0, 2.0]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_cache_that_lost_bytes_is_made_again(
    keypoints_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path))
    before = open_lerobot_dataset(config(keypoints_dataset)).arrays["action"].copy()
    array = next(tmp_path.glob("*/action.npy"))
    for damage in (lambda: array.write_bytes(array.read_bytes()[:200]), array.unlink):
        damage()
        assert np.array_equal(open_lerobot_dataset(config(keypoints_dataset)).arrays["action"], before)
    next(tmp_path.glob("*/meta.json")).write_text("{")
    assert np.array_equal(open_lerobot_dataset(config(keypoints_dataset)).arrays["action"], before)


@pytest.mark.parametrize("file", ["info.json", "episodes", "parquet", "mp4"])
def test_a_damaged_data_set_is_named(
    image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setenv("PUSHT_ACT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    shutil.copytree(image_dataset, root)
    path = {
        "info.json": root / "meta" / "info.json",
        "episodes": next((root / "meta" / "episodes").rglob("*.parquet")),
        "parquet": next((root / "data").rglob("*.parquet")),
        "mp4": next((root / "videos").rglob("*.mp4")),
    }[file]
    content = path.read_bytes()
    for keep in (len(content) // 2, 0):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=str(path)) as caught:
            open_lerobot_dataset(config(root))
        assert "again" in str(caught.value)
    path.unlink()
    with pytest.raises((ValueError, OSError), match=str(path if file == "mp4" else root)):
        open_lerobot_dataset(config(root))
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_another_format_version_is_refused(keypoints_dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(keypoints_dataset, root)
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match="format v2.1, this reads v3.0: convert"):
        open_lerobot_dataset(config(root))


def test_images_that_do_not_fit_the_device_give_the_same_batches(
    image_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Read from the map some batches ahead; the order counts those that were taken."""
    frames = open_lerobot_dataset(config(image_dataset))
    with caplog.at_level(logging.INFO):
        resident, read = BatchLoader(frames, 5, "cpu"), BatchLoader(frames, 5, "cpu", room=1e6)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "pusht_act.data.loader"]
    assert (
        said == "the images take 0.00196 GB, cpu has room for 0.001 GB: they are read from the cache, 4 batches ahead"
    )
    orders = EpisodeSampler(frames, [0, 1, 2], 3), EpisodeSampler(frames, [0, 1, 2], 3)
    streams = resident.iter_batches(orders[0], 20), read.iter_batches(orders[1], 20)
    for step in range(9):  # over two epochs
        batches = resident.gather(next(streams[0])), read.gather(next(streams[1]))
        assert batches[0].keys() == batches[1].keys()
        assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
        assert orders[0].state_dict() == orders[1].state_dict()
        if step == 5:  # a resumed run
            streams[1].close()
            orders[1].load_state_dict(orders[0].state_dict())
            streams = streams[0], read.iter_batches(orders[1], 20)
    indices = torch.tensor([70, 0, 33])
    assert torch.equal(read.batch(indices)["observation.image"], resident.batch(indices)["observation.image"])


def test_images_are_on_the_device_if_they_fit(image_dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = open_lerobot_dataset(config(image_dataset))
    size = frames.arrays["observation.image"].nbytes
    with caplog.at_level(logging.INFO):
        for room, stay in ((size, True), (size - 1, False)):
            caplog.clear()
            BatchLoader(frames, 5, "cpu", room=room)
            assert ("read from the cache" not in caplog.text) is stay
