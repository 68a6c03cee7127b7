"""The documentation site builds without a warning, and what it tells users to type exists."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_layering import ALSO, BESIDE, COMMANDS, FILES, FLOOR, FLOW, PACKAGE, imported

from atp.commands.train import compose_config

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


def test_shown_modules_exist() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    names = sorted(set(re.findall(r"python -m\s+((?:atp|benchmarks)\.[\w.]*\w)", text)))
    assert names
    assert [name for name in names if importlib.util.find_spec(name) is None] == []


def test_named_options_exist() -> None:
    known = compose_config([])
    option = re.compile(
        r"`(?:[^`\n]* )?((?:data|evaluate|export|lora|model|optim|prompt|prune|trainer)(?:\.[a-z_]+)+)(?=[=` ])"
    )
    missing = []
    for page in PAGES:
        for name in option.findall(page.read_text(encoding="utf-8")):
            group, *keys = name.split(".")
            node = known[group]
            while keys and keys[0] in node:
                node = node[keys.pop(0)]
            if keys and keys[0] not in ("json", "safetensors"):  # prompt.json and model.safetensors are files
                missing.append((page.name, name))
    assert missing == []


def test_readme_is_short_and_shows_the_rooms_of_the_architecture() -> None:
    readme, architecture = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/architecture.md"))
    assert len(readme.split()) <= 900
    pictures = [
        re.findall(r"^```\n(config -> .*?)```", text, re.DOTALL | re.MULTILINE) for text in (readme, architecture)
    ]
    assert pictures[0]
    assert pictures[0] == pictures[1]


def rooms_shown() -> list[str]:
    """The folders in the picture of the architecture, from top to bottom."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"^atp/\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert picture
    return re.findall(r"^  (\w+)/ ", picture[1], re.MULTILINE)


def test_the_architecture_shows_the_folders_and_the_table_of_imports() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert sorted(rooms_shown()) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    assert sorted(rooms_shown()) == sorted([*FLOW, *BESIDE])
    assert set(re.findall(r"(\w+)\.py", text.split("```")[1])) == FLOOR
    assert set(re.findall(r"^- \*\*`(\w+)/`\*\*:", text, re.MULTILINE)) == set(rooms_shown())
    every = set(rooms_shown())
    words = {"no other room": set(), "every room but `commands/`": every - {"commands"}, "every room": every}
    for room, shown in re.findall(r"^\| `(\w+)/` \| (.+) \|$", text, re.MULTILINE):
        named = words.get(shown, set(re.findall(r"`(\w+)/`", shown)))
        assert named - {room} == BESIDE[room], f"{room}/ in docs/architecture.md and in tests/test_layering.py"
    assert {room for room, _ in re.findall(r"^\| `(\w+)/` \| (.+) \|$", text, re.MULTILINE)} == set(BESIDE)


def test_rooms_import_from_those_above_them_in_the_picture() -> None:
    above = rooms_shown()
    for path, room in FILES.items():
        if room in above:
            used = {name.split(".")[1] for name in imported(path) if name.startswith("atp.")} - FLOOR - {room}
            assert used <= {*above[: above.index(room)], *ALSO.get(room, ())}, path.relative_to(PACKAGE)


def test_every_room_has_its_tests() -> None:
    assert {room for room in rooms_shown() if not list((ROOT / "tests" / room).glob("test_*.py"))} == set()


def test_the_api_page_has_every_module_in_the_order_of_the_rooms() -> None:
    listed = re.findall(r"^::: atp\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    doors = {path for path, room in FILES.items() if room in COMMANDS or path.stem == "__main__"}
    files = {path for path in FILES if path.stem != "__init__"} - doors
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files}
    packages = {".".join(path.relative_to(PACKAGE).parent.parts) for path in FILES if path.stem == "__init__"}
    assert sorted(modules - set(listed)) == [], "not on the page"
    assert sorted(set(listed) - modules - packages) == [], "on the page, and there is no such module"
    rooms = list(dict.fromkeys(name.split(".")[0] for name in listed))
    assert [room for room in rooms if room not in FLOOR] == rooms_shown()
    assert len(listed) == len(set(listed))


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, rest = name, []
    while True:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module):
                break
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
    found = importlib.import_module(module) if rest else None
    try:
        functools.reduce(getattr, rest, found)
    except AttributeError:
        return False
    return True


def test_references_in_docstrings_lead_somewhere() -> None:
    reference = re.compile(r":(?:mod|class|func|meth|data|attr):`~?(atp(?:\.\w+)+)`")
    named = {name: path for path in FILES for name in reference.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 50
    assert {name: path.name for name, path in named.items() if not exists(name)} == {}


def test_readme_names_every_preset() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    presets = {path.stem.removesuffix("_paper") for path in (ROOT / "conf" / "prune").glob("*.yaml")}
    assert {name for name in presets if f"`{name}`" not in readme} == set()


def test_every_page_has_a_place_in_the_site() -> None:
    def pages(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        inner = node.values() if isinstance(node, dict) else node
        return [page for part in inner for page in pages(part)]  # type: ignore[attr-defined]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_links_to_headings_resolve() -> None:
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            text = (page.parent / target if target else page).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                page,
                heading,
            )


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
