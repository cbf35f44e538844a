"""mode=dagger: what it trains on, that it goes on wherever it was stopped, and what each of its options does."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.envs.configs import PushtEnv
from safetensors.torch import load_file

import pusht_act
from pusht_act import step as step_module
from pusht_act.data import split_episodes
from pusht_act.demos import embedded, labels
from pusht_act.demos.demonstrator import label
from pusht_act.demos.frames import open_demos, with_labels
from pusht_act.demos.labels import Label, kept_decisions, label_decisions, read_labels, save_decisions
from pusht_act.demos.planner import PlannerOptions
from pusht_act.demos.replay import make_env, replay, reset_to
from pusht_act.environments import Here
from pusht_act.evaluate import rollout, task_of
from pusht_act.job import Result
from pusht_act.lock import locked
from tests.conftest import TINY
from tests.test_evaluate import policy_for
from tests.test_train import assert_same_bits, metrics

SEED = 3_000_000
OPTIONS = [
    *(option for option in TINY if not option.startswith(("mode=", "eval_freq="))),
    *("mode=dagger", "eval_freq=4", "save_freq=2", "dagger.rounds=1", "dagger.n_rollouts=3", "dagger.workers=1"),
]
STATE = (200.0, 300.0, 260.0, 280.0, 1.0, 40.0, -20.0)


def dagger(output_dir: Path, *overrides: str) -> Result:
    return pusht_act.run([*OPTIONS, f"output_dir={output_dir}", *overrides])


def weights(run: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = load_file(run / "checkpoints/last/pretrained_model/model.safetensors")
    return content


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return dagger(tmp_path_factory.mktemp("dagger") / "run")


@pytest.fixture
def copy(undisturbed: Result, tmp_path: Path) -> Path:
    """The finished run again, to be changed."""
    return Path(shutil.copytree(undisturbed.output_dir, tmp_path / "run", symlinks=True))


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The states that the demonstrator was really asked about."""
    states: list[np.ndarray] = []

    def counted(state: np.ndarray, *rest: Any) -> np.ndarray:
        states.append(state)
        return label(state, *rest)

    monkeypatch.setattr(labels, "label", counted)
    return states


def test_each_round_is_an_ordinary_run_on_the_labels_so_far(undisturbed: Result) -> None:
    root = undisturbed.output_dir
    for number in (0, 1):
        run = root / f"round-{number}"
        assert {"config.yaml", "runs.jsonl", "train.log", "metrics.jsonl", "eval", "checkpoints"} <= {
            path.name for path in run.iterdir()
        }
        assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert undisturbed.checkpoint == root / "round-1/checkpoints/000004"
    assert undisturbed.step == 4
    last = json.loads((root / "round-1/eval/step-000004_seeds-100000-100001/metrics.json").read_text())
    assert undisturbed.metrics["avg_max_reward"] == last["avg_max_reward"]
    assert undisturbed.metrics["loss"] == metrics(root / "round-1")[-1]["train/loss"]
    made = read_labels(root / "labels/round-1")
    log = (root / "train.log").read_text()
    frames = len(open_demos(4, PushtEnv(obs_type="environment_state_agent_pos")))
    for line in (
        "round 0/1: training",
        "round 1/1: rolling out 3 episodes",
        f"round 1/1: labelling {len(made)} states, workers: 1",
        f"|     0 | {frames:>10,} | ",
        f"|     1 | {frames + sum(len(each.action) for each in made):>10,} | ",
        f"the final policy is that of round 1; 500 episodes on fresh seeds: pusht-act mode=eval checkpoint={root}",
    ):
        assert line in log, line


def test_a_rounds_states_are_its_policys_and_its_labels_the_demonstrators(undisturbed: Result) -> None:
    folder = undisturbed.output_dir / "labels" / "round-1"
    decisions = kept_decisions(folder)
    assert decisions is not None
    assert list(decisions) == [SEED, SEED + 1, SEED + 2]
    env = make_env()
    for seed, states in decisions.items():
        env.reset(seed=seed)
        assert len(states) == 2, "12 steps, a look every 8"
        start = (*env.agent.position, *env.block.position, env.block.angle, 0.0, 0.0)
        np.testing.assert_array_equal(states[0], start)
        assert (states[1] != states[0]).any()
    for state, made in zip(np.concatenate(list(decisions.values())), read_labels(folder), strict=True):
        assert made.start == tuple(state)
        np.testing.assert_array_equal(made.action, label(state, PlannerOptions(), 16))


def test_a_state_of_a_decision_is_all_that_the_environment_needs_to_go_on() -> None:
    """Also in the middle of a push; an episode that has ended decides no more."""
    env = PushtEnv(obs_type="environment_state_agent_pos", episode_length=300)
    policy, processors = policy_for(env, chunk_size=20, n_action_steps=20)
    made = embedded.load(1)[0]
    whole = replay(made.start, made.action)
    actions = torch.full((2, 320, 2), 256.0)
    actions[0, : len(made.action)] = torch.from_numpy(made.action)

    class Replay:
        config, looked = policy.config, 0

        def predict_action_chunk(self, batch: Any) -> torch.Tensor:
            self.looked += 1
            return (actions[:, 20 * self.looked - 20 : 20 * self.looked] - 250.0) / 100.0

        def eval(self) -> None: ...

        def reset(self) -> None: ...

    result = rollout(Replay(), processors, Here(), task_of(env, policy.config), seeds=[made.start, 7])
    solved, other = result.decisions
    assert len(solved) == -(-result.episodes[0].steps // 20)
    assert len(other) == 15
    for i, state in enumerate(solved):
        rest = replay(tuple(state), made.action[20 * i :])
        np.testing.assert_array_equal(rest.observation_state[0], whole.observation_state[20 * i])
        np.testing.assert_allclose(rest.observation_state, whole.observation_state[20 * i :], atol=1e-3)
        np.testing.assert_allclose(rest.environment_state, whole.environment_state[20 * i :], atol=1e-3)
    with pytest.raises(ValueError, match="velocity is not finite"):
        replay((*STATE[:6], np.inf), made.action)
    with pytest.raises(ValueError, match="start has 6 numbers"):
        replay(STATE[:6], made.action)  # type: ignore[arg-type]


def test_a_later_round_begins_with_the_weights_and_the_statistics_of_the_one_before(tmp_path: Path) -> None:
    root = dagger(tmp_path / "run", "policy.optimizer_lr=0", "policy.optimizer_lr_backbone=0").output_dir
    first, second = weights(root / "round-0"), weights(root / "round-1")
    assert all(torch.equal(first[key], second[key]) for key in first)
    statistics = [
        load_file(path)
        for path in sorted(root.glob("round-*/checkpoints/last/pretrained_model/*_normalizer_processor.safetensors"))
    ]
    assert len(statistics) == 2
    assert all(torch.equal(statistics[0][key], statistics[1][key]) for key in statistics[0])


class Killed(BaseException):
    """As a signal, no error of the program's."""


def test_stopped_while_labelling_and_in_a_round_it_comes_to_the_same_bits(
    undisturbed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"label": 0, "step": 0}

    def dying[T](name: str, call: Callable[..., T], at: set[int]) -> Callable[..., T]:
        def counted(*arguments: Any, **options: Any) -> T:
            calls[name] += 1
            if calls[name] in at:
                raise Killed
            return call(*arguments, **options)

        return counted

    # In round 0 before and after its first checkpoint; in the second rollout's labels; in round 1 after a checkpoint.
    monkeypatch.setattr(step_module, "train_step", dying("step", step_module.train_step, {2, 6, 11}))
    monkeypatch.setattr(labels, "label", dying("label", label, {4}))
    stops = 0
    while True:
        try:
            dagger(tmp_path / "run", "overwrite=true")
            break
        except Killed:
            stops += 1
    assert stops == 4
    # 1 + 3 + 2 steps of round 0 and 2 + 2 of round 1, and the stops; 6 labels, one of them again, and the stop.
    assert calls == {"step": 1 + 3 + 2 + 2 + 2 + 3, "label": 6 + 1 + 1}
    for number in (0, 1):
        assert_same_bits(undisturbed.output_dir / f"round-{number}", tmp_path / f"run/round-{number}")
        assert metrics(undisturbed.output_dir / f"round-{number}") == metrics(tmp_path / f"run/round-{number}")
    assert not (tmp_path / "run.old-1").exists(), "overwrite=true is for what cannot be gone on with"


def test_what_is_finished_is_read(copy: Path, undisturbed: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "train_step", None)
    again = dagger(copy)
    assert again.metrics == undisturbed.metrics
    assert again.checkpoint == copy / "round-1/checkpoints/000004"


def test_a_rollout_or_label_that_was_damaged_is_made_again(
    copy: Path, undisturbed: Result, labelled: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(copy / "round-1")
    (copy / f"labels/round-1/{SEED + 1}.npz").write_bytes(b"half a file")
    (copy / "labels/round-1/decisions.npz").write_bytes(b"")
    dagger(copy)
    assert "decisions.npz is damaged" in caplog.text
    assert f"{SEED + 1}.npz is damaged" in caplog.text
    assert "labelling 6 states, workers: 1, 4 are there already" in caplog.text
    assert len(labelled) == 2
    assert_same_bits(undisturbed.output_dir / "round-1", copy / "round-1")


def test_more_rounds_may_be_asked_for_later(copy: Path, labelled: list[np.ndarray]) -> None:
    result = dagger(copy, "dagger.rounds=2", "job_name=other", "eval.n_videos=1", "dagger.workers=1")
    assert result.checkpoint == copy / "round-2/checkpoints/000004"
    decisions = kept_decisions(copy / "labels/round-2")
    assert decisions is not None
    assert list(decisions) == [SEED + 3, SEED + 4, SEED + 5]
    np.testing.assert_array_equal(labelled, np.concatenate(list(decisions.values())))
    both = [str(copy.resolve() / f"labels/round-{n}") for n in (1, 2)]
    saved = json.loads((copy / "round-2/checkpoints/last/pretrained_model/pusht_act.json").read_text())["config"]
    assert saved["dagger"]["labels"] == both
    assert saved["policy"]["pretrained_path"] == str(copy / "round-1/checkpoints/000004/pretrained_model")
    assert (saved["mode"], saved["job_name"]) == ("full", "other_round-2")


@pytest.mark.parametrize(
    ("override", "was"),
    [("policy.kl_weight=1", "10"), ("dagger.n_rollouts=2", "3"), ("demos.speed=7", "9.0"), ("steps=5", "4"),
     ("+policy.dropout=0.3", "None"), ("dagger.start_seed=4000000", "3000000")],
)  # fmt: skip
def test_another_configuration_is_refused(override: str, was: str, undisturbed: Result) -> None:
    key = override.lstrip("+").partition("=")[0]
    with pytest.raises(
        ValueError, match=rf"{override.lstrip('+')}(\.0)?: the rounds in .* with {key}={was};.*overwrite"
    ):
        dagger(undisturbed.output_dir, override)


def test_another_configuration_may_move_the_old_rounds_aside(copy: Path) -> None:
    dagger(copy, "dagger.n_rollouts=2", "dagger.start_seed=4000000", "overwrite=true", "demos.speed=7")
    folder = copy / "labels" / "round-1"
    decisions = kept_decisions(folder)
    assert decisions is not None
    assert list(decisions) == [4_000_000, 4_000_001]
    first = read_labels(folder)[0]
    np.testing.assert_array_equal(first.action, label(first.start, PlannerOptions(speed=7), 16))  # type: ignore[arg-type]
    assert (copy.with_name("run.old-1") / "round-1").is_dir()


def test_a_folder_in_use_otherwise_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="is in use: give another job_name= or output_dir="):
        dagger(tmp_path / "other")
    with locked(copy), pytest.raises(FileExistsError, match="is being written by process"):
        dagger(copy)


def test_a_round_is_evaluated_and_resumed_as_any_run(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluated = pusht_act.run(["mode=eval", f"checkpoint={copy / 'round-1'}", "eval.n_episodes=2", "eval.n_videos=0"])
    assert evaluated.step == 4
    caplog.clear()
    resumed = pusht_act.run(["mode=resume", f"output_dir={copy / 'round-1'}", "steps=6"])
    assert resumed.step == 6
    assert "pusht_act/demos: 10 episodes" in caplog.text, "four of the data set and six labels"
    again = dagger(copy)
    assert again.checkpoint == copy / "round-1/checkpoints/000004", "the round is what it was"


def test_labels_may_be_trained_on_from_the_start(undisturbed: Result, tiny: Any, caplog: Any) -> None:
    folder = undisturbed.output_dir / "labels" / "round-1"
    caplog.set_level(logging.INFO)
    tiny("steps=1", f"dagger.labels=[{folder}]", "dataset.eval_split=0.5", "+dataset.episodes=[0,1]")
    assert "pusht_act/demos: 7 episodes" in caplog.text, "one of two, and six labels"
    assert "(1 episodes held out)" in caplog.text
    with pytest.raises(ValueError, match="dagger.labels=.*holds no labels"):
        tiny("steps=1", f"dagger.labels=[{folder.parent}]", "overwrite=true")


@pytest.mark.parametrize("obs_type", ["pixels_agent_pos", "environment_state_agent_pos"])
def test_labels_are_observed_as_the_environment_shows_them(obs_type: str) -> None:
    own = open_demos(2, PushtEnv(obs_type=obs_type))
    action = label(STATE, length=5)
    other = (100.0, 100.0, *STATE[2:5], 0.0, 0.0)
    both = with_labels(own, [Label(STATE, action), Label(other, action[:2])])
    assert both.n_labels == 2
    assert len(both) == len(own) + 7
    assert both.episodes[-2:].tolist() == [[len(own), len(own) + 5], [len(own) + 5, len(own) + 7]]
    assert both.stats == own.stats
    for key, array in own.arrays.items():
        np.testing.assert_array_equal(both.arrays[key][: len(own)], array)
    env, frame = make_env(), len(own)
    env.obs_type = obs_type
    for start, actions in ((STATE, action), (other, action[:2])):
        reset_to(env, start)
        for each in actions:
            seen = env.get_obs()
            np.testing.assert_array_equal(both.arrays["action"][frame], each)
            np.testing.assert_array_equal(both.arrays["observation.state"][frame], seen["agent_pos"].astype(np.float32))
            if obs_type == "pixels_agent_pos":
                picture = both.arrays["observation.image"][frame]
                np.testing.assert_array_equal(picture, seen["pixels"].transpose(2, 0, 1))
            else:
                points = both.arrays["observation.environment_state"][frame]
                np.testing.assert_array_equal(points, seen["environment_state"].astype(np.float32))
            env.step(each)
            frame += 1
    assert with_labels(own, []) is own
    assert len(with_labels(both, [Label(STATE, action)])) == len(both) + 5


def test_other_labels_are_another_data_set() -> None:
    own = open_demos(2, PushtEnv(obs_type="environment_state_agent_pos"))
    action = label(STATE, length=5)
    keys = {
        with_labels(frames, [made]).key
        for frames in (own, open_demos(3, PushtEnv(obs_type="environment_state_agent_pos")))
        for made in (Label(STATE, action), Label(STATE, action + 1), Label((1.0, *STATE[1:]), action))
    }
    assert len(keys) == 6


def test_labels_of_pictures_of_another_size_are_refused() -> None:
    own = open_demos(2, PushtEnv(obs_type="environment_state_agent_pos"))
    own.arrays["observation.state"] = np.zeros((len(own), 3), np.float32)
    with pytest.raises(ValueError, match=r"observation.state has shape \(3,\), gym-pusht gives \(2,\)"):
        with_labels(own, [Label(STATE, np.ones((6, 2), np.float32))])


def test_episodes_are_chosen_and_held_out_among_the_data_sets_own() -> None:
    own = open_demos(4, PushtEnv(obs_type="environment_state_agent_pos"))
    both = with_labels(own, [Label(STATE, label(STATE, length=2))] * 2)
    assert split_episodes(both, None, 0.0) == ([0, 1, 2, 3, 4, 5], [])
    assert split_episodes(both, None, 0.5) == ([0, 1, 4, 5], [2, 3])
    assert split_episodes(both, [0, 2], 0.0) == ([0, 2, 4, 5], [])
    with pytest.raises(ValueError, match=r"dataset.episodes=\[4\]"):
        split_episodes(both, [4], 0.0)


def test_a_state_that_is_solved_or_outside_has_no_label(tmp_path: Path, labelled: list[np.ndarray]) -> None:
    solved = (50.0, 50.0, 256.0, 256.0, np.pi / 4, 0.0, 0.0)
    outside = (600.0, 50.0, 256.0, 256.0, 1.0, 0.0, 0.0)
    decisions = {5: np.array([solved, STATE, outside]), 6: np.array([solved])}
    save_decisions(tmp_path, decisions)
    label_decisions(tmp_path, decisions, PlannerOptions(), 4, 1, "round 1/1")
    made = read_labels(tmp_path)
    assert [each.start for each in made] == [STATE]
    np.testing.assert_array_equal(labelled, [STATE])
    label_decisions(tmp_path, decisions, PlannerOptions(), 4, 1, "round 1/1")
    assert len(labelled) == 1


def test_workers_change_nothing_but_the_time(tmp_path: Path) -> None:
    decisions = {5: np.array([STATE]), 6: np.array([(1.0, *STATE[1:])])}
    for workers in (1, 2):
        save_decisions(tmp_path / str(workers), decisions)
        label_decisions(tmp_path / str(workers), decisions, PlannerOptions(), 4, workers, "round 1/1")
    one, two = read_labels(tmp_path / "1"), read_labels(tmp_path / "2")
    assert [each.start for each in one] == [each.start for each in two]
    np.testing.assert_array_equal([each.action for each in one], [each.action for each in two])


def test_workers_import_neither_torch_nor_lerobot() -> None:
    code = "import sys, pusht_act.demos.labels; print({'torch', 'lerobot'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
