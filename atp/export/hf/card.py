"""The model card (README.md) of a pruned model: Hub metadata, what was removed, figures, how to load, limitations.

Typed facts in, Markdown out, through the Hub's own `ModelCard` and ``templates/card.md.j2``, which holds the wording.
It reads no run directory and no model, so that the pipeline, a later export and a test can all call it. Sits below
export, which writes its result beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from atp.export.formats import FORMATS
from atp.export.vllm.plugin import OLDEST, refusal
from atp.loading_lines import load_lines, vllm_line
from atp.model.widths import LayerWidths

BAR_LENGTH = 12
_HERE = "path/to/this/directory"
_TEMPLATE = Path(__file__).parent / "templates" / "card.md.j2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Identifiers that the Hub accepts in the `license` field and that models of these families carry.
_HUB_LICENSES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "unlicense"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "other"),
        *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
    }
)
_WIDTH_COLUMNS = ("layer", "query heads", "KV heads", "FFN channels")
_SLIM_COLUMNS = ("query/key dims", "value dims")
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
        chat: Whether prompts went through the tokenizer's chat template.
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
    chat: bool = False
    files: Sequence[str] = ()
    checks: Sequence[Mapping[str, Any]] = ()


def model_card(facts: CardFacts) -> str:
    """Writes the model card: Markdown with a YAML header."""
    adapter = any(PurePath(file).match(FORMATS["adapter"].pattern) for file in facts.files)
    slim = any(layer.is_slim for layer in facts.widths)
    content = {
        "title": facts.title,
        "summary": _summary(facts),
        "sizes": _sizes(facts),
        "width_scale": "base model" if facts.dense_widths else "widest layer",
        "width_columns": _WIDTH_COLUMNS + (_SLIM_COLUMNS if slim else ()),
        "width_rows": _width_rows(facts.widths, facts.dense_widths, slim),
        **_quality(facts.metrics or {}, facts.recovery or {}),
        "stock": facts.stock,
        "architecture": facts.architecture,
        "has_adapter": adapter,
        "load_lines": load_lines(_HERE, facts.stock, adapter=adapter),
        **_serving(facts, adapter),
        "further_formats": _further_formats(facts.files),
        "prompt": facts.prompt,
        "chat": facts.chat,
        "fence": "`" * max(3, 1 + max((len(run) for run in re.findall("`+", facts.prompt or "")), default=0)),
        "check_rows": _check_rows(facts.checks),
        "limitations": (*facts.limitations, *GENERAL_LIMITATIONS),
    }
    return ModelCard.from_template(_metadata(facts), template_path=str(_TEMPLATE), **content).content + "\n"


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


def _metadata(facts: CardFacts) -> ModelCardData:
    license_id, base_model = facts.license_id, facts.base_model
    known = license_id is None or license_id.lower() in _HUB_LICENSES
    own_tags = ["pruning", "structured-pruning", "atp", *facts.tags, *([] if facts.stock else ["custom_code"])]
    return ModelCardData(
        language=facts.language,
        license=license_id.lower() if license_id and known else ("other" if license_id else None),
        license_name=None if known else re.sub(r"[^a-z0-9.-]+", "-", str(license_id).lower()).strip("-"),
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        datasets=[name for name in facts.datasets if _is_hub_id(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(own_tags)),
    )


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _summary(facts: CardFacts) -> str:
    name = "its base model"
    if facts.base_model:
        name = f"`{facts.base_model if _is_hub_id(facts.base_model) else Path(facts.base_model).name}`"
    data = f", for {', '.join(facts.datasets)}" if facts.datasets else ""
    text = f"Attention heads and FFN channels of {name} have been removed for good{data}."
    return f"{text} {facts.method}" if facts.method else text


def _sizes(facts: CardFacts) -> list[tuple[str, str]]:
    rows = []
    if facts.block_sparsity is not None:
        aim = "" if facts.target_sparsity is None else f" (target {facts.target_sparsity:.2%})"
        rows.append(("removed, of decoder-block parameters", f"{facts.block_sparsity:.2%}{aim}"))
    if facts.model_sparsity is not None:
        rows.append(("removed, of all parameters", f"{facts.model_sparsity:.2%}"))
    if facts.parameters is not None:
        of_dense = "" if facts.dense_parameters is None else f" of {facts.dense_parameters:,}"
        rows.append(("parameters", f"{facts.parameters:,}{of_dense}"))
    return rows


def _width_rows(widths: Sequence[LayerWidths], dense: Sequence[LayerWidths] | None, slim: bool) -> list[list[str]]:
    """One row a layer; ``slim`` adds the dimensions left inside heads."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    # not as LayerWidths: the widest counts may stem from different layers and fit no layer together
    widest = SimpleNamespace(**{name: max(getattr(layer, name) for layer in widths) for name in names})
    scale: Sequence[Any] = dense or [widest] * len(widths)
    rows = []
    for index, (kept, full) in enumerate(zip(widths, scale, strict=True)):
        cells = [
            str(index),
            _bar(kept.num_attention_heads, full.num_attention_heads),
            f"{kept.num_key_value_heads} / {full.num_key_value_heads}",
            _bar(kept.intermediate_size, full.intermediate_size),
        ]
        if slim:
            pairs = kept.head_dim // 2 if kept.rotary_pairs is None else len(kept.rotary_pairs)
            cells += [f"{2 * pairs} / {kept.head_dim}", f"{kept.value_dim or kept.head_dim} / {kept.head_dim}"]
        rows.append(cells)
    return rows


def _bar(kept: int, full: int) -> str:
    filled = round(BAR_LENGTH * kept / full) if full else 0
    return f"`{'█' * filled}{'░' * (BAR_LENGTH - filled)}` {kept} / {full}"


def _quality(metrics: Mapping[str, Mapping[str, float]], recovery: Mapping[str, float]) -> dict[str, Any]:
    """One row a metric, one column a model."""
    models = list(metrics)
    rows = []
    for name in dict.fromkeys(name for model in models for name in metrics[model]):
        cells = [name, *(f"{metrics[model][name]:.4g}" if name in metrics[model] else "" for model in models)]
        if recovery:
            cells.append(f"{recovery[name]:.1f}%" if name in recovery else "")
        rows.append(cells)
    titles = [_COLUMN_TITLES.get(model, model) for model in models] + (["recovery"] if recovery else [])
    return {"quality_columns": ["metric", *titles], "quality_rows": rows, "has_recovery": bool(recovery)}


def _serving(facts: CardFacts, adapter: bool) -> dict[str, str]:
    """Whether vLLM serves the directory, and how."""
    if reason := refusal(facts.widths):
        return {"vllm_refusal": reason}
    how = "vLLM"
    if not facts.stock:
        full = all(layer.has_attention for layer in facts.widths)
        without = "or `--trust-remote-code` without it" if full else "which layers without attention need"
        how += f" {'.'.join(map(str, OLDEST))} or newer, with the `atp` package beside it, {without}"
    return {"vllm": how, "vllm_line": vllm_line(_HERE, adapter=adapter)}


def _further_formats(files: Sequence[str]) -> list[dict[str, Any]]:
    """How files of the formats beside the directory itself are opened."""
    shown = []
    for form in FORMATS.values():
        mine = [file for file in files if form.loading and PurePath(file).match(form.pattern)]
        if mine and form.loading:
            remark = form.remark.format(file=mine[0])
            lines = [form.loading(file) for file in mine]
            shown.append({"read_by": form.read_by, "language": form.language, "lines": lines, "remark": remark})
    return shown


def _check_rows(checks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What verification found, each format in a process of its own; those that were not run are left out."""
    return [
        [check["format"], f"{check['size_bytes'] / 2**20:.1f}", f"{check['max_abs']:.2g}", f"{check['top1']:.2%}"]
        for check in checks
        if check.get("top1") is not None and check.get("max_abs") is not None
    ]
