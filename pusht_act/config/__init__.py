"""The configuration: its schema, what is refused and why, and the bridge to LeRobot's own classes.

Only `lerobot` imports torch or lerobot: a command that is refused answers at once.
"""
