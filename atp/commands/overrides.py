"""Hydra's overrides read one by one: which are swept, and what the first job of a sweep gets.

Beside the command line, which composes a configuration with them. It knows Hydra's grammar of overrides and no setting.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from atp.commands.explaining import explain
from atp.errors import UserError


def swept(overrides: Sequence[str]) -> list[str]:
    """Overrides with several values."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [
        text
        for text, override in zip(overrides, parsed, strict=True)
        if override.is_sweep_override() and not override.key_or_group.startswith("hydra")
    ]


def of_first_job(overrides: Sequence[str]) -> list[str]:
    """Overrides of the configuration alone, each swept one with its first value.

    Raises:
        UserError: One cannot be read.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UserError(explain(error)) from error
    first = []
    for text, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override():
            value = next(iter(override.sweep_string_iterator()))
            text = f"{override.get_key_element()}={value}"
        if not override.key_or_group.startswith("hydra"):
            first.append(text)
    return first
