"""The text of ``--help``, made from the schema and the YAML tree so that it cannot go stale.

Sits beside the schema; knows the configuration's shape and nothing of what it is used for.
"""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from atp.config.schema import TrainConfig, config_dir, schema_fields

_HEAD = """\
ATP: prune and tune a LLaMA-family model in one stage.

  python train.py experiment=legal_50pct                         a complete run on the embedded model
  python train.py experiment=legal_50pct prune.sparsity=0.3      change anything by its dotted name
  python train.py model=local model.path=DIR data=jsonl data.path=FILE name=mine
  python train.py -m experiment=legal_50pct prune.sparsity=0.2,0.3,0.5      a sweep
  python train.py data=files data.path=FILE --check              what a model would see of your data
  python train.py resume=last                                    go on with an interrupted run
  python train.py experiment=legal_50pct --cfg job               print the composed configuration
  python train.py --hydra-help                                   Hydra's own flags
"""


def help_text() -> str:
    """All groups with their choices, and all options with type, default and meaning."""
    parts = [_HEAD, "CONFIG GROUPS (choose with group=choice)\n"]
    root = Path(config_dir())
    for folder in sorted(p for p in root.rglob("*") if p.is_dir()):
        choices = sorted(folder.glob("*.yaml"))
        if not choices or folder.name == "hydra":
            continue
        parts.append(f"  {folder.relative_to(root)}")
        parts += [f"    {path.stem:<24} {_first_comment(path)}" for path in choices]
    parts.append("\nOPTIONS (change with name=value)\n")
    parts += _options(TrainConfig, "")
    return "\n".join(parts) + "\n"


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""


def _options(node: Any, prefix: str) -> list[str]:
    lines: list[str] = []
    nested = schema_fields(prefix)
    own = {name: item for name, item in node.__dataclass_fields__.items() if nested[name] is None}
    lines += [_option_line(f"{prefix}.{name}" if prefix else name, item) for name, item in own.items()]
    for name, inner in nested.items():
        if inner is not None:
            path = f"{prefix}.{name}" if prefix else name
            lines += ["", f"  {path}: {(inner.__doc__ or '').splitlines()[0]}", *_options(inner, path)]
    return lines


def _option_line(name: str, item: Field[Any]) -> str:
    default: Any = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc,operator]
    text = f"{item.metadata.get('help', '')} [{'null' if default is None else default}]"
    return textwrap.fill(text, 110, initial_indent=f"    {name:<34} ", subsequent_indent=" " * 39)
