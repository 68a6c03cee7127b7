"""Imports go down the levels only; each library has its owner."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "atp"

# From the bottom up; a module may import only from rows above its own, or from those named beside it.
LEVELS: list[dict[str, tuple[str, ...]]] = [
    {"errors": ()},
    {
        "config": (),
        "embedded": (),
        "units": (),
        "space": ("units",),
        "modeling_atp": (),
        "rundir": (),
        "fused": (),
        "distillation": (),
        "imports": (),
        "loading_lines": (),
        "progressive": (),
    },
    {
        "config_help": (),
        "architecture": (),
        "data": (),
        "baselines": (),
        "cost": (),
        "choice": (),
        "sweep": (),
    },
    {"prompt": (), "registry": ()},
    {
        "generator": (),
        "sampler": (),
        "lora": (),
        "loss": ("lora",),
        "adapter": (),
        "selection": (),
        "gates": (),
        "lasso": ("lora",),
        "evaluate": ("adapter",),  # its command line, for exports that carry one
        "report": (),
    },
    {
        "objective": (),
        "removal": (),
        "importance": (),
        "criteria": ("importance",),
        "cost": (),
        "lasso": (),
        "export": ("pipeline",),  # its command line, for an adapter: only a run's own pipeline takes one apart
        "compare": (),
    },
    {"compaction": (), "restoration": (), "tuning": ()},
    {"reconstruction": (), "starts": ()},
    {"module": ()},
    {"callbacks": (), "loggers": (), "aware": (), "monitoring": ("loggers",), "dashboard": ("loggers",)},
    {"build": (), "results": (), "generate": ()},
    {"assessment": (), "preparation": ()},
    {"stages": ()},
    {"pipeline": ()},
    {"cli": ()},
    {"__main__": ()},
]
OWNERS = {
    "peft": {"lora", "adapter", "export"},  # export: only to load an adapter as a user does, in verification
    "hydra": {"config", "build", "cli"},
    "omegaconf": {"config", "cli", "pipeline"},
    "wandb": {"loggers"},
    "wandb_workspaces": {"dashboard"},
    "datasets": {"data"},
}


def modules() -> dict[str, list[Path]]:
    """Top-level module or package of atp -> its files."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_every_module_has_a_level() -> None:
    known = {name for level in LEVELS for name in level}
    assert set(modules()) <= known


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name: str) -> None:
    level = next(i for i, row in enumerate(LEVELS) if name in row)
    below = {other for row in LEVELS[:level] for other in row} | set(LEVELS[level][name]) | {name}
    used = {
        part
        for path in modules()[name]
        for full in imported(path)
        if full.startswith("atp.") and (part := full.split(".")[1]) in modules()
    }
    assert used <= below, f"{name} imports upwards or sideways"


@pytest.mark.parametrize(("library", "owners"), OWNERS.items())
def test_libraries_have_one_owner(library: str, owners: set[str]) -> None:
    users = {
        name for name, paths in modules().items() for p in paths if any(i.split(".")[0] == library for i in imported(p))
    }
    assert users <= owners


def test_only_the_pipeline_side_imports_the_configuration() -> None:
    users = {name for name, paths in modules().items() for p in paths if "atp.config" in imported(p)}
    assert users <= {"config_help", "build", "results", "assessment", "preparation", "stages", "pipeline", "cli"}


def test_every_module_says_what_it_is() -> None:
    for paths in modules().values():
        for path in paths:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
