"""The pages as people meet them: judged by axe-core in Chromium, on a phone, in the dark, on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import rendering
from test_across import make
from test_report import make_metrics, make_run

from atp.commands.report import main
from atp.report.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(rendering.CHROMIUM is None, reason="Chromium is not installed (apt install chromium)"),
]
needs_axe = pytest.mark.skipif(
    not rendering.AXE.is_file(), reason="axe-core is not here: npm install --no-save axe-core@4.14.1, or set AXE_CORE"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "one").mkdir()
    make_run(folder / "one", make_metrics())
    for seed in (0, 1):
        for sparsity in (0.2, 0.5):
            make(folder / "sweep" / f"{sparsity}_{seed}", sparsity, seed, 4 + sparsity + 0.1 * seed, 97)
    long = folder / "sweep" / ("a-run-with-a-name-that-no-line-can-hold-" * 4)
    long.mkdir()
    (long / "config.json").write_text("{}")
    assert main([str(folder / "sweep")]) == 0
    return {"run": write_report(folder / "one"), "across": folder / "sweep" / "report.html"}


@needs_axe
@pytest.mark.parametrize("page", ["run", "across"])
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1200, False)])
def test_accessible_and_without_sideways_scroll(
    pages: dict[str, Path], page: str, width: int, dark: bool, tmp_path: Path
) -> None:
    found = rendering.judge(pages[page], tmp_path, width, dark)
    assert [v for v in found["violations"] if v[1] in ("serious", "critical")] == []
    assert found["passes"] > 20
    assert found["scroll"] <= found["width"] == width


@pytest.mark.parametrize("page", ["run", "across"])
def test_prints(pages: dict[str, Path], page: str, tmp_path: Path) -> None:
    rendering.pdf(pages[page], tmp_path / "page.pdf")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF") and len(content) > 20_000
