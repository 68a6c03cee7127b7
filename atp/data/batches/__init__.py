"""Batches: examples in the order that a run trains on them, packed or padded, in memory or on disk."""

from atp.data.batches.module import PruningDataModule, encode

__all__ = ["PruningDataModule", "encode"]
