"""A model directory checked before anything is read from it: every tensor there, once, of the shape the config says.

The strict door that bases, exports and runs go through alike; :mod:`atp.model.loading` makes models of what passes, and
exporters read tensors one at a time. Where `from_pretrained` fills gaps with random weights and a warning, this raises.
Runs no code from the directory and opens no pickle.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from atp.errors import UserError
from atp.model import modeling_atp
from atp.model.adapter import ADAPTER_FOLDER, Adapter, has_adapter, read_adapter
from atp.model.families import FAMILIES, family_of
from atp.model.odd_places import model_home, read_settings
from atp.model.stored_names import Renaming, differences, listed, renamed
from atp.model.weight_files import StoredTensor, opened, read_header, weight_files
from atp.model.widths import build_model

log = logging.getLogger(__name__)

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Types that weights may be stored in, in safetensors' spelling."""
_TOLD: set[str] = set()
_CHECKED: set[tuple[StoredTensor, int, int]] = set()
"""What this process found finite, with size and time of the file: a run loads its base several times."""


class StoredModel:
    """A model directory that was checked to be whole, with its tensors read one at a time.

    Args:
        path: A safetensors directory of these families, or a run directory for its ``pruned/``.

    Attributes:
        directory: Where it is.
        config: Its config. ``tie_word_embeddings`` is off where the file holds a head of its own, whatever the file
            says.
        shapes: Shape of every tensor of the model, by name; a tied output head is not among them.
        adapter: The adapter of an unmerged export; the tensors read here have it added to them.
        is_plain: Whether the stored names are the model's own.
        dtype: Type that most parameters are stored in.

    Raises:
        UserError: Files are missing, truncated, pickled or quantised, or tensors are missing, unexpected, doubled or
            misshapen.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = model_home(path)
        read_settings(self.directory)
        self.config = _read_config(self.directory)
        expected = self._expected()
        stored = _stored(self.directory)
        renaming = renamed(stored, expected, self._head)
        if renaming.faults:
            raise UserError(f"the weights in {self.directory} cannot be used: {renaming.faults}")
        self._tensors = {name: stored[own] for own, name in renaming.names.items()}
        self.is_plain = not renaming.taken_off
        self._settle_head()
        self._check(expected, renaming)
        self.shapes = {name: shape for name, shape in expected.items() if name in self._tensors}
        self.dtype = _dtype(self._tensors.values(), self.directory)
        self.adapter = read_adapter(self.directory / ADAPTER_FOLDER) if has_adapter(self.directory) else None
        if self.adapter is not None:
            _check_adapter(self.adapter, self.shapes, self.directory / ADAPTER_FOLDER)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what the config's model has, its head included."""
        try:
            return expected_shapes(self.config, with_head=True)
        except UserError:
            raise
        except Exception as error:  # whatever a wrong value makes transformers raise, of many kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"{self.directory / 'config.json'} describes no model that can be built ({reason})"
            ) from error

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors are stored in each type, in safetensors' spelling."""
        return dict(Counter(tensor.dtype for tensor in self._tensors.values()))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, read now, the adapter beside the weights added.

        Args:
            name: Its name in the model.
            dtype: Type of the sum, by default the stored one: a half is not rounded again where more is asked for.

        Raises:
            UserError: It holds values that are not finite.
        """
        tensor = self.raw(name)
        tensor = tensor if dtype is None else tensor.to(dtype)
        return tensor if self.adapter is None else self.adapter.added_to(name, tensor)

    def raw(self, name: str) -> torch.Tensor:
        """One tensor as it is stored.

        Raises:
            UserError: It holds values that are not finite.
        """
        found = self._tensors[name]
        with opened(found.file) as stored:
            tensor: torch.Tensor = stored.get_tensor(found.name)
        # A sum is not finite where a value is not, and costs no memory; finite values can also sum to infinity.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            raise UserError(
                f"{found.file}: {found.name} holds values that are not finite (NaN or infinity), so the model computes "
                "nothing; take an earlier checkpoint or download it again"
            )
        return tensor

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors in the order in which they are stored, one at a time.

        A file is opened anew for each, as the pages of what was read count as memory while it is open.
        """
        for name in self._tensors:
            yield name, self.tensor(name, dtype)

    def check_values(self) -> None:
        """Read every tensor once in this process and refuse values that are not finite."""
        for name, found in self._tensors.items():
            state = found.file.stat()
            key = (found, state.st_size, state.st_mtime_ns)
            if key not in _CHECKED:
                self.raw(name)
                _CHECKED.add(key)

    @property
    def _head(self) -> str:
        return f"{family_of(self.config).head}.weight"

    def _settle_head(self) -> None:
        """Decide whether a tied config's head is the embeddings' weight, by what is in the file."""
        if not self.config.tie_word_embeddings:
            return
        embeddings = f"{family_of(self.config).embeddings}.weight"
        head, tied = self._tensors.get(self._head), self._tensors.get(embeddings)
        if head is None:
            return
        if tied is None:  # of two names for one weight, safetensors keeps either
            self._tensors[embeddings] = self._tensors.pop(self._head)
            self.is_plain = False
        elif head.shape == tied.shape and not torch.equal(self.raw(self._head), self.raw(embeddings)):
            self.config.tie_word_embeddings = False
            tell_once(
                f"{self.directory}: config.json says tie_word_embeddings, but {self._head} differs from the "
                "embeddings; both are kept apart"
            )
        else:
            del self._tensors[self._head]

    def _check(self, expected: dict[str, tuple[int, ...]], renaming: Renaming) -> None:
        if self.config.tie_word_embeddings:
            expected.pop(self._head)
        found = {name: tensor.shape for name, tensor in self._tensors.items()}
        if problems := differences(expected, found):
            hint = _hint(expected, found, self.config)
            raise UserError(f"the weights in {self.directory} do not fit its config.json: {problems}{hint}")
        if renaming.taken_off:
            tell_once(f"{self.directory}: the names of the weights are not the model's own; {renaming.taken_off}")


def tell_once(line: str) -> None:
    """Log a line unless this process has logged it before: a run loads its base several times."""
    if line not in _TOLD:
        _TOLD.add(line)
        log.info("%s", line)


def expected_shapes(config: PreTrainedConfig, *, with_head: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a config's model stores; a tied output head only on request."""
    model = build_model(config, dtype=torch.float32, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and not with_head:
        shapes.pop(f"{family_of(config).head}.weight")
    return shapes


def _read_config(directory: Path) -> PreTrainedConfig:
    modeling_atp.register()
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a wrong value makes transformers raise, of many kinds
        settings = read_settings(directory)
        known = {*FAMILIES, *modeling_atp.CONFIG_CLASSES}
        if settings.get("auto_map") and settings["model_type"] not in known:
            raise UserError(
                f"{directory} needs Python code of its own (auto_map in config.json), which is not run: ATP prunes "
                f"{', '.join(FAMILIES)} as transformers has them"
            ) from error
        family_of(_Named(settings["model_type"]))
        raise UserError(f"{directory / 'config.json'} cannot be read: {error}") from error
    try:
        family_of(config).check(config)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from error
    return config


class _Named:
    """A model type alone, for a config that cannot be read."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


def _stored(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor in the files of a directory, by its name there."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        tensors = read_header(file)
        if doubled := sorted(found.keys() & tensors.keys()):
            raise UserError(
                f"{directory} holds tensors twice, doubled: {listed(doubled)} in {found[doubled[0]].file.name} and "
                f"{file.name}; remove the wrong file, or save the model again"
            )
        found |= tensors
    return found


def _dtype(tensors: Any, directory: Path) -> torch.dtype:
    """Type of most parameters.

    Raises:
        UserError: A type that is no plain floating-point one.
    """
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"the weights in {directory} cannot be used: {tensor.name} is stored as {tensor.dtype}, so it is "
                "quantised or packed by another tool; give the original weights"
            )
        sizes[tensor.dtype] += int(torch.Size(tensor.shape).numel())
    return FLOATS[sizes.most_common(1)[0][0]]


def _check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises UserError unless every factor fits the weight that it adds to."""
    for module, (down_RI, up_OR) in adapter.factors.items():
        shape = shapes.get(f"{module}.weight")
        if shape != (up_OR.shape[0], down_RI.shape[1]) or down_RI.shape[0] != up_OR.shape[1]:
            raise UserError(
                f"the adapter in {folder} does not fit the weights: {module} is {shape}, its factors are "
                f"{list(up_OR.shape)} and {list(down_RI.shape)}"
            )


def _hint(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], config: PreTrainedConfig
) -> str:
    """The way out of a difference that people are known to meet."""
    family = family_of(config)
    embeddings, _, head = family.embedding_tensors
    rows = found.get(embeddings, (0,))[0]
    if rows and rows != expected[embeddings][0] and found[embeddings][1:] == expected[embeddings][1:]:
        return f". The embeddings have {rows} rows: if the tokenizer was enlarged, set vocab_size={rows} in config.json"
    if expected.keys() - found.keys() == {head}:
        return ". If the head is the embeddings' weight, set tie_word_embeddings=true in config.json"
    layers = {name.removeprefix(f"{family.layers}.").split(".")[0] for name in found if name.startswith(family.layers)}
    if layers and len(layers) != config.num_hidden_layers:
        return f". The file holds {len(layers)} layers, config.json says num_hidden_layers={config.num_hidden_layers}"
    return ". Is the config.json of this model, and is every file of it here?"
