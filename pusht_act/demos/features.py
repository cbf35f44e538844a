"""Features and task of lerobot/pusht and lerobot/pusht_keypoints, which our data sets share."""

from typing import Any

TASK = "Push the T-shaped block onto the T-shaped target."
# LeRobot stores these in meta/info.json; a policy trained on one data set can read another only if they agree.
FEATURES: dict[str, dict[str, Any]] = {
    "observation.image": {"dtype": "image", "shape": [96, 96, 3], "names": ["height", "width", "channel"]},
    "observation.environment_state": {"dtype": "float32", "shape": [16], "names": None},
    "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["motor_0", "motor_1"]}},
    "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["motor_0", "motor_1"]}},
}
"""Images here come straight from the renderer; the data sets on the Hub store them as video."""
