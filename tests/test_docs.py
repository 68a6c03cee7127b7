"""The documentation site builds without a warning, and what it tells users to type exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from atp.cli import compose_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def train_commands() -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    found = re.findall(r"^\s*python train\.py ([^\n#`]+)", text, re.MULTILINE)
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", train_commands())
def test_shown_commands_compose(command: str) -> None:
    words = [word for word in shlex.split(command) if not word.startswith(("-", "resume=", "sweep=", "hydra"))]
    if words and not any(word.isupper() for word in words):
        first = [re.sub(r"^([\w.]+=)([^,\[{]+),.*$", r"\1\2", word) for word in words]
        compose_config(first)


@pytest.mark.slow
def test_site_builds_with_warnings_as_errors(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    pytest.importorskip("mkdocstrings", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PruningSpace" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
