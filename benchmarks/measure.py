"""What the benchmarks share: programs under a clock, their memory, the record of a machine, a table.

Two sides of a comparison run in turn, A B A B ..., each as a fresh process on an otherwise idle machine; what is told
is the median, and for a ratio the ratio of the medians beside the lowest and highest of the single turns.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pusht_act.runs.provenance import git_commit, package_versions
from pusht_act.runtime.markdown import format_table
from pusht_act.runtime.system import cores

HERE = Path(__file__).parent
MB = 1 << 20
PF_FORKNOEXEC = 0x40
"""Flag in /proc/PID/stat, from Linux's sched.h: the process was forked and has not executed a program."""


@dataclass(frozen=True)
class Memory:
    """Of a process and all below it, in MB."""

    peak_rss: float
    """The sum of each one's highest resident size: what two of them share counts twice."""
    rss: float
    """The sum of their resident sizes now."""
    pss: float
    """The same with a page that n processes share counted as 1/n in each."""


@dataclass
class Clocked:
    """A program running under clocked.py."""

    program: str
    arguments: list[str]
    folder: Path
    """Where its report and its output go; made if need be."""
    steps: int = 0
    """How many optimizer steps are noted; the program then waits until its memory was read."""
    every: int = 1
    """Steps between two notes; more than one where a note has to wait for the device."""
    threads: int | None = None
    """OMP_NUM_THREADS; None: as the environment says."""
    options: dict[str, Any] = field(default_factory=dict)
    """More of clocked.py's: cpus, episodes, timed, videos."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._report = self.folder / "report.json"
        self._output = self.folder / "output.txt"
        options = {"report": str(self._report), "steps": self.steps, "every": self.every, **self.options}
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        command = [sys.executable, str(HERE / "clocked.py"), json.dumps(options), self.program, *self.arguments]
        with self._output.open("w") as output:
            self.launched = time.monotonic()
            self._process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    @property
    def output(self) -> str:
        """What it printed."""
        return self._output.read_text()

    def wait(self) -> dict[str, Any]:
        """Its report, as soon as it is there.

        Raises:
            SystemExit: the program failed; what it printed is shown.
        """
        while not self._report.exists():
            if self._process.poll() is not None and not self._report.exists():
                self._fail()
            time.sleep(0.02)
        report: dict[str, Any] = json.loads(self._report.read_text())
        return report

    def memory(self) -> Memory:
        """While it waits at its last step."""
        return tree_memory(self._process.pid)

    def finish(self) -> float:
        """Let it come to its end; returns the seconds that it lived."""
        self._report.with_suffix(".go").touch()
        if self._process.wait():
            self._fail()
        return time.monotonic() - self.launched

    def _fail(self) -> None:
        sys.exit(f"{self.program} {shlex.join(self.arguments)[:2000]}\n{self.output[-3000:]}")


@dataclass(frozen=True)
class TimedRun:
    """What one run under the clock came to."""

    step_s: list[float]
    first_step_s: float
    memory: Memory
    cuda_mb: float
    output: str

    @property
    def median_s(self) -> float:
        """Of a step."""
        return median(self.step_s)


def turn(clocked: Clocked, warm_up: int) -> TimedRun:
    """Wait for `clocked`, read its memory, let it end; its first `warm_up` steps are left out of the step times."""
    report = clocked.wait()
    memory = clocked.memory()
    clocked.finish()
    return turn_of(clocked, report, memory, warm_up)


def turn_of(clocked: Clocked, report: dict[str, Any], memory: Memory, warm_up: int) -> TimedRun:
    """The turn that `report` and `memory` tell of."""
    ends = report["ends"]
    if not ends:
        sys.exit(f"{clocked.program} made no step\n{clocked.output[-3000:]}")
    kept = ends[warm_up // report["every"] :]
    steps = [(b - a) / report["every"] for a, b in pairwise(kept)]
    return TimedRun(steps, ends[0] - clocked.launched, memory, report["cuda_bytes"] / MB, clocked.output)


def tree_memory(root: int) -> Memory:
    """Of process `root` and all below it; one that ends meanwhile is left out."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    peak = rss = pss = 0.0
    for pid in tree:
        try:
            status = _kilobytes(Path(f"/proc/{pid}/status"))
            shared = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
        except OSError:
            continue
        peak, rss, pss = peak + status.get("VmHWM", 0), rss + status.get("VmRSS", 0), pss + shared.get("Pss", 0)
    return Memory(peak / 1024, rss / 1024, pss / 1024)


class PeakMemory:
    """Within this, watch the anonymous memory (RssAnon) of this process and of all below it.

    That is what the kernel cannot drop: without the pages of files that are mapped, and counted once.
    """

    process_mb = 0.0
    """Highest of this process."""
    workers_mb = 0.0
    """Highest of the others together."""

    def __enter__(self) -> "PeakMemory":
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        # Often enough to see an array that lives for a tenth of a second.
        while not self._ended.wait(0.02):
            self._look()

    def _look(self) -> None:
        own, *others = (_anonymous_mb(pid) for pid in _tree(os.getpid()))
        self.process_mb, self.workers_mb = max(self.process_mb, own), max(self.workers_mb, sum(others))


def _tree(pid: int) -> list[int]:
    """Return `pid` and all processes below it."""
    # A process is listed as the child of the thread that started it.
    lists = [line for path in Path(f"/proc/{pid}/task").glob("*/children") for line in _lines(str(path))]
    return [pid, *(below for line in lists for child in line.split() for below in _tree(int(child)))]


def _anonymous_mb(pid: int) -> float:
    try:
        # A process that is just being started borrows its parent's memory until it executes a program of its own.
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        if flags & PF_FORKNOEXEC and pid != os.getpid():
            return 0.0
        return _kilobytes(Path(f"/proc/{pid}/status")).get("RssAnon", 0) / 1024
    except OSError:
        return 0.0


def _kilobytes(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def pusht_act(*overrides: str, threads: int | None = None) -> str:
    """What our command prints on standard output, with so many threads if that is said."""
    command = [sys.executable, "-m", "pusht_act", *overrides]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads is not None else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)[:2000]}\n{done.stderr[-3000:]}")
    return done.stdout


def stock_arguments(*overrides: str) -> list[str]:
    """The flags of stock's own command for the job that `overrides` describe."""
    return shlex.split(pusht_act(*overrides, "print_lerobot_command=true").replace("\\\n", " "))[1:]


def data_overrides(root: Path) -> list[str]:
    """The overrides that name the LeRobotDataset at `root` and the environment that observes the same."""
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    group = "pusht_keypoints" if "observation.environment_state" in features else "pusht"
    return [f"env={group}", f"dataset={group}", f"dataset.root={root.resolve()}"]


def on_cuda() -> bool:
    """Whether the programs will run on a GPU, found without importing torch here."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True)
    return found.stdout.strip() == "True"


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kb = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    except OSError:
        gpus = []
    return {
        "cpu": model,
        "cores": cores(),
        "memory_gb": round(memory_kb / MB, 1),
        "gpus": [name for name in gpus if name],
        "load_before": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def record(args: Any) -> dict[str, Any]:
    """The head of a benchmark's JSON: what was run, on what, when. Call it first: it tells the load before."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": package_versions(),
        "machine": machine(),
        "options": {key: str(value) for key, value in vars(args).items()},
    }


def told(found: dict[str, Any], rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Print the head and the rows as a Markdown table; write both to `output`."""
    where = found["machine"]
    print(
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GiB, GPU {', '.join(where['gpus']) or 'none'}; "
        f"load before {where['load_before']:.1f}; {found['date']}; commit {str(found['commit'])[:18]}; "
        f"torch {found['versions']['torch']}, lerobot {found['versions']['lerobot']}\n"
    )
    print(table(rows))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found | {"rows": list(rows)}, indent=2) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; a column is a key of some row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    words = {key for row in rows for key, value in row.items() if isinstance(value, str)}
    return "\n".join(format_table(columns, ([_cell(row.get(key, "")) for key in columns] for row in rows), text=words))


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(ratios: Sequence[float]) -> str:
    """The lowest and highest of single turns."""
    return f"{min(ratios):.2f} to {max(ratios):.2f}"
