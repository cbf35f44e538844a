"""Checkpoints on disk: save, verify, find, keep, load safely, resume from, push to the Hub."""
