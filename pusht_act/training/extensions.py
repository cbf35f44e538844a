"""What a caller of `pusht_act.run` may put in place of ours: the loss of the actions, and training transforms.

Imports neither torch nor lerobot.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.config.schema import METADATA_FILE
from pusht_act.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ActionLoss = Callable[["Tensor", "Tensor"], "Tensor"]
"""(predicted, target), both [B, T, A] and normalized -> the error of each element, [B, T, A].

The framework leaves padding out and takes the mean over the whole batch of all ranks."""
Transform = Callable[[dict[str, "Tensor"]], dict[str, "Tensor"]]
"""A training batch, before it is normalized -> the batch to train on; shapes as in data/loader.py.

It runs on the batch's device and draws random numbers from PyTorch's global generator, which a checkpoint holds."""


@dataclass(frozen=True)
class Extensions:
    """A loss and transforms that replace the defaults; a run resumes only with those it was trained with."""

    loss: ActionLoss | None = None
    """None: ACT's L1."""
    transforms: Sequence[Transform] = ()
    """Applied one after the other, to training batches only."""

    def metadata(self) -> dict[str, Any]:
        """Return the names that a checkpoint keeps; nothing for the defaults.

        Raises:
            UserError: a function without a name of its own, so that no resume could tell it from another.
        """
        loss = {} if self.loss is None else {"loss": _name(self.loss)}
        transforms = {"transforms": [_name(each) for each in self.transforms]} if self.transforms else {}
        return loss | transforms

    def check_same(self, checkpoint: Checkpoint) -> None:
        """Refuse to resume `checkpoint` with other functions than it was trained with.

        Only names are compared. No function is ever imported by a name that a file gives.

        Raises:
            UserError: naming both.
        """
        # A file of stock LeRobot's or an older version of ours knows of no such functions: the defaults.
        try:
            saved = json.loads((checkpoint.model_dir / METADATA_FILE).read_text())
        except FileNotFoundError:
            saved = {}
        now = self.metadata()
        for key in ("loss", "transforms"):
            if saved.get(key) != now.get(key):
                raise UserError(
                    f"{checkpoint.directory} was trained with {key}={_shown(saved.get(key))}, now {key}="
                    f"{_shown(now.get(key))}: resume it from Python by pusht_act.run(..., {key}=) with the same"
                )


def _name(function: Callable[..., Any]) -> str:
    """Return where `function` is defined, or the class and settings of an object that is called."""
    # An object that is called, such as a torch.nn.Module, has its settings in its repr.
    if not hasattr(function, "__qualname__"):
        return f"{type(function).__module__}.{' '.join(repr(function).split())}"
    if "<lambda>" in function.__qualname__:
        raise UserError(f"{function}: a lambda has no name to be recognized by on resume, write it as a function")
    return f"{function.__module__}.{function.__qualname__}"


def _shown(names: str | list[str] | None) -> str:
    return "the default" if names is None else ", ".join([names] if isinstance(names, str) else names)
