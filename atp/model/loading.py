"""The one way in which models are loaded: bases, exports and runs, for training, evaluation, export and generation.

On top of :class:`atp.model.stored.StoredModel`, which checks a directory before anything is read. Nothing is ever
initialised at random: what the files lack is an error. An adapter beside the weights is added to them. Knows no
configuration, and nothing of masks or training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file, cached_files

from atp.errors import UserError
from atp.model.adapter import ADAPTER_CONFIG, ADAPTER_FOLDER, merge_beside
from atp.model.families import family_of
from atp.model.gguf.base import companions, load_gguf
from atp.model.gguf.packages import gguf_of
from atp.model.odd_places import model_home
from atp.model.stored import StoredModel, tell_once
from atp.model.weight_files import INDEX_FILE, WEIGHTS_FILE

_BESIDE = (
    "generation_config.json",
    f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}",
    f"{ADAPTER_FOLDER}/adapter_model.safetensors",
)
"""What a hub repository may hold besides config and weights, and what changes the model."""


def is_local(source: str) -> bool:
    """Whether a name is a place on this machine rather than a hub id."""
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).expanduser().exists()


def fetched(source: str, revision: str | None = None) -> Path:
    """The directory of a local model, or the cached one of a hub id.

    Args:
        source: A directory, a run directory, a GGUF file (a folder with its config and tokenizer) or a hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: It is no model; the message says what it is and the way out.
        OSError: The hub could not be reached, or gives no access.
    """
    if gguf := gguf_of(source):
        return companions(gguf)
    if is_local(source):
        return model_home(source)
    optional: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    adapter = cached_file(source, ADAPTER_CONFIG, **optional)
    try:
        config = str(cached_file(source, "config.json", revision=revision))
    except OSError:
        if adapter is not None:
            model_home(Path(adapter).parent)  # says what an adapter is and of which base
        raise
    for name in _BESIDE:
        cached_file(source, name, **optional)
    if cached_file(source, WEIGHTS_FILE, **optional) is None:
        index = cached_file(source, INDEX_FILE, **optional)
        if index is None:
            raise UserError(f"{source} has no *.safetensors on the hub; convert it once, or give another revision")
        shards = _shards(Path(index))
        cached_files(source, shards, revision=revision)
    return model_home(Path(config).parent)


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    packed: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Loads a model from its files alone.

    Args:
        source: A directory, a run directory, a GGUF file, a package's name (``smollm2``) or a hub id.
        revision: Branch, tag or commit on the hub.
        dtype: Type of the parameters; by default the stored one, float32 for a GGUF file.
        attn_implementation: The attention kernel, as transformers names it.
        packed: Further arguments of ``from_pretrained`` that quantise the weights while loading.

    Returns:
        The model in evaluation mode, on the CPU unless ``packed`` places it, the adapter beside its weights added.

    Raises:
        UserError: It is no model, or its weights are not exactly those of its config; the message says the way out.
        OSError: The hub could not be reached, or gives no access.
    """
    if gguf := gguf_of(source):
        if packed:
            raise UserError(f"{gguf} is a GGUF file, which is de-quantised; leave model.quantization out")
        return load_gguf(gguf, dtype=dtype or torch.float32, attn_implementation=attn_implementation)
    directory = fetched(source, revision)
    stored = StoredModel(directory)
    stored.check_values()
    if packed and stored.adapter is not None:
        raise UserError(
            f"{directory} carries an adapter, which cannot be merged into packed weights; export it merged, or leave "
            "model.quantization out"
        )
    options: dict[str, Any] = {"config": stored.config, "dtype": dtype or stored.dtype, **(packed or {})}
    options |= {"attn_implementation": _kernel(stored.config, attn_implementation), "output_loading_info": True}
    model, report = _from_plain(directory, options) if stored.is_plain else _from_tensors(stored, options)
    random = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if random or report.get("error_msgs"):
        raise RuntimeError(f"{directory}: weights that were checked were not loaded: {sorted(random)[:4]}")
    if merge_beside(model, directory):
        tell_once(f"{directory}: the adapter beside the weights is merged into them")
    loaded_model: PreTrainedModel = model.eval()
    return loaded_model


def _kernel(config: Any, wanted: str | None) -> str | None:
    """The attention kernel: ``eager`` in place of one that has no cap on scores, where the model has one."""
    if wanted != "sdpa" or not family_of(config).caps_scores(config):
        return wanted
    tell_once("attention: eager in place of sdpa, which does not compute the model's soft cap on scores")
    return "eager"


def _from_plain(directory: Path, options: dict[str, Any]) -> Any:
    """The model and transformers' report, weights mapped from files that hold the model's own names and shapes."""
    return AutoModelForCausalLM.from_pretrained(str(directory), use_safetensors=True, local_files_only=True, **options)


def _from_tensors(stored: StoredModel, options: dict[str, Any]) -> Any:
    """The model and transformers' report, weights under the names that the files should have had."""
    model_class: Any = AutoModelForCausalLM._model_mapping[type(stored.config)]
    state = {name: stored.raw(name) for name in stored.shapes}
    model, report = model_class.from_pretrained(None, state_dict=state, **options)
    if (stored.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(stored.directory), local_files_only=True)
    return model, report


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a valid index of weight files: {error!r}") from error
