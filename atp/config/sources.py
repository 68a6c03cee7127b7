"""YAML files as Hydra reads them, with settings that have moved under their names of now.

Takes the place of Hydra's own reader of files, so that a user's presets of an earlier version still compose. It knows
files and packages; which names have moved is in :mod:`atp.config.moved`.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from atp.config.moved import has_older, with_new_content

_ELSEWHERE = "__elsewhere"  # ends the name of a file that is not there: what has moved out of another file's package


class FileSource(FileConfigSource):
    """Files below a folder."""

    def is_config(self, config_path: str) -> bool:
        """Whether there is such a file."""
        return bool(super().is_config(config_path.removesuffix(_ELSEWHERE)))

    def load_config(self, config_path: str) -> ConfigResult:
        """A file's content and header."""
        path = config_path.removesuffix(".yaml").removesuffix(_ELSEWHERE)
        result = super().load_config(path)
        if not isinstance(result.config, DictConfig):
            return result
        package = _package(result.header.get("package"), path)
        content: Any = OmegaConf.to_container(result.config, resolve=False)
        if not has_older(content, package):
            return result
        inside, outside = with_new_content(content, package, f"{path}.yaml")
        if path != config_path.removesuffix(".yaml"):
            result.config, result.header = OmegaConf.create(outside), {"package": "_global_"}
            return result
        if outside:
            inside["defaults"] = _with_default(inside.get("defaults", []), f"/{path}{_ELSEWHERE}@_global_")
        result.config = OmegaConf.create(inside)
        return result


def install() -> None:
    """Let Hydra read files this way; may be called repeatedly."""
    Plugins.instance()  # registers Hydra's own, which this takes the place of
    SourcesRegistry.instance().types[FileSource.scheme()] = FileSource


def _package(header: str | None, path: str) -> str:
    """Dotted name under which a file's content stands."""
    group = ".".join(PurePosixPath(path).parent.parts)
    if header is None or header == "_group_":
        return group
    return "" if header == "_global_" else header.replace("_group_", group).removeprefix("_global_.")


def _with_default(defaults: list[Any], entry: str) -> list[Any]:
    """A defaults list with one more entry, which wins over the others; overrides must stand last."""
    plain = [item for item in defaults if not (isinstance(item, dict) and next(iter(item)).startswith("override "))]
    rest = defaults[len(plain) :]
    return [*plain, *([] if "_self_" in plain else ["_self_"]), entry, *rest]
