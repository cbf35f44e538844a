"""A run on disk: its paths, its provenance and its loggers.

    run_dir        where everything of a run lies, and whether a new run may use a directory
    commands       what is printed to be pasted, and recorded to be run again
    provenance     what made the run: config.yaml, runs.jsonl (command, commit, versions, host), train.log
    loggers        metrics.jsonl, and all loggers as one
    wandb_logger   the same metrics in W&B

Nothing here imports torch or lerobot, decides what is trained, or reads a checkpoint: `checkpoints` builds on this.
"""
