"""Comparisons with stock LeRobot, and tests too long for the suite: `python benchmarks/NAME.py --help`."""
