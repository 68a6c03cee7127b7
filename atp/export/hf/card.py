"""The model card (README.md) of a pruned model: Hub metadata, what was removed, figures, how to load, limitations.

Plain text made from typed arguments: it reads no run directory and no model, so that the pipeline, a later export and a
test can all call it. Sits below export, which writes its result beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache

from atp.loading_lines import load_lines
from atp.model.widths import LayerWidths

BAR_LENGTH = 12
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Identifiers that the Hub accepts in the `license` field and that models of these families carry.
_HUB_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "unlicense"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "other"),
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
    }
)
_COLUMN_TITLES = {"dense": "dense", "dense_lora": "dense + LoRA", "pruned": "pruned"}

GENERAL_LIMITATIONS = (
    "Pruned for the data it was tuned on: on text of other kinds it has lost more.",
    "It inherits the biases and the knowledge cut-off of its base model; removing weights does not remove them.",
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says.

    Attributes:
        title: Heading of the card.
        architecture: Name of the model class.
        stock: Whether the class is part of transformers, so that loading needs no code from the directory.
        widths: Widths of every layer.
        dense_widths: Widths of the base model; the scale of the bars. Without it the largest kept width is the scale.
        base_model: Hub id or path of the base model. Paths are shown by their last part and kept out of the metadata.
        license_id: Licence of the base model, as the Hub spells it; see :func:`base_license`.
        datasets: Data the model was tuned on; Hub ids also go into the metadata.
        tags: More Hub tags.
        language: Language of the data, as a two-letter code.
        method: One sentence on how the architecture was found.
        target_sparsity: Fraction of decoder-block parameters that was to be removed.
        block_sparsity: Fraction of decoder-block parameters that was removed.
        model_sparsity: Fraction of all parameters that was removed.
        parameters: Parameters left.
        dense_parameters: Parameters of the base model.
        metrics: Model (dense, dense_lora, pruned, ...) -> metric -> value.
        recovery: Metric -> percent of the dense + LoRA model's value.
        limitations: Sentences added to the general limitations.
        prompt: What stood before or around prompts when it was evaluated, and should when it is used.
        files: Files of further formats, relative to the directory: adapter, GGUF, ONNX.
        checks: What verification found of each format, as JSON values.
    """

    title: str
    architecture: str
    stock: bool
    widths: Sequence[LayerWidths]
    dense_widths: Sequence[LayerWidths] | None = None
    base_model: str | None = None
    license_id: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    language: str = "en"
    method: str | None = None
    target_sparsity: float | None = None
    block_sparsity: float | None = None
    model_sparsity: float | None = None
    parameters: int | None = None
    dense_parameters: int | None = None
    metrics: Mapping[str, Mapping[str, float]] | None = None
    recovery: Mapping[str, float] | None = None
    limitations: Sequence[str] = ()
    prompt: str | None = None
    files: Sequence[str] = ()
    checks: Sequence[Mapping[str, Any]] = ()


def model_card(facts: CardFacts) -> str:
    """Writes the model card: Markdown with a YAML header."""
    limitations = "\n".join(f"- {line}" for line in (*facts.limitations, *GENERAL_LIMITATIONS))
    sections = [
        _header(facts),
        f"# {facts.title}\n\n{_summary(facts)}",
        _sparsity(facts),
        _widths_table(facts.widths, facts.dense_widths),
        _metrics_table(facts.metrics or {}, facts.recovery or {}),
        _loading(facts.architecture, facts.stock, facts.files),
        _prompt(facts.prompt),
        _checks_table(facts.checks),
        f"## Limitations\n\n{limitations}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def base_license(base_model: str | Path) -> str | None:
    """Finds the licence of the base model in its model card, on disk only.

    Args:
        base_model: A directory, or a Hub id whose files are in the local cache.

    Returns:
        The identifier, or None where no card or no licence is found.
    """
    card: str | Path | object | None = Path(base_model) / "README.md"
    if not Path(base_model).is_dir():
        is_id = _HUB_ID.fullmatch(str(base_model))
        card = try_to_load_from_cache(str(base_model), "README.md") if is_id else None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    metadata = metadata_load(card) or {}
    name = metadata.get("license_name") if metadata.get("license") == "other" else metadata.get("license")
    return str(name) if name else None


def _header(facts: CardFacts) -> str:
    license_id, base_model = facts.license_id, facts.base_model
    known = license_id is None or license_id.lower() in _HUB_LICENSES
    own_tags = ["pruning", "structured-pruning", "atp", *facts.tags, *([] if facts.stock else ["custom_code"])]
    data = ModelCardData(
        language=facts.language,
        license=license_id.lower() if license_id and known else ("other" if license_id else None),
        license_name=None if known else re.sub(r"[^a-z0-9.-]+", "-", str(license_id).lower()).strip("-"),
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        datasets=[name for name in facts.datasets if _is_hub_id(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(own_tags)),
    )
    return f"---\n{data.to_yaml()}\n---"


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _summary(facts: CardFacts) -> str:
    name = "its base model"
    if facts.base_model:
        name = f"`{facts.base_model if _is_hub_id(facts.base_model) else Path(facts.base_model).name}`"
    data = f", for {', '.join(facts.datasets)}" if facts.datasets else ""
    text = f"Attention heads and FFN channels of {name} have been removed for good{data}."
    return f"{text} {facts.method}" if facts.method else text


def _sparsity(facts: CardFacts) -> str:
    rows = []
    if facts.block_sparsity is not None:
        aim = "" if facts.target_sparsity is None else f" (target {facts.target_sparsity:.2%})"
        rows.append(f"| removed, of decoder-block parameters | {facts.block_sparsity:.2%}{aim} |")
    if facts.model_sparsity is not None:
        rows.append(f"| removed, of all parameters | {facts.model_sparsity:.2%} |")
    if facts.parameters is not None:
        of_dense = "" if facts.dense_parameters is None else f" of {facts.dense_parameters:,}"
        rows.append(f"| parameters | {facts.parameters:,}{of_dense} |")
    if not rows:
        return ""
    note = "Decoder-block parameters leave out embeddings, the output head and norms."
    return "\n".join(["## Size", "", "| | |", "|---|---|", *rows, "", note])


def _widths_table(widths: Sequence[LayerWidths], dense: Sequence[LayerWidths] | None) -> str:
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    # not as LayerWidths: the widest counts may stem from different layers and fit no layer together
    widest = SimpleNamespace(**{name: max(getattr(layer, name) for layer in widths) for name in names})
    scale: Sequence[Any] = dense or [widest] * len(widths)
    slim = any(layer.is_slim for layer in widths)
    lines = [
        "## Widths per layer",
        "",
        f"Each as kept / {'base model' if dense else 'widest layer'}.",
        "",
        "| layer | query heads | KV heads | FFN channels |" + " query/key dims | value dims |" * slim,
        "|---|---|---|---|" + "---|---|" * slim,
    ]
    for index, (kept, full) in enumerate(zip(widths, scale, strict=True)):
        cells = [
            _bar(kept.num_attention_heads, full.num_attention_heads),
            f"{kept.num_key_value_heads} / {full.num_key_value_heads}",
            _bar(kept.intermediate_size, full.intermediate_size),
        ]
        if slim:
            pairs = kept.head_dim // 2 if kept.rotary_pairs is None else len(kept.rotary_pairs)
            cells += [f"{2 * pairs} / {kept.head_dim}", f"{kept.value_dim or kept.head_dim} / {kept.head_dim}"]
        lines.append(f"| {index} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bar(kept: int, full: int) -> str:
    filled = round(BAR_LENGTH * kept / full) if full else 0
    return f"`{'█' * filled}{'░' * (BAR_LENGTH - filled)}` {kept} / {full}"


def _metrics_table(metrics: Mapping[str, Mapping[str, float]], recovery: Mapping[str, float]) -> str:
    columns = list(metrics)
    names = list(dict.fromkeys(name for column in columns for name in metrics[column]))
    if not names:
        return ""
    titles = [_COLUMN_TITLES.get(column, column) for column in columns] + (["recovery"] if recovery else [])
    lines = ["## Quality", "", f"| metric | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name in names:
        cells = [f"{metrics[column][name]:.4g}" if name in metrics[column] else "" for column in columns]
        if recovery:
            cells.append(f"{recovery[name]:.1f}%" if name in recovery else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = "Recovery is relative to the unpruned base model with LoRA tuned on the same data for the same steps."
    return "\n".join([*lines, *(["", note] if recovery else [])])


def _loading(architecture: str, stock: bool, files: Sequence[str]) -> str:
    if stock:
        why = f"Every layer has the same widths, so this is an ordinary `{architecture}`: no custom code is involved."
    else:
        why = (
            "Layers differ in width, which no stock class can hold: `modeling_atp.py` beside the weights builds each "
            "layer from transformers' own `per_layer_config` (transformers 5.15 or newer). `trust_remote_code=True` "
            "runs that file; with the `atp` package imported the flag is not needed."
        )
    adapter = any(file.startswith("adapter/") for file in files)
    if adapter:
        why += " The weights are the pruned base; the tuned adapter lies beside them."
    lines = ["```python", load_lines("path/to/this/directory", stock, adapter=adapter), "```"]
    return "\n".join(["## How to load", "", why, "", *lines, *_other_engines(files)])


def _other_engines(files: Sequence[str]) -> list[str]:
    """How the further formats are opened."""
    lines: list[str] = []
    if gguf := [file for file in files if file.endswith(".gguf")]:
        lines += ["", "llama.cpp:", "", "```bash", *(f'llama-cli -m {file} -p "..."' for file in gguf), "```"]
    if graphs := [file for file in files if file.endswith(".onnx")]:
        inputs = "`input_ids`, `attention_mask` and the `past_*` of every layer (length 0 at first)"
        lines += ["", f"onnxruntime: `{graphs[0]}` takes {inputs} and gives `logits` and the `present_*` to pass on."]
    return lines


def _checks_table(checks: Sequence[Mapping[str, Any]]) -> str:
    """What verification found, each format in a process of its own."""
    run = [check for check in checks if check.get("top1") is not None and check.get("max_abs") is not None]
    if not run:
        return ""
    rows = [
        f"| {check['format']} | {check['size_bytes'] / 2**20:.1f} | {check['max_abs']:.2g} | {check['top1']:.2%} |"
        for check in run
    ]
    head = ["| format | size, MiB | largest logit difference | same likeliest token |", "|---|---|---|---|"]
    return "\n".join(
        ["## Formats", "", "Each loaded by itself and compared with the model that was trained.", "", *head, *rows]
    )


def _prompt(prompt: str | None) -> str:
    if not prompt:
        return ""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", prompt)), default=0))
    told = (
        "The figures above were measured with this around each prompt (a Jinja template; `prompt.json` holds it all):"
    )
    return f"## Prompt\n\n{told}\n\n{fence}\n{prompt}\n{fence}"
