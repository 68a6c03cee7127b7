"""Imports go down the rooms only; each library has its room."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "atp"

FLOOR = {"errors", "atomic", "imports", "loading_lines"}
FLOW = (
    "config",
    "model",
    "embedded",
    "data",
    "space",
    "masks",
    "cut",
    "prepare",
    "train",
)  # a room knows those before it
BESIDE = {
    "evaluate": {"data", "model"},
    "export": {"model", "data", "space", "masks"},
    "report": set(),
    "run": {*FLOW, "evaluate", "export", "report"},
    "commands": {*FLOW, "evaluate", "export", "report", "run"},
}
ALSO = {"train": {"report"}}  # the picture of masks, which loggers show while they train and reports show again
READ_THE_CONFIG = {"config", "run", "commands"}
LIBRARIES = {
    "peft": {"masks", "export"},  # export: only to load an adapter as a user does, in verification
    "hydra": {"config", "run", "commands"},
    "omegaconf": {"config", "run", "commands"},
    "wandb": {"train"},
    "wandb_workspaces": {"commands"},
    "datasets": {"data"},
    "vllm": {"export"},
}
COMMANDS = {
    "compare",
    "dashboard",
    "generate",
    "serve",
    "__main__",
}  # `python -m atp.compare` and the like: doors to commands/


def room_of(path: Path) -> str:
    if path.name == "__main__.py":
        return "__main__"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = {path: room_of(path) for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def allowed(room: str) -> set[str]:
    if room in COMMANDS:
        return {"commands"}
    before = set(FLOW[: FLOW.index(room)]) - {"config"} if room in FLOW else BESIDE.get(room, set())
    floor = FLOOR if room not in FLOOR else {"errors"} - {room}
    return before | floor | ALSO.get(room, set()) | {room}


@functools.cache
def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_every_file_is_in_a_room() -> None:
    assert set(FILES.values()) <= {*FLOOR, *FLOW, *BESIDE, *COMMANDS}


@pytest.mark.parametrize("room", sorted(set(FILES.values())))
def test_imports_go_down(room: str) -> None:
    for path in (path for path, of in FILES.items() if of == room):
        used = {name.split(".")[1] for name in imported(path) if name.startswith("atp.")}
        assert used <= allowed(room), f"{path.relative_to(PACKAGE)} imports upwards or sideways"


def test_only_runs_and_commands_read_the_configuration() -> None:
    readers = {room for path, room in FILES.items() if any(name.startswith("atp.config") for name in imported(path))}
    assert readers <= READ_THE_CONFIG


@pytest.mark.parametrize(("library", "rooms"), LIBRARIES.items())
def test_libraries_have_one_room(library: str, rooms: set[str]) -> None:
    users = {room for path, room in FILES.items() if any(name.split(".")[0] == library for name in imported(path))}
    assert users <= rooms


def test_there_is_no_import_circle() -> None:
    modules = {".".join(("atp", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    at_once = {name: _top(path, set(modules)) - {name} for name, path in modules.items()}
    done: set[str] = set()
    while ready := {name for name, needs in at_once.items() if name not in done and needs <= done}:
        done |= ready
    assert not set(modules) - done


def _top(path: Path, known: set[str]) -> set[str]:
    """Modules that importing a file imports; of ``from package import module`` the module alone."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            names |= inner if len(inner) == len(node.names) else inner | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & known


def test_every_module_says_what_it_is() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
