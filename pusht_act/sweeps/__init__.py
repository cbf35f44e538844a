"""Sweeps: many jobs from one command, which can be resumed; on this machine, side by side, or on SLURM.

    <hydra.sweep.dir>/
      multirun.yaml     Hydra's: the composed configuration
      sweep.json        the sweep's identity: its overrides and, for a grid, those of each job
      optuna.db         with hydra/sweeper=optuna: its study
      jobs/0.json ...   job 0: its state, how often it was started, its result
      0/ 1/ ...         the run directory of each job

    resume              the command's arguments -> those of the sweep to resume       in the process of the command
    recorded            which overrides of a sweep.json are taken
    callback            writes sweep.json before the first job
    optuna_sweeper      chooses the values of each job, batch by batch
    slurm, joblib_workers     what Hydra's launchers lack: the script, cores and GPUs, signals
    report, table       the table at the end
    run_job, pruning    run a job and record its result; ask whether to prune it      in the process of a job
    state               sweep.json and jobs/N.json
    status              mode=status: the progress of all jobs, or of a run            in any process that sees the files
    hydra_internals, submitit_internals     what is used of their private interfaces

The state of a sweep is in its files alone, so it is the same from every machine. Nothing here imports torch or lerobot,
and a job never imports this package except through `main`, which passes it what it has to report to.
"""
