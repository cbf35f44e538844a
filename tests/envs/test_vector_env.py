"""VectorEnv in worker processes: the same bits as in this one, none left behind, none that hangs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from lerobot.envs.configs import PushtEnv

import pusht_act
from pusht_act.config.schema import EvalConfig
from pusht_act.envs import vector_env as module
from pusht_act.envs.episode import VideoRequest
from pusht_act.envs.vector_env import SubprocVectorEnv, SyncVectorEnv, VectorEnv, make_vector_envs
from pusht_act.evaluation.evaluate import evaluate
from pusht_act.evaluation.records import Record
from pusht_act.evaluation.rollout import Actor, Rollout, env_spec, rollout
from pusht_act.job import Result
from pusht_act.runs.run_dir import RunDir
from pusht_act.runtime.signals import STOPPING
from tests.helpers.policies import policy_for
from tests.helpers.processes import gone
from tests.helpers.sampling import some_not_slow

Tiny = Callable[..., Result]
KINDS = ["pixels_agent_pos", "environment_state_agent_pos"]


@pytest.fixture(scope="module")
def two() -> Iterator[SubprocVectorEnv]:
    workers = SubprocVectorEnv(2)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def three() -> Iterator[SubprocVectorEnv]:
    workers = SubprocVectorEnv(3)
    yield workers
    workers.close()


def rolled_out(
    envs: VectorEnv, kind: str, seeds: list[int], videos: Sequence[VideoRequest] = (), **options: Any
) -> Rollout:
    env = PushtEnv(obs_type=kind, episode_length=15)
    policy, processors = policy_for(env, **options)
    return rollout(Actor(policy, processors), envs, env_spec(env, policy.config), seeds, videos)


def assert_same_bits(a: Rollout, b: Rollout) -> None:
    assert a.episodes == b.episodes
    assert len(a.actions) == len(b.actions)
    for each, other in zip(a.actions, b.actions, strict=True):
        np.testing.assert_array_equal(each, other, strict=True)


@pytest.mark.parametrize("kind", some_not_slow(KINDS[::-1], every=2))
def test_the_number_of_workers_changes_no_bit(
    kind: str, two: SubprocVectorEnv, three: SubprocVectorEnv, tmp_path: Path
) -> None:
    """Nor does what a worker did before: here a batch of another size, and other observations."""

    def videos(name: str) -> list[VideoRequest]:
        (tmp_path / name).mkdir()
        return [VideoRequest(tmp_path / name / f"{i}.mp4", 10, tmp_path / name / f"{i}.png") for i in range(2)]

    for seeds in ([50, 51, 52, 53, 54], [60, 61]):
        names = [f"{len(seeds)}-{workers}" for workers in ("here", "two", "three")]
        vector_envs: list[VectorEnv] = [SyncVectorEnv(), two, three]
        here, *others = (
            rolled_out(envs, kind, seeds, videos(name)) for envs, name in zip(vector_envs, names, strict=True)
        )
        for other in others:
            assert_same_bits(here, other)
        files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in names]
        assert sorted(files[0]) == ["0.mp4", "0.png", "1.mp4", "1.png"]
        assert files[0] == files[1] == files[2]
        with av.open(str(tmp_path / names[0] / "1.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == 15 + 1


@pytest.mark.parametrize("target", ["/dev/full", "/nowhere/0.mp4"])
def test_a_video_that_cannot_be_written_is_an_error_and_the_workers_go_on(
    target: str, two: SubprocVectorEnv, tmp_path: Path
) -> None:
    (tmp_path / "0.mp4").symlink_to(target)
    for envs in (SyncVectorEnv(), two):
        with pytest.raises(OSError, match=r"No space left|No such file"):
            rolled_out(envs, KINDS[1], [1, 2], [VideoRequest(tmp_path / "0.mp4", 10)])
        assert len(rolled_out(envs, KINDS[1], [1, 2]).episodes) == 2


def test_an_action_for_each_look_works_in_workers_too(two: SubprocVectorEnv) -> None:
    ensembling: dict[str, Any] = {"n_action_steps": 1, "temporal_ensemble_coeff": 0.01}
    here = rolled_out(SyncVectorEnv(), KINDS[1], [7, 8, 9], **ensembling)
    assert len(here.actions) == 15
    assert_same_bits(here, rolled_out(two, KINDS[1], [7, 8, 9], **ensembling))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"n_action_steps": 1, "temporal_ensemble_coeff": 0.01}], ids=["chunks", "mean"]
)
def test_batches_side_by_side_change_no_bit(
    kind: str, options: dict[str, Any], two: SubprocVectorEnv, three: SubprocVectorEnv, tmp_path: Path
) -> None:
    env = PushtEnv(obs_type=kind, episode_length=15)
    policy, processors = policy_for(env, **options)
    config = EvalConfig(n_episodes=7, batch_size=2, start_seed=50, n_videos=3)
    records = [Record(RunDir(tmp_path / name), 0, {"start_seed": 50, "n_episodes": 7}) for name in ("one", "both")]
    groups_of: list[list[VectorEnv]] = [[SyncVectorEnv()], [two, three]]
    one, both = (
        evaluate(Actor(policy, processors), groups, env, config, record=record)
        for record, groups in zip(records, groups_of, strict=True)
    )
    assert one.episodes == both.episodes
    assert [episode.episode_ix for episode in both.episodes] == list(range(7))
    for path in records[0].directory.iterdir():
        assert path.name == "metrics.json" or path.read_bytes() == (records[1].directory / path.name).read_bytes()
    assert len(both.video_paths) == 3


def test_a_group_that_fails_cancels_the_other(two: SubprocVectorEnv) -> None:
    env = PushtEnv(obs_type=KINDS[1], episode_length=100_000)
    policy, processors = policy_for(env)
    killed = SubprocVectorEnv(1)
    killed._processes[0].kill()
    config = EvalConfig(n_episodes=4, batch_size=2, start_seed=50, n_videos=0)
    with pytest.raises(OSError, match="a worker process of the evaluation was killed"):
        evaluate(Actor(policy, processors), [two, killed], env, config)


def test_an_environment_forgets_the_episode_before() -> None:
    used = SyncVectorEnv()
    rolled_out(used, KINDS[1], [1, 2, 3])
    assert_same_bits(rolled_out(SyncVectorEnv(), KINDS[1], [4, 5]), rolled_out(used, KINDS[1], [4, 5]))


def test_a_worker_has_neither_torch_nor_lerobot() -> None:
    code = (
        "import sys; from pusht_act.envs.vector_env import EnvSpec, SyncVectorEnv;"
        "import numpy as np; here = SyncVectorEnv();"
        "here.reset(EnvSpec('gym_pusht/PushT-v0', {}, 'pixels_agent_pos', 9), [1], [None]);"
        "here.step_chunk(np.ones((1, 2, 2), np.float32));"
        "print({'torch', 'lerobot'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "set()"


def test_signals_are_not_for_workers_and_one_that_is_killed_is_an_error_of_one_line() -> None:
    workers = SubprocVectorEnv(2)
    for moment in ("born", "at work"):
        for process, number in product(workers._processes, STOPPING):
            process.send_signal(number)
        assert len(rolled_out(workers, KINDS[1], [1, 2]).episodes) == 2, moment
    workers._processes[1].kill()
    with pytest.raises(
        OSError, match=r"^a worker process of the evaluation was killed, .*a smaller eval.workers"
    ) as caught:
        rolled_out(workers, KINDS[1], [1, 2])
    assert "\n" not in str(caught.value)
    workers.close()
    assert all(gone(process.pid) for process in workers._processes)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed() -> None:
    code = (
        "from pusht_act.envs.vector_env import SubprocVectorEnv; import time; workers = SubprocVectorEnv(2);"
        "print(*(process.pid for process in workers._processes), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(parent.pid, signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of workers that were asked for."""
    counts: list[int] = []

    class Counted(SyncVectorEnv):
        def __init__(self, count: int) -> None:
            super().__init__()
            counts.append(count)

    monkeypatch.setattr(module, "SubprocVectorEnv", Counted)
    monkeypatch.setattr(module, "cores", lambda: 4)
    return counts


@pytest.mark.parametrize(
    ("n_episodes", "batch_size", "workers", "processes"),
    [
        (50, 50, 0, [4]),
        (500, 12, 0, [1, 1]),
        (9, 50, 0, []),
        (9, 50, 3, [3]),
        (2, 50, 3, [2]),
        (500, 50, 1, []),
        (500, 50, 3, [2, 1]),
    ],
)
def test_how_many_workers_there_are(
    n_episodes: int, batch_size: int, workers: int, processes: list[int], started: list[int]
) -> None:
    config = EvalConfig(n_episodes=n_episodes, batch_size=batch_size, start_seed=0, n_videos=0, workers=workers)
    with make_vector_envs(config):
        assert started == processes
    with make_vector_envs(config, needed=False):
        assert started == processes


def test_a_run_and_an_evaluation_start_their_workers_once(tiny: Tiny, started: list[int]) -> None:
    run = tiny("eval_freq=2", "eval.workers=2").output_dir
    assert started == [2]
    pusht_act.run(["mode=eval", f"checkpoint={run}", "eval.n_episodes=4", "eval.batch_size=3", "eval.workers=3"])
    assert started == [2, 2, 1]
    tiny("overwrite=true", "eval.workers=2", "eval_freq=0")
    assert started == [2, 2, 1], "no evaluation, no workers"


def test_closed_environments_carry_nothing_out() -> None:
    here = SyncVectorEnv()
    env = PushtEnv(obs_type=KINDS[1])
    here.reset(env_spec(env, policy_for(env)[0].config), [1], [None])
    here.close()
    with pytest.raises(OSError, match="closed"):
        here.step_chunk(np.ones((1, 2, 2), np.float32))


def test_compiled_code_is_loaded_before_an_evaluation_begins() -> None:
    """A signal may interrupt an evaluation, but not numba while it loads: that prints a traceback."""
    code = (
        "from pusht_act.config.schema import EvalConfig; from pusht_act.envs import physics, vector_env\n"
        "options = EvalConfig(n_episodes=1, batch_size=1, start_seed=0, n_videos=0, workers=1, background=False)\n"
        "for needed in (False, True):\n"
        "    with vector_env.make_vector_envs(options, needed):\n"
        "        print(len(physics._advance.overloads))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
