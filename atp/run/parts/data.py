"""Records, prompt and batches of a run, from its configuration.

The builders' data side: it chooses among the sources of :mod:`atp.data` and hands them their settings. It knows nothing
of models beyond their tokenizer, context and how far their attention reaches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from atp.config.schema import DataConfig, TrainConfig
from atp.data.batches import PruningDataModule
from atp.data.check import Faults, faults
from atp.data.domains import load_domain, scored_records
from atp.data.encoding.cache import TokenCache, default_folder
from atp.data.encoding.chat import ChatTemplate
from atp.data.reading.files import paths_of
from atp.data.reading.folders import find_files
from atp.data.records import ChatRecord, Record, Splits, few_shot, limit
from atp.data.records.columns import RowParser
from atp.data.records.overlap import check_overlap
from atp.data.sources import load_embedded, load_files
from atp.data.streaming import StreamedRecords
from atp.data.tasks import NORMALISATIONS, load_tasks, nearest
from atp.errors import UserError
from atp.evaluate import harness
from atp.model.families import family_of

log = logging.getLogger(__name__)


def load_splits(config: DataConfig, seed: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Splits:
    """Training, validation and test records.

    Args:
        config: The data settings.
        seed: Which carving and which subset.
        tokenizer: Whose chat template conversations of the user's own must fit; None does not look.

    Raises:
        ValueError: An unknown source, or whatever the source complains of.
    """
    shares: dict[str, Any] = {
        "validation_fraction": config.validation_fraction,
        "test_fraction": config.test_fraction,
    }
    if config.source == "embedded":
        splits = load_embedded(
            config.domain, train=config.max_train, validation=config.max_validation, test=config.max_test
        )
        splits = check_overlap(_only(splits, config.tasks or {}), config.near_duplicates)
    elif config.source == "files":
        if not config.path:
            raise UserError("data.path is not set; give your file or folder: data=files data.path=<file>")
        splits = load_files(
            config.path,
            seed=seed,
            validation_path=config.validation_path,
            test_path=config.test_path,
            fields=config.fields or None,
            shape=config.shape,
            form=config.format,
            on_error=config.on_error,
            check=_check_of(tokenizer),
            near_duplicates=config.near_duplicates,
            stream=config.stream,
            name=config.name,
            **shares,
        )
    elif config.source == "tasks":
        splits = load_domain(
            config.tasks or {},
            seed=seed,
            path=config.path,
            tasks_file=config.tasks_file,
            max_train=config.max_train,
            max_validation=config.max_validation,
            max_test=config.max_test,
            near_duplicates=config.near_duplicates,
            on_error=config.on_error,
            name=config.name,
            **shares,
        )
    else:
        raise UserError(f"data.source is {config.source!r}; known: embedded, files, tasks")
    _tell_ignored(config)
    return _limited(splits, config, seed)


def _tell_ignored(config: DataConfig) -> None:
    if config.source == "files":
        return
    if config.stream:
        log.warning("data.stream is ignored: only data=files can be streamed")
    if config.format is not None or config.shape != "auto":
        log.warning("data.format and data.shape are ignored: only data=files has files of any format and shape")
    if config.on_error != "raise" and config.source == "embedded":
        log.warning("data.on_error is ignored: the embedded data holds no bad rows")


def _check_of(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Record], None] | None:
    """What refuses conversations that the tokenizer's chat template cannot write."""
    if tokenizer is None:
        return None
    template = ChatTemplate(tokenizer)

    def check(record: Record) -> None:
        if isinstance(record, ChatRecord):
            template.check(record)

    return check


def data_faults(config: DataConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Faults:
    """What is wrong with the rows of the user's own files, and how many are good."""
    if config.source != "files" or not config.path:
        return Faults([], 0, 0)
    given = {
        "data.path": config.path,
        "data.validation_path": config.validation_path,
        "data.test_path": config.test_path,
    }
    files = [
        file
        for field, value in given.items()
        if value
        for some in find_files(paths_of(value, field), config.format).by_split.values()
        for file in some
    ]
    return faults(files, RowParser(config.fields or None, config.shape, _check_of(tokenizer)), config.format)


def _only(splits: Splits, tasks: Mapping[str, Any]) -> Splits:
    """The records of some of the embedded tasks."""
    if not tasks:
        return splits
    there = list(dict.fromkeys(record.task for record in splits.train))
    for task in tasks:
        if task not in there:
            raise UserError(f"data.tasks: {splits.name} has no task {task!r}; {nearest(task, there)}")
    train, validation, test = (
        [record for record in some if record.task in tasks] for some in (splits.train, splits.validation, splits.test)
    )
    return replace(splits, train=train, validation=validation, test=test)


def _limited(splits: Splits, config: DataConfig, seed: int) -> Splits:
    train = splits.train
    if isinstance(train, StreamedRecords):
        if config.shots is not None:
            raise UserError("data.shots and data.stream exclude each other; leave one of them out")
        train = train.limited(config.max_train)
    else:
        train = few_shot(limit(list(train), config.max_train, seed), config.shots, seed)
    return replace(
        splits,
        train=train,
        validation=limit(splits.validation, config.max_validation, seed),
        test=limit(splits.test, config.max_test, seed),
    )


def load_scored(config: TrainConfig, name: str, most: int) -> list[Record]:
    """Test records of an embedded domain or task or of a known task (:func:`atp.data.domains.scored_records`)."""
    path = config.evaluate.path if config.evaluate.path is not None else config.data.path
    path = path if config.data.source == "tasks" or config.evaluate.path is not None else None
    return scored_records(name, most=most, seed=config.seed, path=path, tasks_file=config.data.tasks_file)


def load_beyond(config: TrainConfig) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Records besides the target: of other domains, for their perplexity, and of further tasks; read before training.

    Raises:
        ValueError: An unknown name or a missing file, or the harness is asked for and lacks something.
    """
    settings = config.evaluate
    if settings.max_forgetting < 1 and settings.forgetting:
        raise UserError(
            f"evaluate.max_forgetting is {settings.max_forgetting}; it must be at least 1. To measure none: "
            "evaluate.forgetting=[]"
        )
    own = {*(config.data.tasks or ()), *([config.data.domain] if config.data.source == "embedded" else [])}
    others = {
        name: load_scored(config, name, settings.max_forgetting) for name in settings.forgetting if name not in own
    }
    if settings.harness:
        harness.prepare(settings.tasks, settings.harness_path)
        return others, {}
    return others, {name: load_scored(config, name, config.data.max_test or 400) for name in settings.tasks}


def normalisation(config: TrainConfig) -> dict[str, str] | str:
    """Return how choices' log-likelihoods are normalised: one way for all tasks, or each task's own."""
    way = config.evaluate.normalise
    if way == "task":
        return {name: task.normalise for name, task in load_tasks(config.data.tasks_file).items()}
    if way not in NORMALISATIONS:
        raise UserError(f"evaluate.normalise is {way!r}; known: task, {', '.join(NORMALISATIONS)}")
    return way


def data_module(
    config: TrainConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase, context: int
) -> PruningDataModule:
    """Batches for the whole run."""
    if config.data.packing and config.model.attn_implementation != "sdpa":
        raise UserError(
            f"data.packing needs model.attn_implementation=sdpa, got {config.model.attn_implementation!r}: packed "
            "records are kept apart by a mask that only it reads"
        )
    return PruningDataModule(
        splits,
        tokenizer,
        max_length=config.data.max_length,
        batch_size=config.data.batch_size,
        num_batches=config.trainer.max_steps * config.trainer.accumulate_grad_batches,
        seed=config.seed,
        loss_on=config.data.loss_on,
        num_workers=config.data.num_workers,
        model_context=context,
        packing=config.data.packing,
        cache=_token_cache(config.data),
    )


def check_packing(config: TrainConfig, base: PreTrainedConfig) -> None:
    """Refuse packing where the base's attention would not be what it is without.

    Raises:
        UserError: Its attention slides within a sequence, or its scores are capped.
    """
    if not config.data.packing:
        return
    family = family_of(base)
    if family.caps_scores(base):
        raise UserError(
            f"data.packing needs the attention kernel sdpa, which does not compute the soft cap that {base.model_type} "
            f"has on scores ({family.score_cap}); set data.packing=false"
        )
    window = family.window(base)
    if window is not None and config.data.max_length > window:
        raise UserError(
            f"data.packing: the base's attention reaches back {window} tokens, and masks of packed records know no "
            f"window; set data.max_length={window} or less (it is {config.data.max_length}), or data.packing=false"
        )


def _token_cache(config: DataConfig) -> TokenCache | None:
    if not config.cache:
        return None
    return TokenCache(default_folder() if config.cache == "auto" else Path(config.cache).expanduser())
