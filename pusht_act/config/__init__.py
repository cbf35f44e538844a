"""The configuration: its schema, what is refused and why, and the bridge to LeRobot's own classes.

Only `lerobot` and `lerobot_imports` import torch or lerobot: a command that is refused answers at once.
"""
