"""One writer to a run directory: the second is refused, a dead one's place is taken, by one only."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import pusht_act
from pusht_act.job import Result
from pusht_act.runs.run_dir import ensure_unused
from pusht_act.runtime import lock as module
from pusht_act.runtime.lock import LEASE_S, NAME, LockOwner, is_lock, locked
from tests.helpers.commands import Commands, appears
from tests.helpers.runs import tiny_command

ELSEWHERE = replace(LockOwner(), host="elsewhere", boot="another", namespace="another", token="b")
GONE = replace(LockOwner(), started="1", token="a")
"""This process's number, used by another one before."""


def leave(folder: Path, holder: LockOwner, untouched: float = 0.0) -> Path:
    """`holder`'s lock."""
    folder.mkdir(exist_ok=True)
    path = folder / NAME
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - untouched,) * 2)
    return path


def refused(folder: Path) -> str:
    with pytest.raises(FileExistsError) as caught, locked(folder):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_second_writer_is_told_who_the_first_is_and_what_to_do(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run"
    with locked(run):
        said = refused(run)
        for part in (f"output_dir={run}", f"process {os.getpid()} on {socket.gethostname()}", "give another", "delete"):
            assert part in said
        ensure_unused(run, overwrite=False)  # to its holder it is empty
        (run / "config.yaml").touch()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_lock_that_was_held_in_vain_leaves_no_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "outputs" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("holder", "untouched", "stays"),
    [
        (GONE, 0.0, False),
        (replace(LockOwner(), pid=2**22 + 1), 0.0, False),  # no Linux has one
        (replace(LockOwner(), boot="the one before"), 0.0, False),
        (replace(LockOwner(), started="1", namespace="a container's"), LEASE_S - 60, True),
        (replace(LockOwner(), started="1", namespace="a container's"), LEASE_S + 60, False),
        (ELSEWHERE, LEASE_S - 60, True),
        (ELSEWHERE, LEASE_S + 60, False),
        (LockOwner(), LEASE_S + 60, True),  # stopped by a debugger, say
    ],
    ids=["number used again", "dead", "rebooted", "container", "dead container", "host", "dead host", "asleep"],
)
def test_a_dead_holders_place_is_taken(holder: LockOwner, untouched: float, stays: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = leave(run, holder, untouched)
    if stays:
        assert f"process {holder.pid} on {holder.host}" in refused(run)
        assert json.loads(path.read_text()) == asdict(holder)
        return
    ensure_unused(run, overwrite=False)
    leave(run, holder, untouched).rename(run / f".{NAME}.left")  # as by one killed while it took another's place
    leave(run, holder, untouched)
    with locked(run):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert [each.name for each in run.iterdir()] == [NAME]
    assert list(run.iterdir()) == []


def test_what_is_no_lock_of_ours_is_left_alone_while_it_is_fresh(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("somebody's notes")
    assert "process 0 on unknown" in refused(tmp_path)
    assert (tmp_path / NAME).read_text() == "somebody's notes"
    assert not is_lock(tmp_path / NAME)
    assert not is_lock(tmp_path / "locksmith.txt")


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    with locked(tmp_path):
        os.utime(tmp_path / NAME, (1000, 1000))
        deadline = time.monotonic() + 120
        while (tmp_path / NAME).stat().st_mtime == 1000:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = module._start_time(process.pid)
    assert started is not None
    leave(tmp_path, replace(LockOwner(), pid=process.pid, started=started))
    assert f"process {process.pid} on" in refused(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays in the table
    with locked(tmp_path):
        pass
    process.communicate()


def _contend(folder: Path, barrier: object, results: object, answered: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        with locked(folder):
            results.put(os.getpid())  # type: ignore[attr-defined]
            answered.wait(300)  # type: ignore[attr-defined] # a late one would get it after this one
    except FileExistsError:
        results.put(None)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("left", [None, GONE, "chain"])
def test_of_many_at_once_one_gets_it(left: LockOwner | str | None, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        if left is not None:
            leave(folder, GONE)
        if left == "chain":  # somebody died when taking over from somebody who had died
            (folder / f".{NAME}.{GONE.token}").write_text(json.dumps(asdict(replace(GONE, token="z"))))
        barrier, results, answered = context.Barrier(6), context.Queue(), context.Event()
        processes = [context.Process(target=_contend, args=(folder, barrier, results, answered)) for _ in range(6)]
        for process in processes:
            process.start()
        got = [results.get(timeout=300) for _ in processes]
        answered.set()
        for process in processes:
            process.join()
        assert len([pid for pid in got if pid is not None]) == 1
        assert not folder.exists() or list(folder.iterdir()) == []


def test_a_forked_process_neither_holds_it_nor_gives_it_back(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        child = os.fork()
        if not child:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / NAME).exists()
        child = os.fork()
        if not child:
            try:
                with locked(tmp_path):
                    os._exit(1)
            except FileExistsError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_directory_that_moves_away_leaves_its_place_locked(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "run.old-1"
    with locked(run) as lock:
        run.rename(moved)
        lock.relock(moved)
        assert list(moved.iterdir()) == []
        refused(run)


@pytest.mark.parametrize("error", [28, 30], ids=os.strerror)
def test_a_disk_that_takes_no_lock_is_an_error_of_one_line(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, _text: str) -> None:
        path.touch()
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "write_text", failing)
    run = tmp_path / "outputs" / "run"
    with pytest.raises(OSError, match=f"output_dir={run} cannot be written to .{os.strerror(error)}.: make room"):
        pusht_act.run(tiny_command(f"output_dir={run}"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["same", "resume"])
def test_two_jobs_do_not_write_to_one_directory(mode: str, tmp_path: Path, commands: Commands) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    first = commands.start(tiny_command("steps=100000", f"output_dir={run}"), output)
    appears(output, "step 1/")
    second = {
        "same": tiny_command(f"output_dir={run}", "overwrite=true"),
        "resume": ["mode=resume", f"output_dir={run}"],
    }[mode]
    with pytest.raises(FileExistsError, match=f"is being written by process {first} on {socket.gethostname()}"):
        pusht_act.run(second)
    os.kill(first, 9)
    assert commands.wait(first) == -9
    assert (run / NAME).exists()
    pusht_act.run(tiny_command(f"output_dir={run}", "overwrite=true"))
    assert not (run / NAME).exists()
    assert (tmp_path / "run.old-1" / "train.log").exists()


def test_a_lock_is_given_back_when_the_job_is_over(tiny: Callable[..., Result]) -> None:
    run = tiny("steps=1").output_dir
    assert not any(path.name.endswith(NAME) for path in run.rglob("*"))
    pusht_act.run(["mode=resume", f"output_dir={run}", "steps=2"])


def test_what_a_slurm_job_was_before_it_was_queued_again_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ran: its node tells nothing of it to the one that the job runs on now."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for slurm in ({"job": 7, "restarts": 1}, {"job": 8, "restarts": 0}, None):
        leave(tmp_path, replace(ELSEWHERE, slurm=slurm))
        assert "on elsewhere" in refused(tmp_path)
    leave(tmp_path, replace(ELSEWHERE, slurm={"job": 7, "restarts": 0}))
    with locked(tmp_path):
        pass


def test_a_lock_of_before_slurm_was_noted_is_read(tmp_path: Path) -> None:
    path = leave(tmp_path, ELSEWHERE)
    content = json.loads(path.read_text())
    del content["slurm"]
    path.write_text(json.dumps(content))
    assert "on elsewhere" in refused(tmp_path)
