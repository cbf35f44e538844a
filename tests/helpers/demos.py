"""Running mode=demos, and reading what it wrote."""

import json
from pathlib import Path
from typing import Any

import pusht_act
from pusht_act.job import Result


def make(output_dir: Path, *overrides: str, env: str = "pusht_keypoints", count: int = 2, workers: int = 1) -> Result:
    """One job of mode=demos, in this process unless there are more workers."""
    return pusht_act.run(command(output_dir, *overrides, env=env, count=count, workers=workers))


def command(output_dir: Path, *overrides: str, env: str, count: int, workers: int) -> list[str]:
    numbers = [f"demos.n_episodes={count}", f"demos.workers={workers}"]
    return ["mode=demos", f"env={env}", *numbers, f"output_dir={output_dir}", *overrides]


def info(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "meta" / "info.json").read_text())
    return content
