"""Optional packages: imported when needed, with an error that says how to get one."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, *, extra: str) -> ModuleType:
    """Imports a package that an extra of atp brings.

    Args:
        package: Name of the module.
        extra: The extra.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed ({error}); get it with: pip install 'atp[{extra}]'") from error
