"""The formats a pruned model is exported in: one table, of which each row says all that is said of a format anywhere.

Before training a run asks each wanted row what it could not hold; afterwards the rows write, find their files, say how
a fresh process opens them, how near they must come and which line loads them. ``atp export --to`` takes the rows'
names, the model card and the report show their lines. A new format is a new row. Row functions import their exporter
when they are called, so that names and help cost nothing. Knows no configuration, only what is asked of a format.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp.errors import UserError
from atp.export.extras import LLAMA_CPP, Package
from atp.export.verify.limits import Limit
from atp.loading_lines import llama_cpp_line, onnxruntime_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
"""Types that a Hugging Face directory stores weights in."""
_ADAPTER = "adapter/adapter_config.json"
_ENGINES = Path(__file__).parent / "verify" / "engines.py"
_LLAMA_CPP_ENGINE = Path(__file__).parent / "llama_cpp" / "engine.py"


@dataclass(frozen=True)
class Intended:
    """The model that a format is to hold, as far as it is known before it is pruned.

    Attributes:
        config: Config of the base model.
        tokenizer: Its tokenizer.
        uniform: Whether pruning will leave equal widths in all layers.
        axes: Kinds of units that pruning may remove (``prune.space``).
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    uniform: bool
    axes: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """What a user asks of a format; each row reads what concerns it.

    Attributes:
        types: Types of the weights, one file each, where a format has several.
        tokenizer: Whether the file carries the vocabulary.
        cache: Whether a graph takes and gives keys and values.
        dtype: Type to store the weights in; None for the stored one.
        overwrite: Whether what is there may be replaced.
    """

    types: tuple[str, ...] = ()
    tokenizer: bool = True
    cache: bool = True
    dtype: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Written:
    """What a format wrote: a file, or a directory; ``note`` is what else to say of it."""

    path: Path
    size_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Engine:
    """What opens a format in a fresh process, without atp.

    Attributes:
        file: Python file that defines it; it imports nothing of atp.
        name: Class in that file, as those in :mod:`atp.export.verify.engines` and :mod:`atp.export.llama_cpp.engine`.
        package: Package it needs.
    """

    file: Path
    name: str
    package: Package


def _nothing_against(intended: Intended, asked: Asked) -> None:
    """Any model of a supported family can be held."""


@dataclass(frozen=True)
class Format:
    """One format: what it makes, what it can hold, how it is written, verified and loaded.

    Attributes:
        name: What users call it, in ``--to`` and in ``export.<name>`` of a run.
        makes: What it leaves and where, below the model directory.
        read_by: Who opens it.
        pattern: Its files below a model directory; of a format that is a model directory itself, the file that tells it
            from a plain one.
        engine: What opens it for verification.
        limit: How near the logits of unrounded weights must come.
        write: Makes it from a model directory: (directory, where to or None for below it, what is asked). None where
            only the finished run can, from its checkpoint.
        check: Raises UserError with the reason where it could not hold the model.
        packages: What writing needs beside atp's own dependencies.
        rounded: Type that a file's weights are rounded to, of :data:`atp.export.verify.rounding.ROUNDINGS`; None where
            they are stored as they are.
        variant: What tells a file from others of the format, such as its type.
        loading: The line that opens a file; None where a directory's own lines (:mod:`atp.loading_lines`) do.
        language: Language of that line.
        remark: What to know of opening it, ``{file}`` being the file.
    """

    name: str
    makes: str
    read_by: str
    pattern: str
    engine: Engine
    limit: Limit
    write: Callable[[Path, Path | None, Asked], list[Written]] | None
    check: Callable[[Intended, Asked], None] = _nothing_against
    packages: tuple[Package, ...] = ()
    rounded: Callable[[Path], str | None] = lambda path: None
    variant: Callable[[Path], str] = lambda path: ""
    loading: Callable[[str], str] | None = None
    language: str = "python"
    remark: str = ""

    @property
    def is_directory(self) -> bool:
        """Whether the format is a model directory, not a file inside one."""
        return self.loading is None

    def find(self, directory: Path) -> list[Path]:
        """What there is of the format in a model directory: files, or the directory itself."""
        if not self.is_directory:
            return sorted(directory.glob(self.pattern))
        return [directory] if has_adapter(directory) == bool(self.pattern) else []

    def why_not(self, intended: Intended, asked: Asked) -> str:
        """The reason why the model could not be written in this format; empty if it can."""
        try:
            self.check(intended, asked)
            for package in self.packages:
                package.require()
        except UserError as error:
            return str(error)
        return ""


def _write_hf(directory: Path, output: Path | None, asked: Asked) -> list[Written]:
    from atp.export.hf.conversion import convert

    if output is None:
        raise UserError("--to hf needs --output DIRECTORY, as the model directory itself is one")
    made = convert(directory, output, dtype=asked.dtype, overwrite=asked.overwrite)
    return [Written(made.directory, made.weight_bytes, made.architecture)]


def _check_gguf(intended: Intended, asked: Asked) -> None:
    from atp.export.gguf.file import check_types
    from atp.export.gguf.layout import FILLED_NOTE, PER_LAYER, check_layout
    from atp.export.gguf.vocabulary import gguf_vocabulary

    check_types(asked.types)
    architecture = check_layout(intended.config, uniform=intended.uniform, axes=intended.axes)
    if architecture not in PER_LAYER and not intended.uniform:
        log.warning("export.gguf: %s", FILLED_NOTE)
    gguf_vocabulary(intended.tokenizer, intended.config.vocab_size)


def _write_gguf(directory: Path, output: Path | None, asked: Asked) -> list[Written]:
    from atp.export.gguf.file import export_gguf

    types = asked.types or ("f16",)
    files = export_gguf(directory, output, types=types, tokenizer=asked.tokenizer, overwrite=asked.overwrite)
    return [
        Written(
            file.path,
            file.size_bytes,
            f"{(file.size_bytes - file.tensor_bytes) / 2**20:.2f} of them vocabulary and names; "
            f"{file.architecture}, {file.type}: {file.mix}",
        )
        for file in files
    ]


def _gguf_type(path: Path) -> str:
    return path.stem.removeprefix("model-")


def _gguf_rounded(path: Path) -> str | None:
    """An unknown type counts as the roughest."""
    from atp.export.verify.rounding import ROUNDINGS

    kind = _gguf_type(path)
    return None if kind == "f32" else kind if kind in ROUNDINGS else "q2_k"


def _check_onnx(intended: Intended, asked: Asked) -> None:
    from atp.export.onnx_graph import check_graph

    check_graph(intended.config)


def _write_onnx(directory: Path, output: Path | None, asked: Asked) -> list[Written]:
    from atp.export.onnx_graph import export_onnx

    path = export_onnx(directory, output, cache=asked.cache, overwrite=asked.overwrite)
    return [Written(path, sum(file.stat().st_size for file in path.parent.iterdir()))]


def has_adapter(directory: Path) -> bool:
    """Whether an adapter lies beside a directory's weights."""
    return (directory / _ADAPTER).is_file()


_ROWS = (
    Format(
        name="hf",
        makes="a directory of its own",
        read_by="transformers",
        pattern="",
        engine=Engine(_ENGINES, "TransformersEngine", Package("transformers")),
        limit=Limit(1e-4, 0.999, 5e-5),
        write=_write_hf,
    ),
    Format(
        name="adapter",
        makes="a directory of its own: the pruned base, and adapter/ beside it",
        read_by="transformers and peft",
        pattern=_ADAPTER,
        engine=Engine(_ENGINES, "TransformersEngine", Package("peft")),
        limit=Limit(1e-3, 0.999, 1e-4),
        write=None,
    ),
    Format(
        name="gguf",
        makes="gguf/model-<type>.gguf",
        read_by="llama.cpp",
        pattern="gguf/*.gguf",
        engine=Engine(_LLAMA_CPP_ENGINE, "LlamaCppEngine", LLAMA_CPP),
        limit=Limit(2e-2, 0.999, 1e-3),
        write=_write_gguf,
        check=_check_gguf,
        packages=(Package("gguf", "gguf"),),
        rounded=_gguf_rounded,
        variant=_gguf_type,
        loading=llama_cpp_line,
        language="bash",
    ),
    Format(
        name="onnx",
        makes="onnx/model.onnx",
        read_by="onnxruntime",
        pattern="onnx/*.onnx",
        engine=Engine(_ENGINES, "OnnxEngine", Package("onnxruntime", "onnx")),
        limit=Limit(1e-3, 0.999, 1e-4),
        write=_write_onnx,
        check=_check_onnx,
        packages=(Package("onnx", "onnx"), Package("onnxruntime", "onnx")),
        loading=onnxruntime_line,
        remark="`{file}` takes `input_ids`, `attention_mask` and the `past_*` of every layer (length 0 at first) and "
        "gives `logits` and the `present_*` to pass on.",
    ),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
"""By name, in the order in which they are written and verified."""

QUANTISED: dict[str, Package] = {
    "bnb-int8": Package("bitsandbytes", "quantization"),
    "bnb-4bit": Package("bitsandbytes", "quantization"),
    "torchao-int8": Package("torchao", "torchao"),
    "torchao-4bit": Package("torchao", "torchao"),
}
"""Ways of quantising a Hugging Face directory while it is loaded, and what each needs."""


def asked_formats(wanted: Mapping[str, Any]) -> list[tuple[Format, Asked]]:
    """The formats a run asks for, in the order in which they are written.

    Args:
        wanted: Format -> types for one that has several, otherwise whether it is wanted; as ``export.<name>`` says.
    """
    if unknown := sorted(set(wanted) - set(FORMATS)):
        raise UserError(f"there is no format {unknown[0]!r}; known: {', '.join(FORMATS)}")
    return [
        (row, Asked() if wanted[name] is True else Asked(types=tuple(wanted[name])))
        for name, row in FORMATS.items()
        if wanted.get(name)
    ]
