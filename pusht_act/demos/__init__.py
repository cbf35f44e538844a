"""Scripted demonstrations: the expert that solves PushT, its data sets and those embedded in the package."""
