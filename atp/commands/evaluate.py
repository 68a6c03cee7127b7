"""``atp evaluate <model> task=casehold,billsum``: score any model, pruned by us or not.

What users compare with: the same tasks, prompts, metrics and intervals as at the end of a run. A model that was
exported with a prompt (``prompt.json``) is asked with it. It knows nothing of training, masks or Hydra.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp.atomic import write_json
from atp.commands import grammar
from atp.commands.grammar import argument, option
from atp.commands.places import EMBEDDED, model_source, prompt_folder
from atp.errors import UserError
from atp.export.formats import WEIGHT_DTYPES

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from atp.data.prompt import Prompt
    from atp.data.records import Record
    from atp.evaluate.metrics import Metrics

log = logging.getLogger(__name__)

_SETTINGS = ("data.", "evaluate.")  # names may be written as in a run's settings


@dataclass
class Options:
    """Score a run, an export or any model: the tasks, prompts, metrics and intervals of a run's end."""

    model: str = argument("a run or model directory, a GGUF file, smollm2, a hub id, or 'embedded'")
    task: str = option("", "tasks, comma-separated: casehold, mmlu/<subject>, legal/holding", also=["tasks"])
    path: str = option("", "local files of the tasks: a folder, or a file of a single task")
    records: str = option("", "your own records instead: JSONL, CSV, Parquet or a folder")
    tasks_file: str = option("", "TOML file that describes tasks of your own")
    against: str = option("", "second model, compared on the same items")
    prompt: str = option(
        "auto", "auto (its prompt.json, else an instruct model's chat template), chat, none, or a prompt.json"
    )
    harness: str = option("", "tasks of lm-evaluation-harness, comma-separated")
    harness_path: str = option("", "folder of further task files of the harness")
    max_items: int = option(400, "most records of each task")
    max_length: int = option(0, "tokens of a sequence; 0 takes the context, at most 2048")
    max_new_tokens: int = option(96, "longest generated answer")
    max_generate: int = option(64, "completions to generate per task")
    batch_size: int = option(16, "sequences of a forward pass")
    normalise: str = option("task", "task, tokens, characters or none")
    stride: int = option(0, "tokens by which windows of text move; 0 moves by whole windows")
    bootstrap: int = option(1000, "resamples of the intervals")
    dtype: str = option("float32", ", ".join(WEIGHT_DTYPES))
    seed: int = option(0, "which records, where a task has more or no test records")
    out: str = option("", "JSON file to write; unset only prints")

    def __post_init__(self) -> None:
        for name in ("max_items", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_length", "max_generate", "stride", "bootstrap"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if not (self.task or self.records or self.harness):
            raise UserError("name what to score: task=casehold,billsum, records=<file> or harness=piqa")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Returns:
        0, 2 after a user's mistake, 130 after Ctrl-C.
    """
    return grammar.run_command(Options, _run, argv, name="evaluate", ignored=_SETTINGS)


def parse(arguments: Sequence[str]) -> Options:
    """The options; UserError for what cannot be read, with the nearest option."""
    return grammar.parse(Options, arguments, ignored=_SETTINGS)


def _run(options: Options) -> int:
    import transformers
    from rich.console import Console

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    result = run(options, Console())
    if options.out:
        write_json(Path(options.out), result)
    return 0


def run(options: Options, console: Console) -> dict[str, Any]:
    """Score a model, and another beside it if asked; print the tables.

    Returns:
        ``models``: by name, per task ``values``, ``counts`` and ``intervals``; ``paired`` and ``recovery`` per task
        with a second model; ``harness`` per model if asked.

    Raises:
        UserError: A user's mistake.
    """
    from rich.text import Text

    from atp.commands.score_tables import harness_table, score_table
    from atp.model.stops import stop_ids

    names = [model_source(name) for name in (options.model, options.against) if name]
    sets = _record_sets(options)
    found: dict[str, dict[str, Metrics]] = {}
    result: dict[str, Any] = {"models": {}, "harness": {}, "prompt": {}}
    for name in names:
        model, tokenizer = load(name, options.dtype)
        prompt = prompt_to_ask_with(name, options.prompt, tokenizer, stop_ids(model.generation_config, model.config))
        every = [record for records in sets.values() for record in records]
        cost = prompt.cost(every, tokenizer, _length(model, options))
        result["prompt"][name] = {**prompt.plain(), **cost}
        if not prompt.is_empty:
            console.print(Text(_prompt_line(name, prompt, cost)), soft_wrap=True)
        found[name] = {
            task: _score(model, tokenizer, [prompt.on(record, tokenizer) for record in records], options)
            for task, records in sets.items()
        }
        if options.harness:
            result["harness"][name] = _score_by_harness(model, tokenizer, options)
        result["models"][name] = {
            task: {"values": one.values, "counts": one.counts, "intervals": one.intervals(options.bootstrap)}
            for task, one in found[name].items()
        }
    if options.against:
        result |= _compared(found[names[0]], found[names[1]], options.bootstrap)
    if sets:
        console.print(score_table(names, found, result))
    for name, scored in result["harness"].items():
        console.print(harness_table(name, scored))
    return result


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a directory or the hub; from safetensors and without remote code.

    An adapter beside the weights, of a run with ``export.merge=false``, is added to them.

    Raises:
        ValueError: There is no such model, or the dtype is unknown.
    """
    import torch

    from atp import embedded
    from atp.data.encoding.tokenizer import check_ids, load_tokenizer
    from atp.model.loading import fetched, load_model

    if dtype not in WEIGHT_DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; choose one of {', '.join(WEIGHT_DTYPES)}")
    source = str(embedded.base_dir()) if name == EMBEDDED else name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = load_model(source, dtype=getattr(torch, dtype))
        home = str(fetched(source))
        tokenizer = load_tokenizer(home)
        check_ids(tokenizer, model.config.vocab_size, home)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source}: cannot be loaded ({reason})") from error
    return torch.nn.Module.to(model, device).eval(), tokenizer


def prompt_to_ask_with(
    model_name: str, chosen: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int] = ()
) -> Prompt:
    """Return the prompt to ask with.

    Args:
        model_name: The model.
        chosen: none; chat, the tokenizer's chat template; a ``prompt.json``; or auto, the one beside the model, else an
            instruct model's chat template.
        tokenizer: The model's tokenizer.
        stops: Ids that end its generation.

    Raises:
        UserError: There is no such file, or no chat template.
    """
    from atp.data.encoding.turn import template_of
    from atp.data.prompt import CHAT_NAME, Prompt, prompt_of, read_prompt

    if chosen == "none":
        return Prompt()
    if chosen == "chat":
        template = template_of(tokenizer)
        if template is None:
            raise UserError(f"prompt=chat: the tokenizer of {model_name} has no chat template; use prompt=none")
        return Prompt(CHAT_NAME, chat=template)
    if chosen != "auto":
        if not Path(chosen).exists():
            raise UserError(
                f"prompt={chosen}: no such file; give a prompt.json of a run or of a model, auto, chat or none"
            )
        return read_prompt(Path(chosen))
    return prompt_of(prompt_folder(Path(model_name).expanduser()), tokenizer, stops)


def _record_sets(options: Options) -> dict[str, list[Record]]:
    from atp.data.domains import scored_records
    from atp.data.reading.files import paths_of
    from atp.data.sources import read_records

    sets = {
        name: scored_records(
            name,
            most=options.max_items,
            seed=options.seed,
            path=options.path or None,
            tasks_file=options.tasks_file or None,
        )
        for name in filter(None, (part.strip() for part in options.task.split(",")))
    }
    if options.records:
        sets["records"] = read_records(paths_of(options.records, "records"), most=options.max_items)
    return sets


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], options: Options
) -> Metrics:
    from atp.data.tasks import load_tasks
    from atp.evaluate.quality import evaluate

    by_task = {name: task.normalise for name, task in load_tasks(options.tasks_file or None).items()}
    families = {record.task: by_task.get(record.task.partition("/")[0], "tokens") for record in records}
    return evaluate(
        model,
        tokenizer,
        records,
        max_length=_length(model, options),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        max_generate=options.max_generate,
        normalise=families if options.normalise == "task" else options.normalise,
        stride=options.stride or None,
    )


def _score_by_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, dict[str, float]]:
    from atp.evaluate import harness

    tasks, folder = options.harness.split(","), options.harness_path or None
    return harness.score(model, tokenizer, tasks, folder=folder, batch_size=options.batch_size, limit=options.max_items)


def _length(model: PreTrainedModel, options: Options) -> int:
    return options.max_length or min(2048, int(getattr(model.config, "max_position_embeddings", 2048)))


def _prompt_line(name: str, prompt: Prompt, cost: Mapping[str, float]) -> str:
    from atp.commands.score_tables import title_of

    return (
        f"{title_of(name)}: asked with the prompt {prompt.name!r}, {cost['tokens_added']:g} tokens added per "
        f"record ({100 * cost['share_of_context']:.1f}% of a sequence), of which all begin with "
        f"{cost['shared_prefix_tokens']}, read once; prompt=none leaves it out"
    )


def _compared(of: Mapping[str, Metrics], against: Mapping[str, Metrics], resamples: int) -> dict[str, Any]:
    from atp.evaluate.intervals import paired
    from atp.evaluate.metrics import recovery

    pairs = {
        task: {
            name: pair
            for name, items in metrics.items.items()
            if name in against[task].items
            and (pair := paired(items, against[task].items[name], resamples=resamples)) is not None
        }
        for task, metrics in of.items()
    }
    return {
        "paired": pairs,
        "recovery": {task: recovery(metrics.values, against[task].values) for task, metrics in of.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
