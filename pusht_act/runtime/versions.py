"""Refuse versions of a library whose private names this package uses but was not written for."""

from importlib.metadata import version

from pusht_act.runtime.errors import UserError


def require_version(package: str, supported: str, module: str) -> None:
    """Check that the installed version of `package` is one that `module` was written for.

    Args:
        package: Name of the distribution, such as "pymunk".
        supported: A version or its leading parts: "6" accepts every 6.x.
        module: The module that uses private names of `package`; shown in the message.

    Raises:
        UserError: Another version is installed.
    """
    installed = version(package)
    if installed != supported and not installed.startswith(f"{supported}."):
        raise UserError(
            f"{package} {installed} is installed, but {module} uses private names of {package} {supported}: "
            f"install '{package}=={supported}.*'"
        )
