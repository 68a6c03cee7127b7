"""Render a page in headless Chromium, as a person at some width sees it, and have axe-core judge it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(os.environ.get("AXE_CORE", Path(__file__).parent.parent.parent / "node_modules/axe-core/axe.min.js"))

_FRAME = """<!DOCTYPE html><html><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:{height}px"
 srcdoc="{page}"></iframe><script>
window.addEventListener("message", event => {{
  const out = document.createElement("pre"); out.id = "found"; out.textContent = event.data; document.body.append(out);
}});</script></body></html>"""
_JUDGE = """<script>{axe}</script><script>window.addEventListener("load", () => axe.run(document).then(found =>
  parent.postMessage(JSON.stringify({{violations: found.violations.map(v => [v.id, v.impact, v.nodes.length,
  v.nodes[0].html.slice(0, 200), v.nodes[0].failureSummary]), scroll: document.documentElement.scrollWidth,
  width: document.documentElement.clientWidth, passes: found.passes.length}}), "*")));</script>"""


def _chromium(*arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def judge(page: Path, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """axe-core's findings (id, impact, count, example, advice) and the widths of content and window, in pixels.

    The page runs in a frame of the given width; its content policy, which forbids scripts, is lifted in the copy.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    text = text.replace("</body>", _JUDGE.format(axe=AXE.read_text(encoding="utf-8")) + "</body>")
    if dark:
        text = text.replace("(prefers-color-scheme: dark)", "all")
    frame = folder / f"frame_{width}_{dark}.html"
    frame.write_text(_FRAME.format(page=html.escape(text), width=width, height=2000), encoding="utf-8")
    shown = _chromium("--virtual-time-budget=60000", "--window-size=1300,2200", "--dump-dom", frame.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)
    assert found, "axe-core gave no answer"
    return dict(json.loads(html.unescape(found[1])))


def picture(page: Path, target: Path, width: int, height: int, dark: bool = False) -> None:
    """A screenshot of the page at some width; narrow widths through a frame, since windows have a least width."""
    text = page.read_text(encoding="utf-8")
    if dark:
        text = text.replace("(prefers-color-scheme: dark)", "all")
    frame = target.with_suffix(".html")
    frame.write_text(_FRAME.format(page=html.escape(text), width=width, height=height), encoding="utf-8")
    _chromium(f"--window-size={max(width, 500)},{height}", f"--screenshot={target}", frame.as_uri())


def pdf(page: Path, target: Path) -> None:
    """The page as it prints."""
    _chromium("--no-pdf-header-footer", f"--print-to-pdf={target}", page.as_uri())
