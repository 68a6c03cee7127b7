"""``python -m atp.evaluate <model directory> task=casehold,billsum``: score any model, pruned by us or not.

What users compare with: the same tasks, prompts, metrics and intervals as at the end of a run. A model that was
exported with a prompt (``prompt.json``) is asked with it. It knows nothing of training, masks or Hydra.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atp import embedded
from atp.atomic import write_json
from atp.data.domains import scored_records
from atp.data.prompt import Prompt, read_prompt
from atp.data.reading.files import paths_of
from atp.data.records import Record
from atp.data.sources import read_records
from atp.data.tasks import load_tasks
from atp.errors import UserError
from atp.evaluate import harness
from atp.evaluate.intervals import paired
from atp.evaluate.metrics import Metrics, recovery
from atp.evaluate.quality import evaluate
from atp.masks.adapter import merge_beside
from atp.model import modeling_atp

log = logging.getLogger(__name__)

USAGE = """\
python -m atp.evaluate <model or run directory, hub id, or 'embedded'> [name=value ...]
"""


@dataclass
class Options:
    """What the command line takes; each field's help stands beside it."""

    task: str = field(default="", metadata={"help": "tasks, comma-separated: casehold, mmlu/<subject>, legal/holding"})
    path: str = field(default="", metadata={"help": "local files of the tasks: a folder, or a file of a single task"})
    records: str = field(default="", metadata={"help": "your own records instead: JSONL, CSV, Parquet or a folder"})
    tasks_file: str = field(default="", metadata={"help": "TOML file that describes tasks of your own"})
    against: str = field(default="", metadata={"help": "second model, compared on the same items"})
    prompt: str = field(default="auto", metadata={"help": "auto (the model's own prompt.json), none, or a prompt.json"})
    harness: str = field(default="", metadata={"help": "tasks of lm-evaluation-harness, comma-separated"})
    harness_path: str = field(default="", metadata={"help": "folder of further task files of the harness"})
    max_items: int = field(default=400, metadata={"help": "most records of each task"})
    max_length: int = field(default=0, metadata={"help": "tokens of a sequence; 0 takes the context, at most 2048"})
    max_new_tokens: int = field(default=96, metadata={"help": "longest generated answer"})
    max_generate: int = field(default=64, metadata={"help": "completions to generate per task"})
    batch_size: int = field(default=16, metadata={"help": "sequences of a forward pass"})
    normalise: str = field(default="task", metadata={"help": "task, tokens, characters or none"})
    stride: int = field(default=0, metadata={"help": "tokens by which windows of text move; 0 moves by whole windows"})
    bootstrap: int = field(default=1000, metadata={"help": "resamples of the intervals"})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16"})
    seed: int = field(default=0, metadata={"help": "which records, where a task has more or no test records"})
    out: str = field(default="", metadata={"help": "JSON file to write; unset only prints"})


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Raises:
        SystemExit: With 2 after a user's mistake.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(_help())
        return
    try:
        model_name, options = parse(arguments)
        result = run(model_name, options, Console())
        if options.out:
            write_json(Path(options.out), result)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def parse(arguments: Sequence[str]) -> tuple[str, Options]:
    """Return the model and the options; ValueError for what cannot be read, with the nearest option."""
    models = [argument for argument in arguments if "=" not in argument]
    if len(models) != 1:
        raise UserError(f"give one model directory, got {models or 'none'}; the second one as against=<directory>")
    known = {item.name: item for item in fields(Options)}
    options = Options()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = name.removeprefix("data.").removeprefix("evaluate.")
        name = "task" if name == "tasks" else name
        if not equals:
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"there is no option {name!r}; {hint}(known: {', '.join(known)})")
        if isinstance(known[name].default, int):
            try:
                setattr(options, name, int(value))
            except ValueError:
                raise UserError(f"{name}={value!r} must be a whole number") from None
        else:
            setattr(options, name, value)
    for name in ("max_items", "max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be at least 1")
    for name in ("max_length", "max_generate", "stride", "bootstrap"):
        if getattr(options, name) < 0:
            raise UserError(f"{name}={getattr(options, name)} must not be negative")
    if not (options.task or options.records or options.harness):
        raise UserError("name what to score: task=casehold,billsum, records=<file> or harness=piqa")
    return models[0], options


def run(model_name: str, options: Options, console: Console) -> dict[str, Any]:
    """Score a model, and another beside it if asked; print the tables.

    Returns:
        ``models``: by name, per task ``values``, ``counts`` and ``intervals``; ``paired`` and ``recovery`` per task
        with a second model; ``harness`` per model if asked.

    Raises:
        ValueError: A user's mistake.
    """
    names = [_model_folder(name) for name in (model_name, options.against) if name]
    sets = _record_sets(options)
    found: dict[str, dict[str, Metrics]] = {}
    result: dict[str, Any] = {"models": {}, "harness": {}, "prompt": {}}
    for name in names:
        model, tokenizer = load(name, options.dtype)
        prompt = load_prompt(name, options.prompt)
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
            tasks, folder = options.harness.split(","), options.harness_path or None
            result["harness"][name] = harness.score(
                model, tokenizer, tasks, folder=folder, batch_size=options.batch_size, limit=options.max_items
            )
        result["models"][name] = {
            task: {"values": one.values, "counts": one.counts, "intervals": one.intervals(options.bootstrap)}
            for task, one in found[name].items()
        }
    if options.against:
        result |= _compared(found[names[0]], found[names[1]], options.bootstrap)
    if sets:
        console.print(_table(names, found, result))
    for name, scored in result["harness"].items():
        console.print(_harness_table(name, scored))
    return result


def _model_folder(name: str) -> str:
    """The exported model of a run directory; anything else as it is."""
    pruned = Path(name).expanduser() / "pruned"
    return str(pruned) if (pruned / "config.json").is_file() else name


def load(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a directory or the hub; from safetensors and without remote code.

    An adapter beside the weights, of a run with ``export.merge=false``, is added to them.

    Raises:
        ValueError: There is no such model, or the dtype is unknown.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype!r} is unknown; choose one of {', '.join(dtypes)}")
    source = str(embedded.base_dir()) if name == "embedded" else name
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not Path(source).expanduser().is_dir():
        raise UserError(f"{source}: no such directory; give one with config.json, tokenizer and *.safetensors")
    modeling_atp.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        path = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtypes[dtype], use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source}: cannot be loaded ({reason})") from error
    if merge_beside(model, path):
        log.warning("%s: the adapter beside the weights is merged into them", path)
    return torch.nn.Module.to(model, device).eval(), tokenizer


def load_prompt(model_name: str, chosen: str) -> Prompt:
    """Return the prompt to ask with: none, a ``prompt.json``, or for ``auto`` the one beside the model, if any."""
    if chosen == "none":
        return Prompt()
    if chosen != "auto":
        if not Path(chosen).exists():
            raise UserError(f"prompt={chosen}: no such file; give a prompt.json of a run or of a model, auto, or none")
        return read_prompt(Path(chosen))
    folder = Path(model_name).expanduser()
    return read_prompt(folder) if folder.is_dir() else Prompt()


def _record_sets(options: Options) -> dict[str, list[Record]]:
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


def _length(model: PreTrainedModel, options: Options) -> int:
    return options.max_length or min(2048, int(getattr(model.config, "max_position_embeddings", 2048)))


def _prompt_line(name: str, prompt: Prompt, cost: Mapping[str, float]) -> str:
    return (
        f"{_title(name)}: asked with the prompt {prompt.name!r}, {cost['tokens_added']:g} tokens added per "
        f"record ({100 * cost['share_of_context']:.1f}% of a sequence), of which all begin with "
        f"{cost['shared_prefix_tokens']}, read once; prompt=none leaves it out"
    )


def _compared(of: Mapping[str, Metrics], against: Mapping[str, Metrics], resamples: int) -> dict[str, Any]:
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


def _table(names: Sequence[str], found: Mapping[str, Mapping[str, Metrics]], result: Mapping[str, Any]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        caption=Text("± half of the 95% bootstrap interval over items"),
    )
    table.add_column("metric", no_wrap=True)
    for name in names:
        table.add_column(Text(_title(name)), justify="right", overflow="fold")
    table.add_column("over", justify="right")
    if len(names) > 1:
        table.add_column("difference", justify="right")
        table.add_column("recovery", justify="right")
    for task, metrics in found[names[0]].items():
        table.add_row(Text(task, style="bold"))
        for key in metrics.values:
            if key == "perplexity" and sum(name.endswith("/perplexity") for name in metrics.values) == 1:
                continue  # the task's own says the same
            cells = [_with_interval(found[name][task].values[key], result["models"][name][task], key) for name in names]
            label = f"  {key.rpartition('/')[2] if key.partition('/')[0] in task else key}"
            row = [label, *cells, f"{metrics.counts[key]:,}"]
            if len(names) > 1:
                pair = result["paired"][task].get(key)
                row.append("" if pair is None else f"{pair['difference']:+.3g} ± {pair['half_width']:.2g}")
                kept = result["recovery"][task].get(key)
                row.append("" if kept is None else f"{kept:.1f}%")
            table.add_row(*map(Text, row))
    return table


def _title(name: str) -> str:
    """What to call a model: its folder, or its run where the folder is the run's ``pruned``."""
    path = Path(name)
    return path.parent.name if path.name == "pruned" and path.parent.name else path.name or name


def _with_interval(value: float, scored: Mapping[str, Any], key: str) -> str:
    bounds = scored["intervals"].get(key)
    return f"{value:.4g}" + (f" ± {(bounds[1] - bounds[0]) / 2:.2g}" if bounds else "")


def _harness_table(name: str, scored: Mapping[str, Mapping[str, float]]) -> Table:
    title = Text(f"lm-evaluation-harness: {_title(name)}")
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, caption=Text("± standard error"))
    for column in ("task", "metric", "value"):
        table.add_column(column)
    for task, figures in scored.items():
        for metric in (name for name in figures if not name.endswith("_stderr")):
            error = figures.get(f"{metric}_stderr")
            told = f"{figures[metric]:.0f}" if metric == "items" else f"{figures[metric]:.4f}"
            table.add_row(task, metric, told + (f" ± {error:.4f}" if error is not None else ""))
    return table


def _help() -> str:
    lines = [f"    {item.name:<16} {item.metadata['help']} [{item.default}]" for item in fields(Options)]
    return "\n".join([USAGE, *lines, ""])


if __name__ == "__main__":
    main()
