"""Several processes train as one does, stop, go on and leave as one does; real ones, which meet by gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pusht_act
from pusht_act.data.lerobot_reader import open_lerobot_dataset
from pusht_act.data.loader import BatchLoader
from pusht_act.data.open_dataset import normalization_stats
from pusht_act.job import Result
from pusht_act.policy.act import act_loss, make_policy, make_processors, valid_counts
from pusht_act.runtime import distributed, launch
from pusht_act.runtime.signals import StopSignal, signals
from tests.helpers.commands import Commands, appears
from tests.helpers.dataset_config import config as dataset_config
from tests.helpers.evaluations import outcome
from tests.helpers.runs import tiny_command
from tests.helpers.training import act, assert_same_bits, metrics

Tiny = Callable[..., Result]
WITHOUT_NOISE = ["+policy.dropout=0.0", "+policy.use_vae=false"]
OPTIONS = ["batch_size=6", "steps=200", "save_freq=40", "eval_freq=40"]
"""With dropout and the VAE's noise, of which each process has its own."""


class Job:
    """The command in two processes, in the environment that torchrun makes."""

    def __init__(self, commands: Commands, folder: Path, *arguments: str, second: dict[str, str] | None = None) -> None:
        self._commands = commands
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        self.outputs = [folder / f"output-{time.monotonic_ns()}-{rank}" for rank in range(2)]
        more: list[dict[str, str]] = [{}, second or {}]
        self.pids = [
            commands.start(list(arguments), output, {**meeting, "RANK": rank, "LOCAL_RANK": rank, **more[int(rank)]})
            for rank, output in zip("01", self.outputs, strict=True)
        ]

    def ended(self) -> tuple[list[int], list[str]]:
        """The exit codes, and all that each has printed."""
        codes = [self._commands.wait(pid) for pid in self.pids]
        printed = [output.read_text() for output in self.outputs]
        assert not any("Traceback" in text for text in printed), printed
        return codes, printed

    def sent(self, number: int, rank: int, at: str) -> tuple[list[int], list[str]]:
        """The same when process `rank` alone is sent a signal after process 0 has printed `at`."""
        appears(self.outputs[0], at)
        os.kill(self.pids[rank], number)
        if number == signal.SIGKILL:
            appears(self.outputs[1 - rank], "has lost")
            os.kill(self.pids[1 - rank], signal.SIGTERM)  # as torchrun does; it may be gone, but is not waited for yet
        return self.ended()


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    codes, printed = Job(commands, folder, *tiny_command(*OPTIONS, f"output_dir={folder / 'run'}")).ended()
    assert codes == [0, 0], printed
    assert "on 2 ranks with 3 samples of a batch each" in printed[0]
    assert printed[1] == ""
    return folder / "run"


@pytest.mark.slow
def test_torchruns_processes_come_to_what_one_does(tiny: Tiny, tmp_path: Path) -> None:
    """On from one process's checkpoint, over the end of an epoch: 377 samples, so that a batch has one row."""
    options = [*WITHOUT_NOISE, "batch_size=94", "steps=10", "save_freq=4", "+optimizer.eps=1e-4"]
    one, two = tiny(*options).output_dir, tmp_path / "two"
    job = ["mode=resume", f"resume.path={one}/checkpoints/000004", "steps=10", f"output_dir={two}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pusht_act.main"]
    done = subprocess.run([sys.executable, *torchrun, *job], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ranks: 2, the checkpoint's were 1") == 1
    expected = [line for line in metrics(one) if line["step"] > 4]
    assert len(expected) == 6
    for a, b in zip(metrics(two), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    weights, ours = (load_file(run / "checkpoints/last/pretrained_model/model.safetensors") for run in (one, two))
    assert all(torch.allclose(ours[key], tensor, rtol=1e-4, atol=1e-6) for key, tensor in weights.items())
    states = [json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text()) for run in (one, two)]
    assert states[0]["sampler"] == states[1]["sampler"] == {"epoch": 1, "start_index": 377}


@pytest.mark.slow
def test_a_signal_or_a_death_in_one_process_ends_all_and_the_next_go_on_to_the_same_bits(
    whole: Path, tmp_path: Path, commands: Commands
) -> None:
    run = tmp_path / "run"
    command = tiny_command(*OPTIONS, "resume.auto=true", f"output_dir={run}")
    codes, printed = Job(commands, tmp_path, *command).sent(signal.SIGTERM, 1, "step 5/")
    assert codes == [143, 143], printed
    state = json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text())
    assert f"stopped by SIGTERM after step {state['step']}, saved" in printed[0].splitlines()[-1]
    assert printed[1] == ""
    assert 5 <= state["step"] < 40

    for killed, saved in ((1, 40), (0, 120)):
        began = time.monotonic()
        codes, printed = Job(commands, tmp_path, *command).sent(signal.SIGKILL, killed, f"step {saved}: saved")
        assert time.monotonic() - began < 300, "at once, and not when a time-out is over"
        assert codes[killed] == -signal.SIGKILL, printed
        # All is said before it leaves; torchrun's signal may find it between its last line and its exit.
        assert codes[1 - killed] in {1, -signal.SIGTERM}, printed
        last = printed[1 - killed].splitlines()[-1]
        assert f"rank {1 - killed} of 2 has lost another one" in last
        assert "resume.auto=true" in last
        assert saved <= int((run / "checkpoints/last").resolve().name) < 200
        if killed == 1:
            assert last.partition("ERROR")[2] in (run / "train.log").read_text()
            assert not list(run.glob("checkpoints/.*")), "nothing half-written"

    codes, printed = Job(commands, tmp_path, *command).ended()
    assert codes == [0, 0], printed
    assert_same_bits(whole, run, processes=2)
    assert metrics(whole) == metrics(run)
    assert outcome(whole) == outcome(run)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, 1)])
def test_a_script_that_calls_run_ends_as_the_command_does(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Without a traceback, whichever rank is sent the signal, and with no thread of gloo left as Python ends."""
    run = tmp_path / "run"
    begin = [
        "import atexit, signal, sys, pusht_act, torch.distributed as dist",
        "atexit.register(lambda: print('gloo runs:', dist.is_initialized()))",
        # A shell's background job, such as a whole run of the tests, is born with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
    ]
    script = ["-c", "; ".join([*begin, "pusht_act.run(sys.argv[1:])"]), *tiny_command("steps=100000")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = []
    for rank in "01":
        with (tmp_path / rank).open("w") as file:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *script, f"output_dir={run}"],
                    env={**os.environ, **meeting, "RANK": rank, "LOCAL_RANK": rank},
                    stdout=file,
                    stderr=file,
                )
            )
    appears(run / "train.log", "step 3/")
    ranks[1].send_signal(number)
    try:
        codes = [rank.wait(120) for rank in ranks]
    finally:
        for each in ranks:
            each.kill()
    printed = [(tmp_path / rank).read_text() for rank in "01"]
    assert codes == [code, -signal.SIGKILL if number == signal.SIGKILL else code], printed
    assert not any("Traceback" in text for text in printed), printed
    assert "gloo runs: False" in printed[0]
    if number == signal.SIGKILL:
        assert "no checkpoint was saved yet: give the same command again with resume.auto=true" in printed[0]
    else:
        assert printed[0].count(f"stopped by {number.name} after step") == 1


@pytest.mark.slow
def test_each_process_has_noise_of_its_own(whole: Path) -> None:
    streams = [load_file(path) for path in sorted((whole / "checkpoints/last/training_state").glob("rng_state*"))]
    assert len(streams) == 2
    assert not torch.equal(streams[0]["torch_rng_state"], streams[1]["torch_rng_state"])


@pytest.mark.slow
def test_one_process_goes_on_with_the_data_and_says_what_is_not_exact(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    branch = tmp_path / "branch"
    pusht_act.run(["mode=resume", f"resume.path={whole}/checkpoints/000040", "steps=200", f"output_dir={branch}"])
    assert "ranks: 1, the checkpoint's were 2: the data order continues where it was, dropout and VAE" in caplog.text
    states = [
        json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text()) for run in (whole, branch)
    ]
    assert states[0]["sampler"] == states[1]["sampler"]
    assert len(list((branch / "checkpoints/last/training_state").glob("rng_state*"))) == 1


@pytest.mark.slow
def test_all_go_back_when_a_loss_in_one_is_not_finite(
    commands: Commands, tiny: Tiny, tmp_path: Path, broken_dataset: Path
) -> None:
    """As one process does; the broken frame is in the share of one of the two."""
    data = ["dataset=pusht_keypoints", f"dataset.root={broken_dataset}"]
    options = [*data, *WITHOUT_NOISE, "steps=20", "save_freq=1", "train.max_nonfinite=0", "+optimizer.eps=1e-4"]
    one, two = tiny(*options, "train.max_rollbacks=9").output_dir, tmp_path / "two"
    codes, printed = Job(
        commands, tmp_path, *tiny_command(*options, "train.max_rollbacks=9", f"output_dir={two}")
    ).ended()
    assert codes == [0, 0], printed
    assert printed[1] == ""
    assert metrics(two, "rollback/") == metrics(one, "rollback/") != []
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "second", "message"),
    [
        (["batch_size=3"], {}, "pusht-act: batch_size=3 .* cannot be shared by 2 .* such as batch_size=4"),
        (["mode=demos"], {}, "pusht-act: mode=demos is for one process"),
        (["train.profile=true", "steps=30"], {}, "pusht-act: train.profile=true is for one process"),
        (["-m", "seed=1,2"], {}, "pusht-act: -m starts jobs from one process.* hydra.launcher.tasks_per_node=2"),
        # In one process alone.
        ([], {"PUSHT_ACT_CACHE": "/dev/null/none"}, "pusht-act: rank 1 of 2: .*/dev/null/none"),
    ],
    ids=["batch", "mode", "profile", "sweep", "one"],
)
def test_what_cannot_be_is_said_once_and_ends_all(
    given: list[str], second: dict[str, str], message: str, tmp_path: Path, commands: Commands
) -> None:
    options = given if given == ["mode=demos"] else tiny_command(*given)
    command = [*options, f"output_dir={tmp_path / 'run'}"]
    codes, printed = Job(commands, tmp_path, *command, second=second).ended()
    assert codes == [1, 1], printed
    (line,) = [line for line in printed[0].splitlines() if " INFO " not in line]
    assert re.match(message, line), line
    assert printed[1] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("use_vae", [True, False])
def test_the_losses_of_the_parts_add_up_to_the_batchs(use_vae: bool, keypoints_dataset: Path) -> None:
    """Parts of different sizes and paddings, and one of a row that counts nothing."""
    frames = open_lerobot_dataset(dataset_config(keypoints_dataset))
    config = act(frames, use_vae=use_vae, dropout=0.0, kl_weight=3.0)
    policy, pre = make_policy(config).train(), make_processors(config, normalization_stats(frames, True)).pre
    batch = pre(BatchLoader(frames, config.chunk_size, "cpu").batch(torch.tensor([0, 20, 22, 50, 70])))
    padding = {key: torch.zeros_like(value[:1]) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    padding["action_is_pad"] = ~padding["action_is_pad"]
    parts = [{key: batch[key][rows] for key in padding} for rows in (slice(0, 1), slice(1, 5))]

    def gradients(batches: list[dict[str, Any]], of: str, counts: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        policy.zero_grad()
        total = 0.0
        for each in batches:
            loss, values = act_loss(policy, each, counts)
            total += values[of].item()
            loss.backward()  # type: ignore[no-untyped-call]
        return total, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    if use_vae:  # the parts draw other noise than the whole: the KL term, which has none, is all that can be compared
        one, _ = gradients([batch], "kld_loss", None)
        several, _ = gradients([*parts, padding], "kld_loss", valid_counts(batch))
    else:
        one, whole = gradients([batch], "l1_loss", None)
        several, summed = gradients([*parts, padding], "l1_loss", valid_counts(batch))
        assert torch.allclose(whole, summed, rtol=1e-4, atol=1e-6)
    assert several == pytest.approx(one, rel=1e-5)
    assert valid_counts(batch).tolist() == [sum(valid_counts(part)[0].item() for part in parts), 5.0]
    assert valid_counts(padding).tolist() == [0.0, 0.0]


def test_submitits_tasks_are_processes_of_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # to be put back in the end
        monkeypatch.delenv(name)
    assert not launch.is_distributed_launch()
    task = {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "1", "LOCAL_LOCALID": "0", "LOCAL_GLOBALID": "0"}
    for name, value in task.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    assert not launch.is_distributed_launch()
    for name, value in {"NTASKS": "4", "JOB_NUM_NODES": "2", "LOCALID": "1", "GLOBALID": "3"}.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    assert launch.is_distributed_launch()
    assert [os.environ[name] for name in names[:5]] == ["3", "4", "1", "2", socket.gethostname()]
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="WORLD_SIZE=4 in the environment, but no RANK: .*torchrun, or unset"):
        launch.is_distributed_launch()


@pytest.mark.parametrize(("local_rank", "sees"), [(0, "4"), (1, "GPU-5"), (2, "")])
def test_a_process_sees_its_own_gpu_alone(local_rank: int, sees: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    launch.set_visible_gpu(local_rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == sees
    launch.set_visible_gpu(local_rank)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == sees


def test_a_signal_that_comes_after_the_loss_of_another_process_changes_nothing() -> None:
    def loses(number: int) -> None:
        with signals.handle():
            try:
                with distributed._peer_errors():
                    raise RuntimeError("[pair.cc:1] Connection closed")
            finally:
                signal.raise_signal(number)

    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(distributed.PeerLostError, match="Connection closed"):
            loses(signal.SIGTERM)
        with pytest.raises(StopSignal), signals.handle():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
