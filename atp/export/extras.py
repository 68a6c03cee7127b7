"""Optional packages: imported when needed, with an error that says how to get one."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from atp.errors import UserError


@dataclass(frozen=True)
class Package:
    """A module that may be missing, and the extra of atp that brings it; no extra for a dependency of atp itself."""

    module: str
    extra: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether it could be imported, without importing it."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def way(self) -> str:
        """The command that installs it."""
        return f"pip install 'atp[{self.extra}]'" if self.extra else "pip install atp"

    def require(self) -> ModuleType:
        """Imports it.

        Raises:
            UserError: It is not installed.
        """
        return require(self.module, extra=self.extra)


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
        raise UserError(f"{package} is not installed ({error}); get it with: pip install 'atp[{extra}]'") from error


_SILENT: list[Any] = []  # llama.cpp calls its log function for as long as the process lives, so it must live as long


def silenced_llama_cpp() -> Any:
    """Imports llama_cpp and keeps llama.cpp from writing to standard error, which its verbose=False does in part.

    Raises:
        ValueError: It is not installed.
    """
    llama_cpp: Any = require("llama_cpp", extra="llamacpp")
    if not _SILENT:
        _SILENT.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(_SILENT[0], ctypes.c_void_p(0))
    return llama_cpp
