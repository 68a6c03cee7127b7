"""A run starts without what it does not need, and hooks act on imports once."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from atp.imports import after_import, uncollected


def test_a_hook_acts_now_or_once_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[tuple[str, int]] = []

    def note(module: ModuleType) -> None:
        seen.append((module.__name__, len(module.__dict__)))
        module.value = 2  # type: ignore[attr-defined]

    finders = len(sys.meta_path)
    after_import("late_module", note)
    after_import("late_module", note)
    assert len(sys.meta_path) == finders + 1 and not seen
    import late_module  # type: ignore[import-not-found]

    assert late_module.value == 2 and len(seen) == 1 and len(sys.meta_path) == finders
    after_import("late_module", note)
    assert len(seen) == 2
    monkeypatch.delitem(sys.modules, "late_module")


def test_collection_is_on_again_after_imports_that_fail() -> None:
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        import there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_run_gets_ready_without_plots() -> None:
    code = (
        "import json, sys\n"
        "from atp.imports import without_plots\n"
        "without_plots()\n"
        "import atp.commands.train, atp.run.pipeline, atp.run.stages\n"
        "print(json.dumps([name for name in ('matplotlib', 'wandb', 'datasets', 'IPython') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
