"""Records: what a training or test item is, and splits of them that share no content.

Rows become records in :mod:`atp.data.records.columns`, by what their columns mean (:mod:`atp.data.records.shapes`);
near duplicates are found in :mod:`atp.data.records.overlap`.
"""

from atp.data.records.splits import Splits, carve, few_shot, limit, separate
from atp.data.records.types import (
    SHAPES,
    ChatRecord,
    ChoiceRecord,
    CompletionRecord,
    Frame,
    PathLike,
    Record,
    TextRecord,
    as_completion,
    check_text,
    content_key,
    kind,
    parse_record,
    text_of,
)

__all__ = [
    "SHAPES",
    "ChatRecord",
    "ChoiceRecord",
    "CompletionRecord",
    "Frame",
    "PathLike",
    "Record",
    "Splits",
    "TextRecord",
    "as_completion",
    "carve",
    "check_text",
    "content_key",
    "few_shot",
    "kind",
    "limit",
    "parse_record",
    "separate",
    "text_of",
]
