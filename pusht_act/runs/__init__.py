"""A run on disk: its paths, its provenance and its loggers."""
