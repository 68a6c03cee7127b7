"""Data: records as batches of tokens, in an order that a resumed run takes up exactly.

:class:`PruningDataModule` is what the trainer gets. It sits between :mod:`atp.data.encoding` and the training module,
and knows nothing of masks, losses or optimisers, nor of where records come from.

The whole run is one epoch of ``num_batches`` micro-batches (:mod:`atp.data.batches.loading`).

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np

from atp.data.batches.loading import Batch, BatchOrder, Collate, FixedBatches, ResumableLoader, lengths_of
from atp.data.batches.packing import PackedExample, pack
from atp.data.batches.store import TokenStore
from atp.data.encoding import Encoder, Example
from atp.data.encoding.cache import TokenCache
from atp.data.records import Record, Splits
from atp.data.streaming import StreamedRecords
from atp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str = "auto") -> list[Example]:
    """Encode one record: one example, or one per window of a long text. See :class:`atp.data.encoding.Encoder`."""
    return Encoder(tokenizer, max_length).encode([record], loss_on)[0]


class PruningDataModule(lightning.LightningDataModule):
    """Batches of one data set for one run.

    Batches are dicts of int64 tensors [B, T]: ``input_ids`` and ``attention_mask``, padded on the right to the longest
    of the batch, and unshifted ``labels`` with -100 where nothing is learnt. Packed training batches hold a boolean
    ``attention_mask`` [B, 1, T, T] instead (:func:`atp.data.batches.packing.block_mask`); validation is never packed.

    Args:
        splits: Records to train on and to validate on.
        tokenizer: The model's tokenizer.
        max_length: Most tokens of a sequence.
        batch_size: Examples of a micro-batch.
        num_batches: Micro-batches of the whole run, per process: optimiser steps times gradient accumulation.
        seed: Which order.
        loss_on: ``auto``, ``completion`` or ``all`` (:meth:`atp.data.encoding.Encoder.encode`).
        num_workers: Processes that make batches; 0 is right unless batches are slow to make.
        model_context: Most tokens the model takes; None does not check.
        max_validation_examples: Most examples of validation, chosen by the seed.
        packing: Put several short training examples into one sequence.
        cache: Where token ids of training records are kept between runs; None tokenises every time.

    Raises:
        ValueError: A number is out of range, ``max_length`` exceeds the model's context, a split is empty, or packing
            is asked for with a stream.
    """

    def __init__(
        self,
        splits: Splits,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        loss_on: str = "auto",
        num_workers: int = 0,
        model_context: int | None = None,
        max_validation_examples: int = 256,
        packing: bool = False,
        cache: TokenCache | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "num_batches": num_batches,
            "max_validation_examples": max_validation_examples,
        }
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"data.{name}={value} must be at least 1")
        if model_context is not None and max_length > model_context:
            raise UserError(
                f"data.max_length={max_length} exceeds the model's context of {model_context} tokens; "
                f"set data.max_length={model_context} or less"
            )
        for name, records in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
            if not records:
                raise UserError(f"the {name} split of {splits.name!r} is empty; give more records or another data.path")
        if packing and isinstance(splits.train, StreamedRecords):
            raise UserError("data.packing and data.stream exclude each other; leave one of them out")
        self.packing = packing
        self.cache = cache
        self.splits = splits
        self.encoder = Encoder(tokenizer, max_length)
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.loss_on = loss_on
        self.num_workers = num_workers
        self.max_validation_examples = max_validation_examples
        self._train: Sequence[Example] | Sequence[PackedExample] = []
        self._unpacked: list[Example] = []
        self._validation: list[Example] = []
        self._calibration_order: BatchOrder | None = None
        self._short_of: set[int] = set()

    def setup(self, stage: str | None = None) -> None:
        """Tokenise both splits, once, and log :meth:`describe`."""
        if self._train:
            return
        train = self._encode_train()
        self.encoder.check_answers(self.splits.name)
        rng = np.random.default_rng(self.seed)
        picked = rng.permutation(len(self.splits.validation))[: self.max_validation_examples]
        records = [self.splits.validation[i] for i in sorted(picked)]
        validation = [example for found in self.encoder.encode(records, self.loss_on) for example in found]
        validation = validation[: self.max_validation_examples]
        self._train = train
        if not self._train:
            raise UserError(f"no record of {self.splits.name!r} holds a token to learn: all are a single token long")
        self._validation = sorted(
            (example for example in validation if example.loss_tokens > 0), key=lambda example: len(example.input_ids)
        )
        log.info("data %s: %s", self.splits.name, self.describe())

    def _encode_train(self) -> Sequence[Example] | Sequence[PackedExample]:
        train = self.splits.train
        if isinstance(train, StreamedRecords):
            store = TokenStore(train, self.encoder, self.loss_on)
            self._train_truncated = dict(self.encoder.truncated)
            return store
        if self.cache is None:
            found: Iterator[Example] = itertools.chain.from_iterable(self.encoder.encode(list(train), self.loss_on))
        else:
            found = iter(self.cache.examples(list(train), self.encoder, self.loss_on))
        self._train_truncated = dict(self.encoder.truncated)
        examples = [example for example in found if example.loss_tokens > 0]
        self._unpacked = examples
        return pack(examples, self.encoder.max_length) if self.packing else examples

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of the whole run, which counts as one epoch."""
        self.setup()
        return self._loader(self._train)

    def calibration_dataloader(self, count: int) -> ResumableLoader:
        """Return the first training batches, unpacked: calibration has to know which tokens are padding.

        Args:
            count: How many, however short the run is; at most one pass over the data, with a warning.
        """
        self.setup()
        examples = self._unpacked if self.packing else self._train
        processes = 1 if self.trainer is None else self.trainer.world_size
        there = max(-(-len(examples) // self.batch_size) // processes, 1)
        if count > there and count not in self._short_of:
            self._short_of.add(count)
            log.warning(
                "calibration: %d batches asked for (prune.warm_start.batches, prune.repair.batches), but the training "
                "data holds %d of data.batch_size=%d; these are used",
                count,
                there,
                self.batch_size,
            )
        return self._loader(examples, min(count, there))

    def _loader(
        self, examples: Sequence[Example] | Sequence[PackedExample], num_batches: int | None = None
    ) -> ResumableLoader:
        lengths = lengths_of(examples)
        trainer = self.trainer
        return ResumableLoader(
            examples,
            BatchOrder(lengths, self.batch_size, self.seed),
            num_batches=self.num_batches if num_batches is None else num_batches,
            pad_id=self.encoder.pad_id,
            num_workers=self.num_workers,
            trained=None if trainer is None else self._batches_trained,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )

    def calibration_batch(self, index: int) -> Batch:
        """Return a training batch in a random order of its own, for steps that learn masks apart from adapters."""
        self.setup()
        if self._calibration_order is None:
            lengths = [len(example.input_ids) for example in self._train]
            self._calibration_order = BatchOrder(lengths, self.batch_size, self.seed + 1)
        return Collate(self.encoder.pad_id)([self._train[i] for i in self._calibration_order[index]])

    def val_dataloader(self) -> FixedBatches:
        """Return the validation batches, always the same, sorted by length."""
        self.setup()
        return FixedBatches(self._validation, self.batch_size, self.encoder.pad_id)

    def describe(self) -> dict[str, Any]:
        """Return counts that describe the data as the model sees it.

        Returns:
            ``records`` and ``examples`` per split; training ``tokens``, ``loss_tokens``, ``length`` percentiles (50,
            90, 100) and ``truncated`` counts; ``passes`` over the training data; ``padding``, the share of positions in
            the first pass that are padding.
        """
        self.setup()
        lengths = np.array(lengths_of(self._train))
        order = BatchOrder(lengths.tolist(), self.batch_size, self.seed)
        batches = [lengths[order[i]] for i in range(min(self.num_batches, order.batches_per_pass))]
        positions = sum(int(batch.max()) * len(batch) for batch in batches)
        return {
            "records": self.splits.counts(),
            "examples": {"train": len(self._train), "validation": len(self._validation)},
            "tokens": int(lengths.sum()),
            "loss_tokens": sum(example.loss_tokens for example in self._train),
            "length": {f"p{q}": int(np.percentile(lengths, q)) for q in (50, 90, 100)},
            "truncated": self._train_truncated,
            "passes": round(self.num_batches / order.batches_per_pass, 2),
            "padding": round(1 - sum(int(batch.sum()) for batch in batches) / positions, 3),
        }

    def _batches_trained(self) -> int:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.processed)
