"""Small real runs that the tests share."""

TINY = [
    "mode=test",
    "env=pusht_keypoints",
    "dataset=demos",
    "demos.n_episodes=4",
    "policy=act_small",
    "policy.chunk_size=8",
    "policy.n_action_steps=8",
    "policy.dim_model=32",
    "batch_size=4",
    "steps=4",
    "log_freq=1",
    "eval_freq=0",
    "eval.n_episodes=2",
    "eval.batch_size=2",
    "eval.n_videos=0",
    "env.episode_length=12",
    "wandb.enable=false",
]
"""Overrides of a run that takes seconds on one core, with every part real."""


def tiny_command(*overrides: str) -> list[str]:
    """Return TINY and `overrides`, without the number of built-in demonstrations where the data set is another."""
    other = any(o.startswith("dataset=") and o != "dataset=demos" for o in overrides)
    return [*(o for o in TINY if not (other and o.startswith("demos."))), *overrides]
