"""A configuration composed from overrides, as the command would compose it."""

import hydra

from pusht_act.config.schema import Config
from pusht_act.config.validation import to_config
from pusht_act.main import CONFIG_DIR


def config(*overrides: str) -> Config:
    """Return the validated configuration of a job with these overrides."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=CONFIG_DIR):
        return to_config(hydra.compose("config", list(overrides)))
