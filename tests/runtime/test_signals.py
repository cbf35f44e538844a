"""A signal stops a job: at the end of a training step, which is saved, and anywhere else at once."""

import json
import logging
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from hydra.core.hydra_config import HydraConfig

import pusht_act
from pusht_act import job as job_module
from pusht_act import main
from pusht_act.evaluation.evaluate import BATCH
from pusht_act.evaluation.records import read_episodes
from pusht_act.job import Result
from pusht_act.runtime.signals import STOPPING, StopSignal, signals
from tests.helpers.commands import Commands, appears
from tests.helpers.evaluations import outcome
from tests.helpers.runs import tiny_command
from tests.helpers.training import assert_same_bits, metrics

Tiny = Callable[..., Result]
SIGNALS = pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
LONG = ["eval.n_episodes=25000", "eval.batch_size=50", "env.episode_length=300", "eval.workers=1"]
"""An evaluation of minutes."""
SHORT = ["eval.n_episodes=50", "env.episode_length=12"]
AT_ONCE_S = 30.0
"""What is at once on a loaded machine too, and less than what a signal must not wait for."""


class Job:
    """A command under way, and what it prints."""

    def __init__(self, commands: Commands, folder: Path, *arguments: str) -> None:
        self._commands, self.output = commands, folder / f"output-{time.monotonic_ns()}"
        self.pid = commands.start(list(arguments), self.output)

    def stopped(self, number: int, at: str = "", after: float = 0.0) -> tuple[int, str]:
        """The exit code and all that was printed, when `number` is sent `after` seconds after the text `at`."""
        appears(self.output, at)
        time.sleep(after)
        sent = time.monotonic()
        os.kill(self.pid, number)
        code = self._commands.wait(self.pid)
        self.seconds = time.monotonic() - sent
        printed = self.output.read_text()
        assert "Traceback" not in printed
        return code, printed


@pytest.fixture
def job(commands: Commands, tmp_path: Path) -> Callable[..., Job]:
    return lambda *arguments: Job(commands, tmp_path, *arguments)


def state(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "checkpoints/last/training_state/pusht_act.json").read_text())
    return content


@pytest.mark.slow
def test_training_stops_saved_at_the_end_of_a_step_and_goes_on_to_the_same_bits(
    tiny: Tiny, tmp_path: Path, job: Callable[..., Job]
) -> None:
    """Each signal in turn, most of them while an evaluation is under way beside training."""
    options = ["steps=16", "eval_freq=4", "save_freq=5", "log_freq=3", "env.episode_length=60", "eval.n_episodes=10"]
    options += ["eval.batch_size=10", "checkpoints.keep_last=2"]
    whole = tiny(*options, f"output_dir={tmp_path / 'whole'}").output_dir
    run = tmp_path / "run"
    command = tiny_command(*options, f"output_dir={run}")
    at = 0
    for number in STOPPING:
        code, printed = job(*command).stopped(number, f"step {at + 3 - at % 3}/")
        assert code == 128 + number
        line = printed.splitlines()[-1]
        step = state(run)["step"]
        assert f"stopped by {number.name} after step {step}, saved {run}/checkpoints/{step:06d}; to resume:" in line
        assert step > at, "the step under way was finished"
        assert line.split("WARNING ")[1] in (run / "train.log").read_text()
        at, command = step, line.partition("to resume: pusht-act ")[2].split()
        assert command == ["mode=resume", f"output_dir={run}", "steps=16"]
    pusht_act.run(command)
    assert_same_bits(whole, run)
    assert outcome(run) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "at", "pending"),
    [
        (["eval.background=false", "steps=9"], "step 2/", [2]),  # in the way of training
        (["steps=2"], "step 2/", [2]),  # the last step's is waited for
        (["steps=9"], "step 4/", [2, 4]),  # step 4 waits for that of step 2 before its own begins
        (["steps=4"], "step 4/", [2, 4]),
    ],
    ids=["foreground", "last", "wait", "last-wait"],
)
def test_an_evaluation_is_broken_off_and_done_again(
    options: list[str], at: str, pending: list[int], tmp_path: Path, job: Callable[..., Job], tiny: Tiny
) -> None:
    run = tmp_path / "run"
    command = tiny_command("eval_freq=2", "save_freq=0", *LONG, *options, f"output_dir={run}")
    stopping = job(*command)
    code, _ = stopping.stopped(signal.SIGTERM, at, after=0.2)
    assert code == 143
    assert stopping.seconds < AT_ONCE_S
    assert state(run)["pending"] == pending
    assert not list(run.glob("eval/*/episodes.csv"))
    # Shorter evaluations, to come to an end.
    steps = next(option for option in options if option.startswith("steps="))
    assert pusht_act.run(["mode=resume", f"output_dir={run}", steps, *SHORT]).step == int(steps[6:])
    tiny("eval_freq=2", "save_freq=0", *LONG, *options, *SHORT, f"output_dir={tmp_path / 'whole'}")
    assert_same_bits(tmp_path / "whole", run)
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops", [["step 4/"], ["step 4/", "resuming from"], ["step 4/", "resuming from", "resuming from"]]
)
@pytest.mark.parametrize("background", [True, False])
def test_all_evaluations_that_were_due_are_done_after_several_stops(
    stops: list[str], background: bool, tmp_path: Path, job: Callable[..., Job], tiny: Tiny
) -> None:
    run, options = tmp_path / "run", ["eval_freq=2", "save_freq=0", "steps=9", "resume.auto=true"]
    options += [*LONG, f"eval.background={background}"]
    if not background:
        stops = [each.replace("step 4/", "step 2/") for each in stops]
    for number, text in enumerate(stops):
        assert job(*tiny_command(*options, f"output_dir={run}")).stopped(signal.SIGTERM, text, after=0.4)[0] == 143
        step, due = state(run)["step"], state(run)["pending"]
        assert due == [*range(2, step + 1, 2)]
        assert number == 0 or step > 2
    resumed = pusht_act.run(["mode=resume", f"output_dir={run}", "steps=9", *SHORT])
    assert resumed.step == 9
    tiny(*options, *SHORT, "resume.auto=false", f"output_dir={tmp_path / 'whole'}")
    assert_same_bits(tmp_path / "whole", run)
    assert outcome(run) == outcome(tmp_path / "whole")
    assert [line["step"] for line in metrics(run, "eval/")] == [2, 4, 6, 8, 9]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.6, 1.2])
def test_a_signal_before_the_first_step_leaves_nothing(seconds: float, tmp_path: Path, job: Callable[..., Job]) -> None:
    command = tiny_command("steps=100000", f"output_dir={tmp_path / 'run'}")
    starting = job(*command)
    code, printed = starting.stopped(signal.SIGTERM, after=seconds)
    if code == -signal.SIGTERM:
        pytest.skip("the process was not yet the command")
    assert code == 143
    if "step 1/" not in printed:
        assert "stopped by SIGTERM" in printed.splitlines()[-1]
        assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
def test_without_checkpoints_it_says_so(tmp_path: Path, job: Callable[..., Job]) -> None:
    command = tiny_command("steps=100000", "save_checkpoint=false", f"output_dir={tmp_path / 'run'}")
    code, printed = job(*command).stopped(signal.SIGUSR1, "step 2/")
    assert code == 138
    assert "stopped by SIGUSR1 after step" in printed.splitlines()[-1]
    assert "no checkpoint was written" in printed.splitlines()[-1]


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path: Path, job: Callable[..., Job]) -> None:
    ten_seconds_a_step = ["batch_size=400", "policy.dim_model=256", "policy.chunk_size=100"]
    slow = job(*tiny_command("steps=9", *ten_seconds_a_step, f"output_dir={tmp_path / 'run'}"))
    appears(slow.output, "step 1/")
    os.kill(slow.pid, signal.SIGINT)
    time.sleep(0.1)
    code, printed = slow.stopped(signal.SIGINT)
    assert code == 130
    assert "saved" not in printed
    said = "pusht-act: interrupted by a second Ctrl-C, without a checkpoint of the last step"
    assert printed.splitlines()[-1] == said
    assert (tmp_path / "run" / "train.log").read_text().endswith(f"ERROR {said}\n")
    assert slow.seconds < 5


@pytest.mark.slow
@SIGNALS
def test_an_evaluation_of_its_own_leaves_at_once_and_nothing_half_written(
    number: signal.Signals, tiny: Tiny, tmp_path: Path, job: Callable[..., Job]
) -> None:
    run = tiny("steps=1").output_dir
    stopping = job(
        "mode=eval", f"checkpoint={run}", "eval.n_episodes=25000", "eval.workers=2", "env.episode_length=300"
    )
    deadline = time.monotonic() + 60
    while not list(run.glob(f"eval/*.part/{BATCH}*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    code, printed = stopping.stopped(number)
    assert code == 128 + number
    assert [line for line in printed.splitlines() if "INFO" not in line][-1] == f"pusht-act: stopped by {number.name}"
    # Finished batches and their videos, with which the same command continues.
    [part] = run.glob("eval/*")
    assert part.suffix == ".part"
    assert not [path for path in part.iterdir() if path.name.startswith(".")]
    assert all(read_episodes(batch) for batch in part.glob(f"{BATCH}*"))
    assert stopping.seconds < AT_ONCE_S


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.02, 0.04, 0.5])  # the first ones come while the workers begin
def test_demonstrations_stop_at_once_and_leave_nothing(after: float, tmp_path: Path, job: Callable[..., Job]) -> None:
    target = tmp_path / "demos"
    command = ["mode=demos", "env=pusht_keypoints", "demos.workers=2", f"output_dir={target}"]
    stopping = job(*command, "demos.n_episodes=500")
    code, printed = stopping.stopped(signal.SIGTERM, "planning 500", after)
    assert code == 143
    assert printed.splitlines()[-1] == "pusht-act: stopped by SIGTERM"
    assert stopping.seconds < AT_ONCE_S
    assert not target.exists()


@pytest.mark.slow
def test_a_sweep_stops_with_its_job(tmp_path: Path, job: Callable[..., Job]) -> None:
    command = tiny_command("steps=100000", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    code, printed = job("-m", *command).stopped(signal.SIGTERM, "step 2/")
    assert code == 143
    assert "#1" not in printed
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_launchers_process_hands_the_signal_to_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit has it: its handler for SIGUSR2 queues the job again, that for SIGTERM does nothing."""
    heard: list[int] = []
    former = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        monkeypatch.setattr(job_module, "run_job", lambda *_: signal.raise_signal(signal.SIGUSR2))
        cfg = main.run.__globals__["OmegaConf"].create({"output_dir": "x", "mode": "test"})
        node = cfg.copy()
        node.update({"overrides": {"task": []}, "mode": "RUN", "runtime": {"choices": {}}})
        monkeypatch.setattr(HydraConfig, "get", lambda: node)
        with pytest.raises(OSError, match="^stopped by SIGUSR2$"):
            main._task.__wrapped__(cfg)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, former)


def test_in_a_slurm_job_sigterm_saves_and_training_goes_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill follows, or SIGUSR2."""

    class Sends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("step 3/"):
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    sends, logger = Sends(), logging.getLogger("pusht_act.training.progress")
    logger.addHandler(sends)
    try:
        result = tiny("steps=6", "save_freq=0")
    finally:
        logger.removeHandler(sends)
    assert result.step == 6
    assert [int(step) for step in re.findall(r"step (\d+): saved", caplog.text)] == [3, 6]
    assert [path.name for path in (result.output_dir / "checkpoints").glob("0*")] == ["000006"]


def test_a_process_of_a_launcher_does_not_inherit_that_signals_are_handled() -> None:
    """submitit pickles the task by value, and with it what it refers to."""
    with signals.handle():
        assert pickle.loads(pickle.dumps(signals)) is signals
        assert cloudpickle.loads(cloudpickle.dumps(lambda: signals))() is signals


def _steps(number: int) -> None:
    with signals.handle(), signals.defer() as stop:
        for step in range(9):
            if step == 2:
                signal.raise_signal(number)
            if step == 3:
                stop.raise_if_stopped(step)


def _broken_off(number: int) -> None:
    with signals.handle(), signals.defer() as stop:
        with suppress(StopSignal), signals.interruptible():
            signal.raise_signal(number)
            pytest.fail("it went on")
        stop.raise_if_stopped(7)


def _not_begun(number: int) -> None:
    with signals.handle(), signals.defer():
        signal.raise_signal(number)
        with signals.interruptible():
            pytest.fail("it began")


@SIGNALS
def test_the_beginning_of_processes_is_not_broken_off(number: signal.Signals) -> None:
    """A thread from before takes the signal, since it does not block it; Python's handler runs in the main one."""
    former, done = signal.signal(number, signal.default_int_handler), threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    begun = False
    try:
        with suppress(StopSignal), signals.handle():
            with signals.block():
                os.kill(os.getpid(), number)
                time.sleep(0.05)
                begun = True
            pytest.fail("it went on")
        assert begun
    finally:
        done.set()
        thread.join()
        signal.signal(number, former)


@SIGNALS
def test_when_a_signal_is_heard(number: signal.Signals) -> None:
    former = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(StopSignal) as caught, signals.handle():
            signal.raise_signal(number)
        assert caught.value.code == 128 + number
        assert not isinstance(caught.value, Exception)
        for job, step in ((_steps, 3), (_broken_off, 7), (_not_begun, None)):
            with pytest.raises(StopSignal) as caught:
                job(number)
            assert caught.value.step == step
        assert signal.getsignal(number) is signal.default_int_handler
        assert not signals.is_active
    finally:
        signal.signal(number, former)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_a_destructor_swallows_is_not_lost() -> None:
    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StopSignal), signals.handle():
        Swallows()


def test_what_was_ignored_stays_so_and_another_thread_hears_nothing() -> None:
    former = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with signals.handle():
            signal.raise_signal(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, former)
    before = [signal.getsignal(number) for number in STOPPING]
    seen: list[Any] = []

    def elsewhere() -> None:
        with signals.handle():
            seen.extend(signal.getsignal(number) for number in STOPPING)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == before
