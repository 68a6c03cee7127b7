"""Writing a pruned model as a Hugging Face directory.

The end of the flow: takes an ordinary model without masks or adapters, as removal returns it, and leaves a directory
that `from_pretrained` reads: a stock one wherever a stock class holds the widths, otherwise with the modeling file
beside the weights. A directory appears under its name only when it is whole. Knows nothing of how the model was pruned;
what a run wants to record goes in as `card` and `provenance`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from atp.errors import UserError
from atp.export.hf.card import CardFacts, model_card
from atp.export.hf.loading import INDEX_FILE, differences, expected_shapes
from atp.export.hf.tokenizer import save_tokenizer
from atp.loading_lines import load_lines
from atp.model import modeling_atp
from atp.model.adapter import ADAPTER_FOLDER, Adapter
from atp.model.families import family_of, is_stock
from atp.model.widths import layer_widths

logger = logging.getLogger(__name__)

PROVENANCE_FILE = "atp_provenance.json"


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        directory: Where the model is.
        architecture: Name of the model class.
        stock: Whether transformers itself has that class.
        parameters: Number of parameters.
        weight_bytes: Size of the safetensors files.
        load_lines: The two lines of Python that load it.
    """

    directory: Path
    architecture: str
    stock: bool
    parameters: int
    weight_bytes: int
    load_lines: str


def export_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: str | Path,
    *,
    card: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    adapter: Adapter | None = None,
) -> ExportResult:
    """Writes a model and everything needed to load it.

    The files are written to a hidden sibling directory which then takes the target's name, so that a failure of any
    kind leaves neither a half-written target nor leftovers, and an earlier export survives a failed overwrite.

    Args:
        model: A dense or pruned model of a supported family, adapters merged.
        tokenizer: Its tokenizer; None leaves it out, with a warning.
        output_dir: Target directory.
        card: Text of README.md; by default a card with the widths and how to load.
        provenance: What made the model; any JSON values.
        overwrite: Replace the model directory that is already there.
        dtype: Type to store; by default the model's own.
        max_shard_size: Largest size of one weight file, in bytes or as text such as "5GB".
        adapter: A LoRA adapter for the model, stored beside its weights instead of being merged into them.

    Returns:
        What was written.

    Raises:
        ValueError: If the target is in use, or the model is not one that the written config describes.
        OSError: If the disk is full or the target cannot be written.
    """
    target = Path(output_dir).expanduser().resolve()
    check_target(target, overwrite)
    tensors = _checked_tensors(model)
    dtype = dtype or model.dtype
    config = _written_config(model, dtype)
    texts = _written_texts(config, target.name, card, provenance or {}, adapter is not None)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    _check_space(target, parameters * dtype.itemsize)
    with appearing_whole(target) as stage:
        _write_weights(tensors, stage, dtype, max_shard_size)
        if adapter is not None:
            adapter.save(stage / ADAPTER_FOLDER)
        for name, text in texts.items():
            (stage / name).write_text(text, encoding="utf-8")
        config.to_json_file(stage / "config.json")
        _write_companions(model, tokenizer, stage)
        _finish_weights(stage)
    return ExportResult(
        directory=target,
        architecture=_architecture(config),
        stock=is_stock(config),
        parameters=parameters,
        weight_bytes=sum(path.stat().st_size for path in target.glob("*.safetensors")),
        load_lines=load_lines(output_dir, is_stock(config), adapter=adapter is not None),
    )


def digest(file: Path) -> str:
    """SHA-256 of a file, by which verification knows weights that changed after the export."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _finish_weights(stage: Path) -> None:
    """Makes weights as readable as the other files, and adds their digests to the provenance."""
    weights = sorted(stage.rglob("*.safetensors"))
    for file in weights:  # written readable for their owner only
        shutil.copymode(stage / "config.json", file)
    facts = json.loads((stage / PROVENANCE_FILE).read_text(encoding="utf-8"))
    facts["sha256"] = {file.relative_to(stage).as_posix(): digest(file) for file in weights}
    (stage / PROVENANCE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def check_target(target: Path, overwrite: bool, marker: str = "config.json") -> None:
    """Refuses a target directory that is in use; only one that holds `marker` is ever replaced.

    Raises:
        ValueError: The target is a file, or holds something.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"output directory {target} is a file; choose another path")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"output directory {target} is not empty; pass overwrite=True (--overwrite) or choose another path"
        )
    if not (target / marker).is_file():
        raise UserError(
            f"output directory {target} is not a model directory (no {marker}), so it will not be replaced; "
            "empty it yourself or choose another path"
        )


def _checked_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors to store, once they are known to be what the model's config describes."""
    family = family_of(model.config)
    tensors = dict(model.state_dict())
    if any(".lora_" in name or ".base_layer." in name for name in tensors):
        raise UserError("the model still carries LoRA adapters; merge them first (merge_and_unload)")
    if any(tensor.is_meta for tensor in tensors.values()):
        raise UserError("the model has tensors without data (meta device); load its weights first")
    if model.config.tie_word_embeddings:
        embeddings, head = tensors[f"{family.embeddings}.weight"], tensors.pop(f"{family.head}.weight")
        if head.data_ptr() != embeddings.data_ptr() and not torch.equal(head, embeddings):
            raise UserError(
                "config.tie_word_embeddings is set, but the output head and the embeddings differ, and only one would "
                "be stored; set config.tie_word_embeddings=False to keep both"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if problems := differences(expected_shapes(model.config), shapes):
        raise UserError(f"the model's tensors are not those of its config, so it could not be loaded: {problems}")
    return tensors


def _written_config(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    vars(config).pop("auto_map", None)
    if not is_stock(config):
        config.auto_map = _auto_map(config.model_type)
    return config


def _auto_map(model_type: str) -> dict[str, str]:
    """Which classes of the modeling file beside the weights the Auto classes take."""
    config_class = modeling_atp.CONFIG_CLASSES[model_type]
    classes = {"AutoConfig": config_class}
    for auto, of in (("AutoModel", modeling_atp.BASE_CLASSES), ("AutoModelForCausalLM", modeling_atp.MODEL_CLASSES)):
        classes[auto] = next(model_class for model_class in of if model_class.config_class is config_class)
    return {auto: f"modeling_atp.{found.__name__}" for auto, found in classes.items()}


def _architecture(config: PreTrainedConfig) -> str:
    return str((config.architectures or ["unknown"])[0])


def _written_texts(
    config: PreTrainedConfig, title: str, card: str | None, provenance: Mapping[str, Any], adapter: bool
) -> dict[str, str]:
    """The text files of an export, by name; made first, so that a mistake shows before any weights are written."""
    stock, widths = is_stock(config), layer_widths(config)
    facts = {
        "format": 1,
        "architecture": _architecture(config),
        "dtype": str(config.dtype).removeprefix("torch."),
        "widths": [asdict(layer) for layer in widths],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "run": dict(provenance),
    }
    try:
        texts = {PROVENANCE_FILE: json.dumps(facts, indent=2, allow_nan=False) + "\n"}
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance must hold plain JSON values: {error}") from error
    files = [f"{ADAPTER_FOLDER}/adapter_config.json"] if adapter else []
    own = CardFacts(title=title, architecture=_architecture(config), stock=stock, widths=widths, files=files)
    texts["README.md"] = card or model_card(own)
    if not stock:
        texts["modeling_atp.py"] = Path(modeling_atp.__file__).read_text(encoding="utf-8")
    return texts


def _write_weights(
    tensors: Mapping[str, torch.Tensor], stage: Path, dtype: torch.dtype, max_shard_size: int | str
) -> None:
    """Writes one shard after the other, so that at most one shard is held twice."""
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for filename, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(shard, stage / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (stage / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_companions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, stage: Path) -> None:
    """Writes what generation needs beside the weights."""
    _write_generation_config(model, stage)
    if tokenizer is None:
        logger.warning("no tokenizer given: the exported directory will hold none")
    else:
        save_tokenizer(tokenizer, stage)


def _write_generation_config(model: PreTrainedModel, stage: Path) -> None:
    if model.generation_config is None:
        return
    try:
        model.generation_config.save_pretrained(str(stage))
    except ValueError as error:
        # Some published models carry settings that contradict each other; they are kept as they are.
        logger.warning("the generation config is not consistent, stored unchanged: %s", error)
        model.generation_config.to_json_file(str(stage / "generation_config.json"))


def _check_space(target: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in target.parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise OSError(
            f"the weights need {needed_bytes / 2**20:.0f} MiB, but {existing} has {free_bytes / 2**20:.0f} MiB free; "
            "nothing was written. Free some space or choose another output directory"
        )


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """Gives a directory to write to, which becomes `target` at the end or disappears."""
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    stage = target.parent / f".{target.name}.partial-{token}"
    previous = target.parent / f".{target.name}.previous-{token}"
    try:
        stage.mkdir()
        yield stage
        if target.exists():
            os.rename(target, previous)
        os.rename(stage, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write the model to {target}: {error}; nothing was left there") from error
    finally:
        if previous.exists() and not target.exists():
            os.rename(previous, target)
        for leftover in (stage, previous):
            shutil.rmtree(leftover, ignore_errors=True)
