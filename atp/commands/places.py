"""Where commands find models and runs: one reading of the places a user names.

A model is a run directory (its ``pruned/``), a model directory, or ``embedded``, the base model that ships with atp; a
run is a run directory or the ``pruned/`` in one. Looks at names of files only.
"""

from __future__ import annotations

from pathlib import Path

from atp.errors import UserError

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


def run_directory(path: Path) -> Path:
    """The run that a run directory is, or that a model directory belongs to."""
    return path.resolve().parent if path.resolve().name == "pruned" else path
