"""Render gym-pusht: the same bytes as its own rendering, in less time."""

from typing import Any

import cv2
import gym_pusht  # noqa: F401  (registers the environment)
import numpy as np
from jaxtyping import UInt8

from pusht_act.envs.gym_pusht_internals import draw_screen, last_action

# Our images are small: a second thread of OpenCV doubles the processor time and gains no wall time. The environments
# already share out the cores among their processes.
cv2.setNumThreads(1)


def render_observation(env: Any) -> UInt8[np.ndarray, "96 96 3"]:
    """Render the image that a policy observes, as PushTEnv._get_img does.

    gym-pusht copies its screen pixel by pixel and takes three times as long.
    """
    return _render(env, env.observation_width, env.observation_height)


def render_frame(env: Any) -> UInt8[np.ndarray, "H W 3"]:
    """Render a frame for people, as PushTEnv.render does, in half the time; a cross marks the last action."""
    width, height = env.visualization_width, env.visualization_height
    pixels = _render(env, width, height)
    action = last_action(env)
    if action is not None:
        # [height, width] in this order is gym-pusht's own; it shows only where the frame is not square.
        at, size = (np.array(action) / 512 * [height, width]).astype(np.int32), min(width, height)
        cross = {"markerType": cv2.MARKER_CROSS, "markerSize": int(8 / 96 * size), "thickness": int(size / 96)}
        cv2.drawMarker(pixels, at, color=(255, 0, 0), **cross)
    return pixels


def _render(env: Any, width: int, height: int) -> UInt8[np.ndarray, "H W 3"]:
    screen = draw_screen(env)
    pixels = np.frombuffer(screen.get_buffer(), np.uint8).reshape(screen.get_height(), -1, screen.get_bytesize())

    # Resize all four channels in the screen's own memory, then pick three in order: this gives gym-pusht's bytes
    # without its copy of the whole screen.
    resized = cv2.resize(pixels, (width, height))
    rgb = np.empty((height, width, 3), np.uint8)
    red, green, blue = (shift // 8 for shift in screen.get_shifts()[:3])
    cv2.mixChannels([resized], [rgb], [red, 0, green, 1, blue, 2])
    return rgb
