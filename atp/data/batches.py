"""Data: records as batches of tokens, in an order that a resumed run takes up exactly.

:class:`PruningDataModule` is what the trainer gets. It sits between :mod:`atp.data.encoding` and the training module,
and knows nothing of masks, losses or optimisers, nor of where records come from.

The whole run is one epoch of ``num_batches`` micro-batches. Which examples batch ``k`` holds is a function of the seed
and ``k`` alone, so the place in the data is one number, and resuming is starting to count from there.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from atp.data.encoding import Encoder, Example, pad
from atp.data.packing import PackedExample, block_mask, pack
from atp.data.records import Record, Splits
from atp.data.streaming import StreamedRecords, TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]

_GROUPED_BATCHES = 50


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str = "auto") -> list[Example]:
    """Encode one record: one example, or one per window of a long text. See :class:`atp.data.encoding.Encoder`."""
    return Encoder(tokenizer, max_length).encode([record], loss_on)[0]


class BatchOrder:
    """Which examples each batch holds: a function of the seed and the batch's index.

    Every pass over the data has an order of its own. Within a pass, stretches of 50 batches are sorted by length and
    cut into batches, which are then shuffled: batches hold examples of similar length, so little of them is padding.
    One batch of a pass may be short.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per batch.
        seed: Which order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_pass = -(-len(lengths) // batch_size)
        self._lengths = np.asarray(lengths)
        self.tokens = int(self._lengths.sum())
        self._planned: tuple[int, list[np.ndarray]] | None = None

    def __getitem__(self, index: int) -> list[int]:
        """Return the positions of the examples in batch ``index``, counted from the start of the run."""
        passes, position = divmod(index, self.batches_per_pass)
        if self._planned is None or self._planned[0] != passes:
            self._planned = (passes, self._plan(passes))
        return self._planned[1][position].tolist()

    def _plan(self, passes: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, passes))
        order = rng.permutation(len(self._lengths))
        stretch = self.batch_size * _GROUPED_BATCHES
        batches: list[np.ndarray] = []
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches.extend(part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]


class ResumableLoader:
    """Yields the batches of a run from where it stands; Lightning stores and restores that place.

    Lightning takes any sized iterable with ``state_dict`` and ``load_state_dict`` as a loader that resumes within an
    epoch. It expects the full length also after resuming. ``len(loader)`` is therefore that of the run, while iterating
    yields what is left of it. Not a torch ``DataLoader``, which Lightning would rebuild without the state.

    Args:
        examples: What to batch.
        order: Which examples make a batch.
        num_batches: Batches of the whole run, per process.
        pad_id: Token id of padding.
        num_workers: Processes that make batches; 0 makes them in this one.
        trained: Returns how many batches training has finished with; None counts those that were handed out. The two
            differ when a step fails: its batch was handed out, but is to come again.
        rank: This process' place among ``world_size``, each of which sees other batches.
        world_size: Number of processes that train together.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[PackedExample],
        order: BatchOrder,
        *,
        num_batches: int,
        pad_id: int,
        num_workers: int = 0,
        trained: Callable[[], int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._examples = examples
        self._order = order
        self._num_batches = num_batches
        self._pad_id = pad_id
        self._num_workers = num_workers
        self._trained = trained
        self._rank = rank
        self._world_size = world_size
        self._start = 0
        self._yielded = 0

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        self._yielded = start
        steps = range(start, self._num_batches)
        batches = _Batches(self._order, [step * self._world_size + self._rank for step in steps])
        loader: DataLoader[Example] = DataLoader(
            self._examples,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=self._num_workers,
            collate_fn=_Collate(self._pad_id),
            pin_memory=torch.cuda.is_available(),
            # Of its own, or starting to iterate would draw from the global one and shift what training draws later.
            generator=torch.Generator().manual_seed(self._order.seed),
        )
        for batch in loader:
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the run: the batches done with, and what their order depends on."""
        return {"batch": self._yielded if self._trained is None else self._trained(), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the run; the next iteration starts there.

        Raises:
            ValueError: The place belongs to other data, another seed or another batch size.
        """
        changed = {key: (state.get(key), value) for key, value in self._identity().items() if state.get(key) != value}
        if changed:
            told = ", ".join(f"{key} was {before}, is {now}" for key, (before, now) in changed.items())
            raise ValueError(
                f"cannot resume within this data: {told}; resume with the settings and data that the run began with, "
                "or start a new run"
            )
        self._start = self._yielded = int(state["batch"])

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self._order.seed,
            "batch_size": self._order.batch_size,
            "examples": len(self._examples),
            "tokens": self._order.tokens,
            "processes": self._world_size,
        }


class PruningDataModule(lightning.LightningDataModule):
    """Batches of one data set for one run.

    Batches are dicts of int64 tensors [B, T]: ``input_ids`` and ``attention_mask``, padded on the right to the longest
    of the batch, and unshifted ``labels`` with -100 where nothing is learnt. Packed training batches hold a boolean
    ``attention_mask`` [B, 1, T, T] instead (:func:`atp.data.packing.block_mask`); validation is never packed.

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
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "num_batches": num_batches,
            "max_validation_examples": max_validation_examples,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        if model_context is not None and max_length > model_context:
            raise ValueError(
                f"data.max_length={max_length} exceeds the model's context of {model_context} tokens; "
                f"set data.max_length={model_context} or less"
            )
        for name, records in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
            if not records:
                raise ValueError(
                    f"the {name} split of {splits.name!r} is empty; give more records or another data.path"
                )
        if packing and isinstance(splits.train, StreamedRecords):
            raise ValueError("data.packing and data.stream exclude each other; leave one of them out")
        self.packing = packing
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
            raise ValueError(f"no record of {self.splits.name!r} holds a token to learn: all are a single token long")
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
        found = self.encoder.encode(list(train), self.loss_on)
        self._train_truncated = dict(self.encoder.truncated)
        examples = [example for some in found for example in some if example.loss_tokens > 0]
        self._unpacked = examples
        return pack(examples, self.encoder.max_length) if self.packing else examples

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of the whole run, which counts as one epoch."""
        self.setup()
        return self._loader(self._train)

    def calibration_dataloader(self) -> ResumableLoader:
        """Return the training batches as they would be without packing: for what reads which positions are padding."""
        self.setup()
        return self._loader(self._unpacked if self.packing else self._train)

    def _loader(self, examples: Sequence[Example] | Sequence[PackedExample]) -> ResumableLoader:
        lengths = _lengths(examples)
        trainer = self.trainer
        return ResumableLoader(
            examples,
            BatchOrder(lengths, self.batch_size, self.seed),
            num_batches=self.num_batches,
            pad_id=self.encoder.pad_id,
            num_workers=self.num_workers,
            trained=None if trainer is None else self._batches_trained,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )

    def calibration_batch(self, index: int) -> Batch:
        """Return a training batch of an order of its own: for steps that learn masks apart from adapters."""
        self.setup()
        if self._calibration_order is None:
            lengths = [len(example.input_ids) for example in self._train]
            self._calibration_order = BatchOrder(lengths, self.batch_size, self.seed + 1)
        return _Collate(self.encoder.pad_id)([self._train[i] for i in self._calibration_order[index]])

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
        lengths = np.array(_lengths(self._train))
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


class FixedBatches:
    """The same batches at every iteration, in the order of the examples."""

    def __init__(self, examples: Sequence[Example], batch_size: int, pad_id: int) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._collate = _Collate(pad_id)

    def __len__(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._examples), self._batch_size):
            yield self._collate(self._examples[start : start + self._batch_size])


class _Batches(Sampler[list[int]]):
    """The batch sampler of a stretch of the run."""

    def __init__(self, order: BatchOrder, indices: Sequence[int]) -> None:
        self._order = order
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[list[int]]:
        return (self._order[index] for index in self._indices)


class _Collate:
    """Pads examples into a batch of tensors; a class, so that worker processes can be sent it."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[Example | PackedExample]) -> Batch:
        arrays = pad(examples, self._pad_id)
        packed = [example for example in examples if isinstance(example, PackedExample)]
        if packed:
            arrays["attention_mask"] = block_mask(packed, arrays["input_ids"].shape[1])
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _lengths(examples: Sequence[Example] | Sequence[PackedExample]) -> list[int]:
    return examples.lengths if isinstance(examples, TokenStore) else [len(one.input_ids) for one in examples]
