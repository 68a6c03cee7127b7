"""Files appear whole or not at all: after a kill, a failure or a full disk the file of before is there."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp.atomic import appearing, write_bytes, write_json, write_text

OLD = "what was there before\n"
KILLED = """
import os, signal, sys
from pathlib import Path
from atp.atomic import appearing

with appearing(Path(sys.argv[1])) as stage, stage.open("w") as file:
    file.write("half of")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | UNICODE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(UNICODE, inner, max_size=4),
    max_leaves=12,
)


@given(UNICODE)
def test_text_is_read_back(content: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "notes.txt")
        write_text(path, content)
        assert path.read_text(encoding="utf-8") == content
        assert os.listdir(folder) == ["notes.txt"]


@given(st.binary())
def test_bytes_are_read_back(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        write_bytes(path, content)
        assert path.read_bytes() == content


@given(PLAIN)
def test_json_is_read_back_and_ends_its_line(content: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.json")
        write_json(path, content)
        text = path.read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.endswith("\n")


def test_json_is_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"name": "für die Prüfung", "rows": [1]})
    assert (tmp_path / "metrics.json").read_text(encoding="utf-8").splitlines()[1] == '  "name": "für die Prüfung",'


@pytest.mark.parametrize("content", [OLD, None], ids=["over-a-file", "new"])
def test_a_killed_write_leaves_what_was_there(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "masks.json"
    if content is not None:
        path.write_text(content)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (path.read_text() if path.exists() else None) == content


def fails(stage: Path) -> None:
    stage.write_text("half of")
    raise OSError("no space left on device")


def is_interrupted(stage: Path) -> None:
    stage.write_text("half of")
    raise KeyboardInterrupt


def writes_nothing(stage: Path) -> None:
    """The name is never written to, so nothing can become the file."""


@pytest.mark.parametrize(
    ("write", "error"), [(fails, OSError), (is_interrupted, KeyboardInterrupt), (writes_nothing, FileNotFoundError)]
)
def test_a_failed_write_leaves_the_old_file_and_no_hidden_one(
    tmp_path: Path, write: Callable[[Path], None], error: type[BaseException]
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(OLD)
    with pytest.raises(error), appearing(path) as stage:
        write(stage)
    assert path.read_text() == OLD
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_what_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(OLD)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of \ud800")
    with pytest.raises(TypeError):
        write_json(path, {"folder": tmp_path})
    assert path.read_text() == OLD
    assert os.listdir(tmp_path) == ["table.csv"]


def test_the_file_is_not_seen_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "tokens.safetensors"
    with appearing(path) as stage:
        stage.write_bytes(b"whole")
        assert stage.parent == path.parent and stage.name.startswith(".")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == [path.name]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "runs" / "first" / "notes.txt", OLD)
    assert (tmp_path / "runs" / "first" / "notes.txt").read_text() == OLD


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(IsADirectoryError, match="pruned"):
        write_text(tmp_path / "pruned", "text")
    assert (tmp_path / "pruned" / "model.safetensors").read_bytes() == b"weights"
    assert os.listdir(tmp_path) == ["pruned"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(OLD)
    path.chmod(mode)
    write_json(path, {})
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(OLD)
    write_text(tmp_path / "whole.txt", OLD)
    assert (tmp_path / "whole.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "metrics.json").write_text(OLD)
    link = tmp_path / "metrics.json"
    link.symlink_to(tmp_path / "disk" / "metrics.json")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "metrics.json").read_text() == "new"
    assert os.listdir(tmp_path / "disk") == ["metrics.json"]


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_standard_output_is_written_to_not_replaced() -> None:
    code = "from pathlib import Path; from atp.atomic import write_json; write_json(Path('/dev/stdout'), {'loss': 1})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"loss": 1}
    assert Path("/dev/stdout").is_symlink() or Path("/dev/stdout").is_char_device()
