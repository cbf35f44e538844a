"""Scripted demonstrations: the expert that solves PushT, its data sets, and the built-in demonstrations."""
