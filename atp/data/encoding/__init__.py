"""Encoding: records as token ids, and a cache of them on disk (:mod:`atp.data.encoding.cache`)."""

from atp.data.encoding.encoder import LOSS_ON, Encoder
from atp.data.encoding.example import IGNORED, Choices, Example, pad

__all__ = ["IGNORED", "LOSS_ON", "Choices", "Encoder", "Example", "pad"]
