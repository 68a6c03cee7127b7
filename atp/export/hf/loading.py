"""Loading an exported directory strictly: everything has to be there, whole, and of the shape the config says.

Where `from_pretrained` fills gaps with random weights and a warning, this raises. Used by export's own checks, by the
comparison of the removed with the reloaded model, and by whoever continues from a pruned model. Runs no code from the
directory and opens no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from atp.errors import UserError
from atp.masks.adapter import ADAPTER_FOLDER, Adapter, read_adapter
from atp.model import modeling_atp
from atp.model.families import family_of
from atp.model.widths import build_model

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class StoredModel:
    """A model directory that was checked to be whole, with its tensors read one at a time.

    Args:
        path: A directory written by :func:`atp.export.hf.writing.export_hf`, or another safetensors directory of these
            families.

    Attributes:
        directory: Where it is.
        config: Its config.
        shapes: Shape of every stored tensor, by name; a tied output head is not among them.
        adapter: The adapter of an unmerged export; the tensors read here have it added to them.

    Raises:
        ValueError: If files are missing, truncated or pickled, or if tensors are missing, unexpected or misshapen.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = Path(path).expanduser()
        self.config = _read_config(self.directory)
        self.shapes = expected_shapes(self.config)
        found: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in _weight_files(self.directory):
            with _opened(file) as stored:
                for name in stored.offset_keys():
                    found[name] = tuple(stored.get_slice(name).get_shape())
                    self._files[name] = file
        if self.config.tie_word_embeddings:
            found.pop(_head(self.config), None)
        if problems := differences(self.shapes, found):
            raise UserError(f"the weights in {self.directory} do not fit its config.json: {problems}")
        folder = self.directory / ADAPTER_FOLDER
        self.adapter = read_adapter(folder) if (folder / "adapter_config.json").is_file() else None
        if self.adapter is not None:
            _check_adapter(self.adapter, self.shapes, folder)

    @property
    def dtype(self) -> torch.dtype:
        """Type that the config names; float32 where it names none."""
        return self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        with _opened(self._files[name]) as stored:
            return self._merged(name, stored.get_tensor(name))

    def _merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.adapter is None else self.adapter.added_to(name, tensor)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in the order in which they are stored, one at a time.

        A file is opened anew for each, as the pages of what was read count as memory while it is open.
        """
        for name in self._files:
            if name in self.shapes:
                yield name, self.tensor(name)


def _check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises ValueError unless every factor fits the weight that it adds to."""
    for module, (down_RI, up_OR) in adapter.factors.items():
        shape = shapes.get(f"{module}.weight")
        if shape != (up_OR.shape[0], down_RI.shape[1]) or down_RI.shape[0] != up_OR.shape[1]:
            raise UserError(
                f"the adapter in {folder} does not fit the weights: {module} is {shape}, its factors are "
                f"{list(up_OR.shape)} and {list(down_RI.shape)}"
            )


def load_exported(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Loads an exported directory, refusing anything that does not match exactly.

    Args:
        path: A directory written by :func:`atp.export.hf.writing.export_hf`, or another safetensors directory of these
            families.
        dtype: Type of the parameters; by default the stored one.
        device: Where the model goes.

    Returns:
        The model in evaluation mode, the adapter beside the weights (if the export was not merged) added to them. Code
        beside the weights is not run: the classes are atp's own.

    Raises:
        ValueError: If files are missing, truncated or pickled, or if tensors are missing, unexpected or misshapen.
    """
    stored = StoredModel(path)
    model = build_model(stored.config, dtype=dtype or stored.dtype, device=device)
    targets = model.state_dict()
    with torch.no_grad():
        for name, tensor in stored.tensors():
            targets[name].copy_(tensor)
    if (stored.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(stored.directory), local_files_only=True)
    return model


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a config's model stores; a tied output head is not stored."""
    model = build_model(config, dtype=torch.float32, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(_head(config))
    return shapes


def _head(config: PreTrainedConfig) -> str:
    return f"{family_of(config).head}.weight"


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Says how two sets of named shapes differ; empty if they do not."""
    misshapen = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": misshapen,
    }
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            parts.append(f"{kind}: {', '.join(names[:4])}{more}")
    return "; ".join(parts)


def _read_config(directory: Path) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a model directory: it has no config.json")
    modeling_atp.register()
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{directory / 'config.json'} cannot be read: {error}") from error
    family_of(config)
    return config


def _weight_files(directory: Path) -> list[Path]:
    """The weight files of a directory, all of them present."""
    if (directory / INDEX_FILE).is_file():
        try:
            names = sorted(set(json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{directory / INDEX_FILE} is not a valid index of weight files: {error!r}") from error
        files = [directory / str(name) for name in names]
    else:
        files = [directory / WEIGHTS_FILE]
    missing = [file.name for file in files if file.parent != directory or not file.is_file()]
    if not missing:
        return files
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{directory} holds its weights as pickle ({', '.join(pickles[:3])}), which can run code when opened "
            "and is not loaded. If you trust the file, convert it once with "
            f"`AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(NEW_DIRECTORY)`"
        )
    raise UserError(f"{directory} lacks weight files: {', '.join(missing[:4])}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt", device="cpu") as stored:
            yield stored
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); copy or export it again") from error
