"""Private names of gym-pusht 0.1.8, all of them, behind functions with a name of their own.

gym-pusht offers no public access to its screen, to the block's shapes or to the controller of its agent. Port this
module first when gym-pusht changes; no other module of the package touches these names.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from pusht_act.runtime.versions import require_version

require_version("gym-pusht", "0.1.8", __name__)


# A NamedTuple, so that it can be unpacked into the arguments of a numba kernel.
class Controller(NamedTuple):
    """The PD controller that moves the agent towards its target."""

    substeps: int
    """Physics steps in one step of the environment."""
    dt: float
    """Length of a physics step, s."""
    k_p: float
    k_v: float


def controller(env: Any) -> Controller:
    """Return the controller of a PushTEnv."""
    # gym-pusht computes the number of substeps like this, with the rounding of its own floats.
    return Controller(int(1 / (env.dt * env.control_hz)), env.dt, env.k_p, env.k_v)


def draw_screen(env: Any) -> Any:
    """Draw a PushTEnv that has been reset and return its pygame surface."""
    return env._draw()


def block_corners(env: Any) -> Float64[np.ndarray, "8 2"]:
    """Return the corners of the block's two rectangles in the block's own frame (px); the env must have been reset."""
    return np.array([vertex for shape in env._block_shapes for vertex in shape.get_vertices()])


def last_action(env: Any) -> Any:
    """Return the action that `render` marks by a cross, or None."""
    return env._last_action


def set_last_action(env: Any, action: np.ndarray | None) -> None:
    """Set the action that `render` marks by a cross; None for no cross."""
    # gym-pusht sets it in its own `step`, which we do not call.
    env._last_action = action
