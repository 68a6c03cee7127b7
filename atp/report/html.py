"""Pages from Jinja templates.

Both pages, of one run and of many, share a style sheet, macros for charts and facts, and filters. It does not know what
the pages show.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from atp.report import panel
from atp.report.comparison import model_label


def render(template: str, **content: Any) -> str:
    """Fill a template of this folder.

    Args:
        template: Its file name.
        **content: What it shows; every text is escaped.

    Returns:
        A page that loads nothing from outside itself.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": lambda chart: Markup(panel.inline_svg(chart)), "flat": _flat, "label": model_label}
    environment.filters["shares"] = _shares
    environment.filters["without"] = lambda mapping, *names: {k: v for k, v in mapping.items() if k not in names}
    return environment.get_template(template).render(**content)


def _flat(mapping: Mapping[str, Any] | None, prefix: str = "") -> list[tuple[str, Any]]:
    """List a nested object as (dotted key, value) without its empty values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in (mapping or {}).items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            pairs.append((f"{prefix}{key}", _told(value)))
    return pairs


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    """List seconds by part with their share of the sum."""
    total = sum(seconds.values()) or 1.0
    return [(part, f"{value:,.1f} ({value / total:.0%})") for part, value in seconds.items()]


def _told(value: Any) -> Any:
    """Format a figure: thousands separated, or four digits where it is small and not whole."""
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1 else f"{value:.6g}"
    return value
