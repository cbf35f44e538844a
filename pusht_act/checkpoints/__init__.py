"""Checkpoints on disk: save, verify, find, keep, load safely, resume from, share on the Hub.

    checkpoint      the paths of one checkpoint; find one by path, as `last`, or as the latest valid one
    state           what a checkpoint tells beside LeRobot's files, as typed records
    tensor_file     whether a safetensors file is whole and its numbers are finite
    manifest        sizes and hashes of its files, and what they say about damage
    checkpoint_io   save and load, in LeRobot's layout: the only module here that imports torch and lerobot
    retention       which checkpoints of a run stay, and how the others are removed
    safe_loading    refuse a model folder that asks for more than numbers to be loaded
    processor_files the same for the processors: their steps, and the statistics that they need
    merge_config    the configuration of a job that starts from a checkpoint
    resume          from which checkpoint mode=resume and resume.auto=true start
    hub             download a model to evaluate, upload one that was trained

A checkpoint is complete or not there at all: it is written under a hidden name, synced and renamed, and only then do
the links `last` and `best` change. A process killed at any moment leaves complete checkpoints only. When to save, and
which evaluation is the best, is decided by `training`. Nothing here updates weights or knows an environment.
"""
