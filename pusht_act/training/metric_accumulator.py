"""Sums of a step's metrics, kept on the device until a line of them is logged."""

from typing import Any

import torch
from torch import Tensor


class MetricAccumulator:
    """Means of a step's metrics since the last line; the sums stay on the device until somebody reads them."""

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self._sums: dict[str, Any] = dict(sums or {})
        self._known_skipped = self._sums.get("skipped", 0.0)

    def add(self, values: dict[str, Tensor | float], skipped: Tensor) -> None:
        """One step's values; they do not count where `skipped` is 1.0."""
        # No value is read here: reading one waits for the device.
        for key, value in {**values, "steps": 1.0}.items():
            self._sums[key] = self._sums.get(key, 0.0) + torch.where(skipped.bool(), 0.0, value)
        self._sums["skipped"] = self._sums.get("skipped", 0.0) + skipped

    def sums(self) -> dict[str, float]:
        """Python numbers, to be saved and given back to `MetricAccumulator`."""
        return {key: float(value) for key, value in self._sums.items()}

    def means(self) -> dict[str, float]:
        """The mean of each, and the number of steps skipped if there were any; empty before the first step."""
        sums = self.sums()
        steps, skipped = sums.pop("steps", 0.0), sums.pop("skipped", 0.0)
        means = {key: value / steps for key, value in sums.items()} if steps else {}
        return {**means, "skipped": skipped} if skipped else means

    def newly_skipped(self) -> int:
        """The number of steps skipped since this was asked last; waits for the device."""
        before, self._known_skipped = self._known_skipped, float(self._sums.get("skipped", 0.0))
        return int(self._known_skipped - before)
