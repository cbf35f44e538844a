"""What a caller of `pusht_act.run` may put in place of ours: the loss of the actions, and training transforms.

Imports neither torch nor lerobot.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pusht_act.checkpoints.checkpoint import Checkpoint
from pusht_act.runs.commands import follow_up, record_command
from pusht_act.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ActionLoss = Callable[["Tensor", "Tensor"], "Tensor"]
"""(predicted, target), both [B, T, A] and normalized -> the error of each element, [B, T, A].

The framework leaves padding out and takes the mean over the whole batch of all ranks."""
Transform = Callable[[dict[str, "Tensor"]], dict[str, "Tensor"]]
"""A training batch, before it is normalized -> the batch to train on; shapes as in data/loader.py.

It runs on the batch's device and draws random numbers from PyTorch's global generator, which a checkpoint holds."""
INSTEAD = "give functools.partial of a function at module level, or an object whose class has a __repr__"


@dataclass(frozen=True)
class Extensions:
    """A loss and transforms that replace the defaults; a run resumes only with those it was trained with.

    Raises:
        UserError: one of them cannot be called, or has no name by which a resume could tell it from another.
    """

    loss: ActionLoss | None = None
    """None: ACT's L1."""
    transforms: Sequence[Transform] = ()
    """Applied one after the other, to training batches only."""

    def __post_init__(self) -> None:
        if self.loss is not None and not callable(self.loss):
            raise UserError(f"loss={_line(self.loss)} cannot be called: give a function (predicted, target) -> error")
        if not isinstance(self.transforms, list | tuple):
            raise UserError(
                f"transforms={_line(self.transforms)} is no list: give one, such as transforms=[shift_image]"
            )
        for transform in self.transforms:
            if not callable(transform):
                raise UserError(f"transforms: {_line(transform)} cannot be called: give functions batch -> batch")
        self.metadata()

    def metadata(self) -> dict[str, Any]:
        """Return the names that a checkpoint keeps; nothing for the defaults."""
        loss = {} if self.loss is None else {"loss": name_of(self.loss)}
        transforms = {"transforms": [name_of(each) for each in self.transforms]} if self.transforms else {}
        return loss | transforms

    def __str__(self) -> str:
        """Name what is replaced, such as "loss=train.huber, transforms=train.flip"; empty for the defaults."""
        return ", ".join(f"{key}={_shown(names)}" for key, names in self.metadata().items())

    def command(self, overrides: list[str]) -> str:
        """Return what runs `overrides` with the same functions, to be kept: a line for a shell, or one of Python."""
        return record_command(overrides, self.metadata())

    def follow_up(self, overrides: list[str]) -> str:
        """Return the same, to be printed: started as the present command was."""
        return follow_up(overrides, self.metadata())

    def check_same(self, checkpoint: Checkpoint) -> None:
        """Refuse to resume `checkpoint` with other functions than it was trained with.

        Only names are compared. No function is ever imported by a name that a file gives.

        Raises:
            UserError: naming both.
        """
        # A file of stock LeRobot's or an older version of ours knows of no such functions: the defaults.
        record = checkpoint.record
        saved = {} if record is None else {"loss": record.loss, "transforms": record.transforms}
        now = self.metadata()
        for key in ("loss", "transforms"):
            if saved.get(key) != now.get(key):
                raise UserError(
                    f"{checkpoint.directory} was trained with {key}={_shown(saved.get(key))}, now {key}="
                    f"{_shown(now.get(key))}: resume it from Python by pusht_act.run(..., {key}=) with the same"
                )


def name_of(function: Any) -> str:
    """Return where `function` is defined, and the settings that it holds.

    Raises:
        UserError: the settings cannot be seen, so that no resume could tell it from another.
    """
    if isinstance(function, functools.partial):
        settings = [*function.args, *function.keywords.values()]
        keys = [""] * len(function.args) + [f"{key}=" for key in function.keywords]
        given = [f"{key}{_setting(value, function)}" for key, value in zip(keys, settings, strict=True)]
        return f"functools.partial({', '.join([name_of(function.func), *given])})"
    # A bound method has its settings in its object.
    if inspect.ismethod(function):
        return f"{name_of(function.__self__)}.{function.__name__}"
    if not hasattr(function, "__qualname__"):
        return _name_of_object(function)
    name = f"{function.__module__}.{function.__qualname__}"
    if "<lambda>" in name:
        raise UserError(f"{function}: a lambda has no name to be recognized by on resume, write it as a function")
    if "<locals>" not in name or inspect.isclass(function):
        return name
    # The function around this one can make another of the same name.
    if function.__closure__:
        raise UserError(f"{name} takes values from the function around it, which no resume could compare: {INSTEAD}")
    parameters = inspect.signature(function).parameters.values()
    defaults = [f"{p.name}={_setting(p.default, function)}" for p in parameters if p.default is not p.empty]
    return f"{name}({', '.join(defaults)})" if defaults else name


def _name_of_object(function: Any) -> str:
    """Return the class and settings of an object that is called, such as a torch.nn.Module, by its repr."""
    module, text = type(function).__module__, _line(function)
    if re.search(r" at 0x[0-9a-fA-F]+", text):
        raise UserError(
            f"{text} has another name in each process, so no resume could recognize it: give {type(function).__name__} "
            "a __repr__ that shows its settings, or use a function"
        )
    # The losses of torch.nn show none of their settings, such as HuberLoss's delta.
    if module.startswith("torch.nn.") and text.endswith("()"):
        settings = {k: v for k, v in vars(function).items() if _is_plain(v) and not k.startswith("_")}
        settings.pop("training", None)
        text = f"{text[:-2]}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
    return f"{module}.{text}"


def _setting(value: Any, function: Any) -> str:
    """Return a setting of `function` as text that is the same in every process."""
    if _is_plain(value):
        return repr(value)
    if callable(value):
        return name_of(value)
    raise UserError(
        f"{_line(function)}: {_line(value)} cannot be compared on resume: give numbers, texts or lists of them, "
        "or use an object whose class has a __repr__"
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return value is None or isinstance(value, int | float | str)


def _line(value: Any) -> str:
    return " ".join(repr(value).split())


def _shown(names: str | list[str] | None) -> str:
    return "the default" if names is None else ", ".join([names] if isinstance(names, str) else names)
