"""Read a wandb offline file: LevelDB log framing around protobuf records (both public formats)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7  # file header of 7 bytes, then blocks of 32 KiB; chunk header: checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            break
        chunk = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def read(path: Path) -> dict[str, Any]:
    """Config, tags, group, summary, and history as name -> [(step, value)] (media as their nested dict)."""
    found: dict[str, Any] = {"history": {}, "summary": {}, "config": {}, "artifacts": []}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["group"], found["tags"] = record.run.run_group, list(record.run.tags)
            found["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "config":
            found["config"] |= {u.key or u.nested_key[0]: json.loads(u.value_json) for u in record.config.update}
        elif kind == "summary":
            found["summary"] |= {
                u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in record.summary.update
            }
        elif kind == "artifact":
            found["artifacts"].append(record.artifact.name)
        elif kind == "history":
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for name, value in row.items():
                found["history"].setdefault(name, []).append((row.get("trainer/global_step"), value))
    return found
