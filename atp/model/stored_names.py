"""Names of stored tensors against those of the model: wrappers taken off where that is certain, all else named.

Between the headers of weight files and the loading of models. What training tools put around a model leaves its mark
in the names: PEFT ``base_model.model.``, torch.compile ``_orig_mod.``, DDP ``module.``, FSDP and checkpointing theirs.
Taken off they leave the model's own names, or the file is refused. Reads no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PEFT = "base_model.model."
_INNER = "model."
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers that models compute anew and that older versions of transformers stored."""
_ADAPTED = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|original_module)\.")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|weight_zero_point|input_scale|"
    r"absmax|quant_map|SCB|weight_format)$|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.)"
)
SHOWN = 4
"""Names that a message lists before it counts the rest."""


@dataclass(frozen=True)
class Renaming:
    """Stored names in the words of the model.

    Attributes:
        names: Stored name -> name in the model; what models compute anew is left out.
        taken_off: What was taken off or put before, for the log; empty where the names were the model's own.
        faults: What makes the file unusable whatever the shapes are, empty if nothing does.
    """

    names: dict[str, str]
    taken_off: str = ""
    faults: str = ""


def renamed(stored: Iterable[str], expected: Iterable[str], outside: str) -> Renaming:
    """Brings stored names to the model's own.

    Args:
        stored: Names in the files.
        expected: Names in the model.
        outside: Name of the output head, which lies outside the inner model that some save alone.
    """
    kept, wanted = [name for name in stored if not _COMPUTED.search(name)], set(expected)
    if adapted := [name for name in kept if _ADAPTED.search(name)]:
        return Renaming({}, faults=_unmerged(adapted))
    if quantised := [name for name in kept if _QUANTISED.search(name)]:
        more = listed(quantised)
        return Renaming({}, faults=f"its tensors are quantised by another tool ({more}); give the original weights")
    bare = {name: _bare(name) for name in kept}
    ways: dict[str, Callable[[str], str]] = {
        "": lambda name: name,
        f"{_INNER!r} taken off": lambda name: name.removeprefix(_INNER),
        f"{_INNER!r} put before": lambda name: name if name == outside else _INNER + name,
    }
    way = max(ways, key=lambda way: sum(ways[way](name) in wanted for name in bare.values()))
    names = {name: ways[way](inner) for name, inner in bare.items()}
    prefixes = sorted({_difference(name, inner) for name, inner in bare.items() if name != inner})
    told = " and ".join(filter(None, (f"{listed(prefixes)} taken off" if prefixes else "", way)))
    doubled = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if doubled:
        return Renaming(names, told, f"doubled: {listed(doubled)}, with and without {listed(prefixes)}")
    return Renaming(names, told)


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Says how two sets of named shapes differ; empty if they do not."""
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} is {list(found[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def _bare(name: str) -> str:
    """A name without the wrappers in it."""
    inner = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while inner.startswith(_PEFT):
        inner = inner.removeprefix(_PEFT)
    return inner


def _difference(name: str, inner: str) -> str:
    """The wrapper that a name had: what stood before, or the parts that stood within."""
    return name.removesuffix(inner) if name.endswith(inner) else ".".join(p for p in name.split(".") if p in _WRAPPERS)


def _unmerged(adapted: list[str]) -> str:
    return (
        f"it is the state of a PEFT model whose adapter is not merged ({listed(adapted)}); call merge_and_unload() on "
        "it and save what that returns"
    )
