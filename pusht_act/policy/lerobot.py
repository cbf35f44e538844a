"""LeRobot's ACT and what belongs to it: the only module of `policy` that imports LeRobot.

The import takes seconds. Modules that must answer at once import this one, and those that use it, inside functions.
"""

# Before any other part of LeRobot: it spares the process a second of imports that only other policies need.
import pusht_act.config.lerobot  # noqa: F401

# isort: split
from lerobot.optim import AdamWConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.act.processor_act import make_act_pre_post_processors
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.pipeline import ProcessorMigrationError
from lerobot.utils.constants import ACTION, OBS_IMAGES

__all__ = [
    "ACTION",
    "OBS_IMAGES",
    "ACTConfig",
    "ACTPolicy",
    "AdamWConfig",
    "PolicyProcessorPipeline",
    "ProcessorMigrationError",
    "make_act_pre_post_processors",
    "make_pre_post_processors",
]
