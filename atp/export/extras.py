"""Optional packages: imported when needed, with an error that says how to get one."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from atp.errors import UserError
from atp.export.llama_cpp.engine import VERSION

_PROCESSOR = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Package:
    """A module that may be missing, and the extra of atp that brings it; no extra for a dependency of atp itself.

    Attributes:
        module: Its name.
        extra: The extra.
        version: The version it must have; any if empty.
        or_newer: Whether newer versions do too.
        instructions: What its wheel needs of an x86-64 processor, in Linux' names.
    """

    module: str
    extra: str = ""
    version: str = ""
    or_newer: bool = False
    instructions: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        """Whether it could be imported, without importing it."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def way(self) -> str:
        """The command that installs it."""
        return f"pip install 'atp[{self.extra}]'" if self.extra else "pip install atp"

    @property
    def fault(self) -> str:
        """Why it cannot be used here, with the way out; empty if it can. Does not import it."""
        if not self.is_installed:
            return f"{self.module} is not installed ({self.way})"
        if self.version and not self._fits(found := _version(self.module)):
            wanted = f"{self.version}{' or newer' * self.or_newer} is needed"
            return f"{self.module} {found} is installed, but {wanted}: pip install '{self.module}=={self.version}'"
        processor = _processor() if self.instructions else None
        if missing := [name for name in self.instructions if processor is not None and name not in processor]:
            return (
                f"the wheel {self.module} needs a processor with {', '.join(missing).upper()}, which this one lacks; "
                f"use another machine, or build {self.module} from its sources"
            )
        return ""

    def _fits(self, found: str) -> bool:
        """Whether an installed version does; what is behind a plus tells a build of it, as for CUDA."""
        if self.or_newer:
            return _numbers(found) >= _numbers(self.version)
        return found.partition("+")[0] == self.version

    def require(self) -> ModuleType:
        """Imports it.

        Raises:
            UserError: It is not installed, of another version, or does not run on this processor.
        """
        if self.is_installed and (fault := self.fault):
            raise UserError(fault)
        return require(self.module, extra=self.extra)


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "of no version"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def _processor() -> set[str] | None:
    """Instructions of this processor; None where Linux does not tell those of an x86 one."""
    try:
        lines = _PROCESSOR.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.startswith("flags")), "")
    return set(line.partition(":")[2].split()) or None


LLAMA_CPP = Package("xllamacpp", "llamacpp", VERSION, instructions=("avx2", "fma", "f16c", "bmi2"))
"""llama.cpp's C interface, for checks and K-quants: one version, as its structures change with every release."""
LLAMA_CPP_SERVER = replace(LLAMA_CPP, or_newer=True)
"""llama.cpp's server, whose settings and requests have names."""


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
    """Imports llama_cpp (of llama-cpp-python) and keeps llama.cpp from writing to standard error.

    Raises:
        ImportError: It is not installed.
    """
    llama_cpp: Any = importlib.import_module("llama_cpp")
    if not _SILENT:
        _SILENT.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(_SILENT[0], ctypes.c_void_p(0))
    return llama_cpp
