"""Show how far training has come: a bar on a terminal, and a line at each log step everywhere."""

import logging
import math
import time
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pusht_act.config.schema import Config
from pusht_act.runtime.distributed import is_main

log = logging.getLogger(__name__)


class ProgressBar:
    """A context manager that shows the steps of one training."""

    def __init__(self, config: Config, start: int) -> None:
        self._steps = config.steps
        self._bar: tqdm[Any] = tqdm(
            total=config.steps,
            initial=start,
            desc=config.job_name,
            unit="step",
            disable=None if is_main() else True,  # None: only where there is a terminal
        )
        self._redirect = logging_redirect_tqdm()
        self._count, self._seconds = 0, 0.0

    def update(self, seconds: float) -> None:
        """Count one more step, which took `seconds`; evaluations and saves are not steps."""
        # Only the steps themselves count, so that the rate says how fast training is.
        self._bar.update()
        self._count += 1
        self._seconds += seconds

    @property
    def rate(self) -> float:
        """Steps a second since the last report."""
        return self._count / max(self._seconds, 1e-9)

    def report(self, step: int, means: dict[str, float]) -> None:
        """Log the means, the rate and the time left as a line; show the loss beside the bar."""
        left = time.strftime("%H:%M:%S", time.gmtime((self._steps - step) / max(self.rate, 1e-9)))
        # Every step since the last line may have been skipped, and then there is no mean.
        seen = {"loss": math.nan, "grad_norm": math.nan, "dataloading_s": 0.0, **means}
        log.info(
            "step %d/%d: loss %.4f, gradient norm %.2f, lr %.1e, %.1f steps/s (data %.0f %%), %s left%s",
            step, self._steps, seen["loss"], seen["grad_norm"], seen["lr"], self.rate,
            100 * seen["dataloading_s"] * self.rate, left,
            f"; {seen['skipped']:.0f} skipped, their loss or gradient was not finite" if "skipped" in seen else "",
        )  # fmt: skip
        self._bar.set_postfix(loss=f"{seen['loss']:.4f}")
        self._count, self._seconds = 0, 0.0

    def __enter__(self) -> "ProgressBar":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)
