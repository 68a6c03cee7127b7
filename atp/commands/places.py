"""Where commands find models and runs: one reading of the places a user names.

A model is a run directory (its ``pruned/``), a model directory, ``embedded``, the base model that ships with atp, or
where a base will do a GGUF file or the package that holds one; a run is a run directory or the ``pruned/`` in one.
Looks at names of files only, and at what tells GGUF files from others.
"""

from __future__ import annotations

from pathlib import Path

from atp.errors import UserError
from atp.export.formats import FORMATS

EMBEDDED = "embedded"


def model_directory(path: Path) -> Path:
    """The model directory that a user's place stands for.

    Raises:
        UserError: There is no model.
    """
    if str(path) == EMBEDDED and not path.exists():
        from atp import embedded

        return Path(embedded.base_dir())
    for candidate in (path / "pruned", path):
        if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors*")):
            return candidate
    from atp.model.odd_places import model_home

    try:
        return model_home(path)  # what is wrong with weights is told where they are loaded
    except UserError as error:
        raise UserError(f"{path} holds no model: {error}") from error


def model_source(name: str) -> str:
    """As :func:`model_directory` for a run, and any other name as it is: a directory, ``embedded`` or a hub id."""
    pruned = Path(name).expanduser() / "pruned"
    return str(pruned) if (pruned / "config.json").is_file() else name


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a user's place stands for, also a package's (``smollm2``); None for any other.

    Raises:
        UserError: There is no such file, the package is not installed, or a directory holds several.
    """
    from atp.model.gguf.packages import gguf_of

    if path.suffix == ".gguf" and not path.exists():
        raise UserError(f"{path}: no such file")
    return gguf_of(str(path))


def prompt_folder(path: Path) -> Path:
    """Where a model's ``prompt.json`` would be: its directory; of a GGUF file the one that it was made of."""
    if not path.is_file():
        return path
    return path.parent.parent if path.parent.name in FORMATS else path.parent


def run_directory(path: Path) -> Path:
    """The run that a run directory is, or that a model directory belongs to."""
    return path.resolve().parent if path.resolve().name == "pruned" else path
