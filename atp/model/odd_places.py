"""What people hand over instead of a model directory, recognised before anything is read, with the way out of each.

Beside the loading of models, which asks here first: a file in another format, an adapter, a run, a quantised or half
copied checkpoint. Looks at names of files and at ``config.json``, never at weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atp.errors import UserError

ADAPTER_FOLDER, ADAPTER_CONFIG = "adapter", "adapter_config.json"
LFS_POINTER = b"version https://git-lfs"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CONVERT = (
    "`AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)`, if you trust the file: a pickle "
    "can run code when it is opened"
)
_OTHER_FORMATS = {
    ".gguf": "GGUF is for running a model, and its weights are often rounded; give the Hugging Face directory that it "
    "was made from, or name the file itself to start from its de-quantised weights",
    ".onnx": "ONNX is a graph for running a model; give the Hugging Face directory that it was made from",
    ".h5": "these are TensorFlow weights; save the model from transformers as safetensors",
    ".msgpack": "these are Flax weights; save the model from transformers as safetensors",
    ".npz": "these are NumPy or MLX weights; give the Hugging Face directory that they were made from",
}


def model_home(path: str | Path) -> Path:
    """The directory that holds the model a user's local place stands for: ``pruned/`` of a run, or the place itself.

    Raises:
        UserError: It is no directory of a model; the message says what it is and the way out.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{place}: no such directory; give one that holds config.json and *.safetensors")
    if not place.is_dir():
        raise UserError(f"{place} is {_file_kind(place)}")
    if not (place / "config.json").is_file() or (place / ".hydra").is_dir():
        if (place / "pruned" / "config.json").is_file():
            return place / "pruned"
        if (place / ".hydra").is_dir() or (place / "stages").is_dir():
            raise UserError(
                f"{place} is a run that has exported no model yet; go on with: python train.py resume={place}"
            )
    if not (place / "config.json").is_file():
        raise UserError(f"{place} is not a model directory: {_without_config(place)}")
    if (place / ADAPTER_CONFIG).is_file():
        raise UserError(_mixed(place))
    return place


def read_settings(directory: Path) -> dict[str, Any]:
    """``config.json`` as plain data, of a model whose weights are not quantised.

    Raises:
        UserError: It is broken, names no model type, or describes quantised weights.
    """
    file = directory / "config.json"
    content = file.read_bytes()
    if content.startswith(LFS_POINTER):
        raise UserError(f"{file} is a git-lfs pointer, not the file itself; fetch it: git lfs pull")
    try:
        settings = json.loads(content)
    except ValueError as error:
        reason = "it is empty" if not content.strip() else str(error)
        raise UserError(f"{file} cannot be read: {reason}; copy it again") from error
    if not isinstance(settings, dict) or not settings.get("model_type"):
        raise UserError(f"{file} names no model_type, so it is not the config of a Hugging Face model")
    if quantized := settings.get("quantization_config") or settings.get("compression_config"):
        by = quantized.get("quant_method", "another tool") if isinstance(quantized, dict) else "another tool"
        raise UserError(
            f"{directory} holds weights that are quantised by {by} (quantization_config in config.json), which cannot "
            "be cut exactly; give the original weights, and quantise afterwards (to train on a quantised base: "
            "model.quantization=nf4)"
        )
    return settings


def other_weights(directory: Path) -> str:
    """What a directory has in place of safetensors weights, with the way out; empty where there is nothing."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    for suffix, way in _OTHER_FORMATS.items():
        if found := [name for name in names if name.endswith(suffix)]:
            return f"its weights are {found[0]}: {way}"
    if found := [name for name in names if name.endswith(PICKLES) and name != "training_args.bin"]:
        return (
            f"it holds its weights as pickle ({', '.join(found[:3])}), which is not loaded; convert it once with "
            f"{_CONVERT}"
        )
    return ""


def _file_kind(file: Path) -> str:
    if file.suffix == ".safetensors":
        return f"a weight file; give its directory, with config.json and tokenizer: {file.parent}"
    if file.suffix in _OTHER_FORMATS:
        article = "an" if file.suffix == ".onnx" else "a"
        return f"{article} {file.suffix[1:].upper()} file: {_OTHER_FORMATS[file.suffix]}"
    if file.suffix in PICKLES:
        return f"a pickle; give a directory in Hugging Face layout, made once with {_CONVERT}"
    return "a file; give a directory that holds config.json and *.safetensors"


def _without_config(place: Path) -> str:
    if (place / ADAPTER_CONFIG).is_file():
        return _adapter(place)
    if not any(place.iterdir()):
        return "it is empty; give one that holds config.json and *.safetensors"
    if (place / "params.json").is_file():
        return (
            "it has no config.json but params.json, the layout that Meta and Mistral publish in; take the repository "
            "in Hugging Face layout (often named -hf), or convert it with transformers' conversion script"
        )
    if inner := sorted(path.parent.name for path in place.glob("*/config.json")):
        return f"it has no config.json, but {', '.join(inner[:3])} in it has; give that folder"
    if other := other_weights(place):
        return f"it has no config.json; {other}"
    if any(place.glob("*.safetensors*")):
        return "it has no config.json beside the weights; copy the base model's config.json and tokenizer files there"
    return "it has no config.json; give one that holds config.json and *.safetensors"


def _adapter(place: Path) -> str:
    above = place.parent
    if place.name == ADAPTER_FOLDER and (above / "config.json").is_file():
        return f"it is the adapter of the model above it; give {above}, which is loaded with the adapter added"
    try:
        base = json.loads((place / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    of = f" of {base}" if base else ""
    return (
        f"it has no config.json, it is an adapter{of} (adapter_config.json); merge it into its base with PEFT "
        "(PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(NEW_DIRECTORY)) and give that"
    )


def _mixed(place: Path) -> str:
    return (
        f"{place} holds both a model (config.json) and an adapter (adapter_config.json), and it is not certain which "
        "is meant: move the adapter's files elsewhere to take the model alone, or merge it with PEFT "
        "(merge_and_unload) and give what that saves"
    )
