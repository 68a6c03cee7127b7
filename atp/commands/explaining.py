"""Hydra's and OmegaConf's complaints in one line: the file or override, the key, the nearest valid key.

Beside the command line. It knows the schema and the two libraries' errors, and composes nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from hydra.errors import MissingConfigException, OverrideParseException

from atp.config.schema import schema_fields


def explain(error: BaseException) -> str:
    """A composition error in one or two lines: file or override, key, nearest valid key."""
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    if isinstance(error, OverrideParseException):
        reason = str(error.message).splitlines()[0]
        if reason.startswith("Lexer"):
            reason = "it holds a character that needs quotes"
        elif "=" not in str(error.override):
            reason = "write it as name=value"
        return f"cannot read the override {error.override!r}: {reason}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    in_file = re.match(r"In '([^']+)'", lines[0])
    place = f"conf/{in_file[1]}.yaml" if in_file else "command line"
    in_text = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key:")), "")
    key = str(getattr(cause, "full_key", None) or in_text)
    reason = lines[1] if in_file and len(lines) > 1 else str(cause).splitlines()[0]
    parent, _, name = key.rpartition(".")
    try:
        valid = list(schema_fields(parent))
    except KeyError:
        valid = []
    if key and name not in valid and valid:
        return f"{place}: there is no option {key!r}; {_nearest(name, valid, parent)}"
    if "is not in struct" in reason and not in_file:
        return f"command line: {key} is not there yet; to add it, put a plus before it: +{key}=<value>"
    return f"{place}: {key}: {reason}" if key else f"{place}: {reason}"


def _explain_missing(error: MissingConfigException) -> str:
    name = error.missing_cfg_file or ""
    group, _, choice = str(name).rpartition("/")
    options = [str(o) for o in error.options or []]
    if group in ("hydra/sweeper", "hydra/launcher") and choice in (
        "optuna",
        "joblib",
        "submitit_local",
        "submitit_slurm",
    ):
        return f"{group}={choice} is not installed: pip install 'atp[sweep]'"
    if not group or not options:
        return str(error).splitlines()[0]
    return f"there is no {group}={choice}; {_nearest(choice, options, '')}"


def _nearest(name: str, valid: Sequence[str], parent: str) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    prefix = f"{parent}." if parent else ""
    listed = f"valid: {', '.join(valid)}"
    return f"did you mean {prefix + close[0]!r}? ({listed})" if close else listed
