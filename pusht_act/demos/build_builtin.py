"""Build `builtin.npz` again: `python -m pusht_act.demos.build_builtin [--count 2000] [--workers 2]`."""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from pusht_act.demos import builtin
from pusht_act.demos.expert import Demonstration, demonstrate_many
from pusht_act.envs.pusht import make_env, reset_to
from pusht_act.runtime.system import cores

# Far from the seeds of evaluations (100,000 and 200,000 up) and of the human data (0 to 205).
FIRST_SEED = 1_000_000


def succeeds(demo: Demonstration) -> bool:
    """Return whether the actions alone, executed by gym-pusht's own `step`, end in success."""
    env = make_env()
    reset_to(env, demo.start)
    success = False
    for action in demo.action:
        # The outcome of the last action counts: an episode may pass 0.95 and lose it again.
        success = bool(env.step(action)[4]["is_success"])
    return success


def collect_successes(count: int, workers: int) -> list[Demonstration]:
    """Return the first `count` successes from `FIRST_SEED` on, each confirmed by a replay."""
    successes: list[Demonstration] = []
    seed = FIRST_SEED
    while len(successes) < count:
        # Never more than are missing, so that none is planned in vain; in portions, to report progress.
        seeds = list(range(seed, seed + min(200, count - len(successes))))
        seed = seeds[-1] + 1
        for demo in demonstrate_many(seeds, workers=workers):
            if demo.success and succeeds(demo):
                successes.append(demo)
            else:
                print(f"seed {demo.start}: coverage {demo.coverage:.3f}, left out", file=sys.stderr)
        print(f"{len(successes)} of {count}", file=sys.stderr)
    return successes


def write_builtin(demos: list[Demonstration]) -> str:
    """Write `builtin.npz`, put its hash into `builtin.py`, and return the hash."""
    seed = np.array([demo.start for demo in demos], np.int64)
    length = np.array([len(demo.action) for demo in demos], np.int64)
    action = np.concatenate([demo.action for demo in demos])
    covered = np.array([demo.coverage for demo in demos], np.float64)
    np.savez_compressed(builtin.PATH, seed=seed, length=length, action=action, coverage=covered)
    digest = builtin.content_hash(seed, length, action)
    source = Path(builtin.__file__)
    source.write_text(re.sub(r'^SHA256 = ".*"$', f'SHA256 = "{digest}"', source.read_text(), flags=re.MULTILINE))
    return digest


def main() -> None:
    """Parse the command line, collect the demonstrations, write them."""
    parser = argparse.ArgumentParser(description="Build the built-in demonstrations again.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=cores())
    arguments = parser.parse_args()
    digest = write_builtin(collect_successes(arguments.count, arguments.workers))
    print(f"{builtin.PATH}: {builtin.PATH.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
