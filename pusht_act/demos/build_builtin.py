"""Write `embedded.npz` anew: `python -m pusht_act.demos.build_builtin [--count 2000] [--workers 2]`."""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from pusht_act.demos import builtin as embedded
from pusht_act.demos.expert import Demonstration, demonstrate_many
from pusht_act.envs.pusht import make_env, reset_to
from pusht_act.runtime.system import cores

FIRST_SEED = 1_000_000  # far from the seeds of evaluation (100,000 and 200,000 up) and of the human data (0 to 205)


def succeeds(made: Demonstration) -> bool:
    """Whether the actions alone, carried out from the start by gym-pusht's own `step`, end in success."""
    env = make_env()
    reset_to(env, made.start)
    success = False
    for action in made.action:
        success = bool(env.step(action)[4]["is_success"])
    return success


def make(count: int, workers: int) -> list[Demonstration]:
    """The first `count` successes from `FIRST_SEED` on; each is replayed before it counts."""
    kept: list[Demonstration] = []
    seed = FIRST_SEED
    while len(kept) < count:
        seeds = list(range(seed, seed + min(200, count - len(kept))))
        seed = seeds[-1] + 1
        for made in demonstrate_many(seeds, workers=workers):
            if made.success and succeeds(made):
                kept.append(made)
            else:
                print(f"seed {made.start}: coverage {made.coverage:.3f}, left out", file=sys.stderr)
        print(f"{len(kept)} of {count}", file=sys.stderr)
    return kept


def write(demonstrations: list[Demonstration]) -> str:
    """Write the file and its hash into `embedded.py`; returns the hash."""
    seed = np.array([made.start for made in demonstrations], np.int64)
    length = np.array([len(made.action) for made in demonstrations], np.int64)
    action = np.concatenate([made.action for made in demonstrations])
    covered = np.array([made.coverage for made in demonstrations], np.float64)
    np.savez_compressed(embedded.PATH, seed=seed, length=length, action=action, coverage=covered)
    digest = embedded.content_hash(seed, length, action)
    source = Path(embedded.__file__)
    source.write_text(re.sub(r'^SHA256 = ".*"$', f'SHA256 = "{digest}"', source.read_text(), flags=re.MULTILINE))
    return digest


def main() -> None:
    """Parse the command line, make the demonstrations, write them."""
    parser = argparse.ArgumentParser(description="Write the embedded demonstrations anew.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=cores())
    arguments = parser.parse_args()
    digest = write(make(arguments.count, arguments.workers))
    print(f"{embedded.PATH}: {embedded.PATH.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
