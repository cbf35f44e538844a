"""Memory and time that it takes to make a data set's frames and to open them again, without the pages of the map.

    python benchmarks/memory.py --data ../shared/data/pusht

What counts is anonymous memory (RssAnon), which the kernel cannot drop, at its highest: that of the process with its
imports, and that of its worker processes together. Each case is a fresh process with an empty cache below `--folder`,
which is deleted after it; with 2,000 demonstrations the largest takes 9 GB. Prints a table and writes it as JSON.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import PeakMemory, record, told


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is opened: a LeRobotDataset on disk, and the built-in demonstrations in all ways."""
    human = [] if args.data is None else [{"root": str(args.data.resolve())}]
    return human + [
        {"count": args.episodes, "image": image, "mirror": mirror}
        for image in (False, True)
        for mirror in (False, True)
    ]


def name(case: dict[str, Any]) -> str:
    if "root" in case:
        return Path(case["root"]).name
    observed = "images" if case["image"] else "keypoints"
    return f"{case['count']:,} demonstrations, {observed}{', mirror images' if case['mirror'] else ''}"


def cpu_seconds() -> float:
    """Return the processor time of this process and of its workers, once they have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def open_case(case: dict[str, Any]) -> None:
    """Open the data set of `case` in this process and print what that took."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.envs.configs import PushtEnv

    # Before the clock starts: a job imports them in any case.
    from pusht_act.data.builtin_demos import open_builtin_demos
    from pusht_act.data.lerobot_reader import open_lerobot_dataset
    from pusht_act.data.mirror import statistics_with_mirror_images

    with PeakMemory() as before:
        pass
    start, cpu_start = time.monotonic(), cpu_seconds()
    with PeakMemory() as memory:
        if "root" in case:
            frames = open_lerobot_dataset(DatasetConfig("local/data", root=case["root"], video_backend="pyav"))
        else:
            env = PushtEnv(obs_type="pixels_agent_pos" if case["image"] else "environment_state_agent_pos")
            frames = open_builtin_demos(case["count"], env)
        if case.get("mirror"):
            statistics_with_mirror_images(frames)
    found = {
        "seconds": time.monotonic() - start,
        "cpu_seconds": cpu_seconds() - cpu_start,
        "frames": len(frames),
        "bytes": sum(array.nbytes for array in frames.arrays.values()),
        "imports_mb": before.process_mb,
        "process_mb": memory.process_mb,
        "workers_mb": memory.workers_mb,
    }
    print(json.dumps(found))


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the row of `case`, whose frames are made and then opened again."""
    environment = os.environ | {"PUSHT_ACT_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    made, again = (
        json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
        for _ in range(2)
    )
    return {
        "data set": name(case),
        "frames": f"{made['frames']:,}",
        "on disk, MB": made["bytes"] / 1e6,
        "made, s": made["seconds"],
        "made, CPU-seconds": made["cpu_seconds"],
        "imports, MB": made["imports_mb"],
        "process, MB": made["process_mb"],
        "workers, MB": made["workers_mb"],
        "opened again, s": again["seconds"],
        "process then, MB": again["process_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a LeRobotDataset v3.0 on disk, as a further case")
    parser.add_argument("--episodes", type=int, default=2000, help="built-in demonstrations")
    parser.add_argument("--folder", type=Path, help="where the caches go; else the folder for temporary files")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/memory.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        open_case(args.case)
        return
    found = record(args)
    rows = []
    for case in cases(args):
        folder = Path(tempfile.mkdtemp(prefix="memory-", dir=args.folder))
        try:
            rows.append(measure(case, folder))
        finally:
            shutil.rmtree(folder)
    told(found, rows, args.output)


if __name__ == "__main__":
    main()
