"""ImageNet's weights for the image backbone, where they can be had."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torchvision

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a server may be silent before its weights count as out of reach."""


def available_weights(backbone: str) -> str | None:
    """Return LeRobot's name of ImageNet's weights of `backbone` if they are cached or can be fetched, else None.

    They are fetched once, to PyTorch's cache (`TORCH_HOME`).
    """
    weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    try:
        # Without a limit, a network that drops packets would be waited for without end.
        with _socket_timeout(PATIENCE_S):
            weights.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:
        log.warning(
            "ImageNet's weights of %s cannot be fetched (%s): the backbone starts from random weights, with batch norm",
            backbone, " ".join(str(error).split())[:100],
        )  # fmt: skip
        return None
    return str(weights)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(former)
