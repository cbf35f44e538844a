"""LeRobot's package of policies, without the second of imports that only GR00T of them asks for."""


def import_policies() -> None:
    """Import `lerobot.policies`; to be called before anything else of LeRobot's is imported.

    It imports every policy, and GR00T's processors import LeRobot's data sets, with them Hugging Face's `datasets` and
    pandas, if that is installed. For this once it is not: what trains and evaluates ACT has no use for them.
    """
    from lerobot.utils import import_utils

    installed = import_utils._datasets_available
    import_utils._datasets_available = False
    try:
        import lerobot.policies  # noqa: F401
    finally:
        import_utils._datasets_available = installed
