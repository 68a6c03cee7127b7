"""What the package imports is declared, and what a system lacks is not needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _name(requirement: str) -> str:
    """A distribution's normalised name."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(r for rows in project["optional-dependencies"].values() for r in rows)]
    declared = {_name(line) for line in asked}
    imported = set()
    for path in (ROOT / "atp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    packages = metadata.packages_distributions()
    ours = {"atp", *sys.stdlib_module_names}
    missing = {
        name
        for name in imported - ours
        if name in packages and not {_name(package) for package in packages[name]} & declared
    }
    assert not missing


def test_memory_is_measured_without_the_resource_module() -> None:
    lines = [
        "import sys, pathlib, psutil",  # psutil itself needs the module, save on Windows
        "sys.modules['resource'] = None",
        "from atp.evaluate import measure",
        "measure._PROCESS_STATUS = pathlib.Path('absent')",
        "assert measure.peak_memory_mib() > 1",
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
