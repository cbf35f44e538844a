"""Many jobs: their state on disk, their table, Optuna, SLURM and joblib. A job never imports it."""
