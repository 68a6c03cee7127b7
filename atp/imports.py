"""Imports: what is done as soon as a library's module has been imported, and what makes importing them cheaper.

Below everything else; it imports nothing but the standard library, and knows no module of this package.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_MANY = 1000  # modules; fewer are not worth setting aside


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call ``then`` with the module of this name: now if it is imported, otherwise right after it has been executed.

    Asking again for the same changes nothing.
    """
    if name in sys.modules:
        then(sys.modules[name])
    elif not any(isinstance(finder, _AfterImport) and finder.asks(name, then) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, then))


def without_plots() -> None:
    """Keep torchmetrics, which Lightning imports, from importing matplotlib.pyplot for plots that nobody asks for.

    It takes a sixth of the time a run needs to start. For processes of our own only: its metrics' ``plot`` methods then
    say that matplotlib is not installed.
    """
    after_import("torchmetrics.utilities.imports", _hide_matplotlib)


@contextmanager
def uncollected() -> Iterator[None]:
    """Run imports without garbage collection, which finds nothing among modules, and leave them out of it for good."""
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if len(sys.modules) > before + _MANY:
            gc.freeze()


def _hide_matplotlib(module: ModuleType) -> None:
    if "torchmetrics.utilities.plot" not in sys.modules:
        module._MATPLOTLIB_AVAILABLE = False  # type: ignore[attr-defined]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Import hook, used once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def asks(self, name: str, then: Callable[[ModuleType], None]) -> bool:
        """Whether this is the hook for these two."""
        return (name, then) == (self._name, self._then)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_call(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = execute_then_call  # type: ignore[method-assign]
        return spec
