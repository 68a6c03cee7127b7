"""``python -m atp.export``: convert and verify what a run exported, at any later time.

A thin command line over the exporters and the verification. It reads model directories; for an adapter it hands the run
to its own pipeline.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from atp.errors import UserError
from atp.export.verify.limits import QUANTISED

FORMATS = ("hf", "adapter", "gguf", "onnx")
DTYPES = ("float32", "bfloat16", "float16")
USER_ERROR, MISMATCH, INTERRUPTED = 2, 1, 130
TABLE_WIDTH = 120


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m atp.export", description="Convert and verify a pruned model.")
    made.add_argument("directory", type=Path, help="a run directory, or a model directory")
    made.add_argument("--to", nargs="+", default=[], metavar="FORMAT", help=f"what to write: {', '.join(FORMATS)}")
    made.add_argument("--gguf-type", nargs="+", default=["f16"], help="f32, f16, bf16, q8_0, or llama.cpp's K-quants")
    made.add_argument("--no-tokenizer", action="store_true", help="GGUF without vocabulary: token ids only")
    made.add_argument("--no-cache", action="store_true", help="ONNX without KV cache")
    made.add_argument("--output", type=Path, help="where to write; by default below the run or model")
    made.add_argument("--dtype", choices=DTYPES, help="hf: type of the weights; by default the stored one")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")
    made.add_argument("--verify", action="store_true", help="load every format in a fresh process and compare logits")
    made.add_argument("--tokens", type=int, default=2048, help="verify: tokens to compare on (2048)")
    made.add_argument("--text", type=Path, help="verify: text to compare on; by default the embedded legal corpus")
    made.add_argument("--quantised", nargs="+", default=[], help="verify: also load quantised: " + ", ".join(QUANTISED))
    made.add_argument("--push-to-hub", metavar="REPO", help="upload the directory there, once it matches if verified")
    made.add_argument("--public", action="store_true", help="push-to-hub: make a new repository public, not private")
    return made


def model_directory(path: Path) -> Path:
    """The model directory of a run or a model directory.

    Raises:
        ValueError: There is no model.
    """
    for candidate in (path / "pruned", path):
        if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors*")):
            return candidate
    if (path / ".hydra").is_dir() or (path / "stages").is_dir():
        raise UserError(f"{path} is a run that has exported no model yet; go on with: python train.py resume={path}")
    if (path / "config.json").is_file():
        return path  # loading says what is wrong with its weights
    raise UserError(f"{path} holds no model: neither config.json nor pruned/config.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Returns:
        0, 1 when a format does not match, 2 after a user's mistake, 130 after Ctrl-C.
    """
    arguments = parser().parse_args(argv)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    try:
        return _run(arguments, console)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was being written is not there\n")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR


def _run(arguments: argparse.Namespace, console: Console) -> int:
    formats = [name for item in arguments.to for name in item.split(",") if name]
    arguments.to = formats
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise UserError(f"--to {unknown[0]}: unknown format; known: {', '.join(FORMATS)}")
    if {"hf", "adapter"} <= set(formats):
        raise UserError("--to hf adapter: each is a directory of its own; ask for one at a time")
    if not formats and not arguments.verify and not arguments.push_to_hub:
        raise UserError("nothing to do; give --to FORMAT, --verify or --push-to-hub REPO")
    if arguments.public and not arguments.push_to_hub:
        raise UserError("--public says who sees an upload; give --push-to-hub REPO too, or leave it out")
    target = _new_directory(arguments)
    if arguments.verify and arguments.output and target is None:
        raise UserError("--verify looks at the formats below the model directory; leave --output out")
    directory = model_directory(arguments.directory)
    for name in sorted(set(formats), key=FORMATS.index):
        _WRITERS[name](directory, arguments, console)
    code = _verify(target or directory, arguments, console) if arguments.verify else 0
    if arguments.push_to_hub and code == 0:
        _push(target or directory, arguments.push_to_hub, console, public=arguments.public)
    return code


def _to_hf(directory: Path, arguments: argparse.Namespace, console: Console) -> None:
    import torch
    from transformers import AutoTokenizer

    from atp.data.prompt import PROMPT_FILE
    from atp.export.hf.loading import load_exported
    from atp.export.hf.writing import export_hf

    if arguments.output is None:
        raise UserError("--to hf needs --output DIRECTORY, as the model directory itself is one")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model = load_exported(directory)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True) if has_tokenizer else None
    result = export_hf(
        model,
        tokenizer,
        arguments.output,
        card=_carried_card(directory, arguments.output.name, model.config),
        provenance=_carried_provenance(directory),
        dtype=dtype,
        overwrite=arguments.overwrite,
    )
    if (directory / PROMPT_FILE).is_file():
        shutil.copy(directory / PROMPT_FILE, arguments.output)
    console.print(f"hf: {result.directory} ({result.weight_bytes / 2**20:.2f} MiB, {result.architecture})")


def _carried_card(directory: Path, title: str, config: Any) -> str:
    """A card for a converted model: base model, licence and data as in the card it had."""
    from huggingface_hub import metadata_load

    from atp.export.hf.card import CardFacts, base_license, model_card
    from atp.model.families import is_stock
    from atp.model.widths import layer_widths

    card = directory / "README.md"
    known = (metadata_load(card) if card.is_file() else None) or {}
    facts = CardFacts(
        title=title,
        architecture=str((config.architectures or [type(config).__name__])[0]),
        stock=is_stock(config),
        widths=layer_widths(config),
        base_model=known.get("base_model"),
        license_id=base_license(directory),
        datasets=known.get("datasets") or (),
        tags=known.get("tags") or (),
    )
    return model_card(facts)


def _carried_provenance(directory: Path) -> dict[str, Any]:
    """What the run noted of itself in the directory, if it did."""
    from atp.export.hf.writing import PROVENANCE_FILE

    file = directory / PROVENANCE_FILE
    return dict(json.loads(file.read_text(encoding="utf-8")).get("run", {})) if file.is_file() else {}


def _to_adapter(directory: Path, arguments: argparse.Namespace, console: Console) -> None:
    from atp.run.pipeline import export_adapter

    if (directory / "adapter" / "adapter_config.json").is_file():
        raise UserError(f"{directory} holds the pruned base and its adapter already, in {directory / 'adapter'}")
    output = _new_directory(arguments)
    assert output is not None
    difference = export_adapter(_run_of(arguments.directory), output, overwrite=arguments.overwrite)
    compared = f"largest logit difference from {directory}: {difference:.2g}"
    console.print(f"adapter: {output} (pruned base) and {output / 'adapter'}; {compared}", soft_wrap=True)


def _run_of(path: Path) -> Path:
    """The run that a run directory is, or that a model directory belongs to."""
    return path.resolve().parent if path.resolve().name == "pruned" else path


def _new_directory(arguments: argparse.Namespace) -> Path | None:
    """The model directory that this command makes, if it makes one."""
    if "adapter" in arguments.to:
        return arguments.output or _run_of(arguments.directory) / "unmerged"
    return arguments.output if "hf" in arguments.to else None


def _format_directory(arguments: argparse.Namespace, name: str) -> Path | None:
    """Where a further format goes: beside the model directory that this command makes, or where it was asked to."""
    made = _new_directory(arguments)
    return made / name if made else arguments.output


def _to_gguf(directory: Path, arguments: argparse.Namespace, console: Console) -> None:
    from atp.export.gguf.file import export_gguf

    types = [name for item in arguments.gguf_type for name in item.split(",") if name]
    output = _format_directory(arguments, "gguf")
    written = export_gguf(
        directory, output, types=types, tokenizer=not arguments.no_tokenizer, overwrite=arguments.overwrite
    )
    for file in written:
        besides = f"{(file.size_bytes - file.tensor_bytes) / 2**20:.2f} of them vocabulary and names"
        sizes = f"{file.size_bytes / 2**20:.2f} MiB, {besides}"
        console.print(f"gguf: {file.path} ({sizes}; {file.architecture}, {file.type})", soft_wrap=True)


def _to_onnx(directory: Path, arguments: argparse.Namespace, console: Console) -> None:
    from atp.export.onnx_graph import export_onnx

    output = _format_directory(arguments, "onnx")
    path = export_onnx(directory, output, cache=not arguments.no_cache, overwrite=arguments.overwrite)
    console.print(f"onnx: {path} ({sum(f.stat().st_size for f in path.parent.iterdir()) / 2**20:.2f} MiB)")


_WRITERS = {"hf": _to_hf, "adapter": _to_adapter, "gguf": _to_gguf, "onnx": _to_onnx}


def _verify(directory: Path, arguments: argparse.Namespace, console: Console) -> int:
    from atp.export.verify.verification import mismatches, notes, verification_table, verify

    text = arguments.text.read_text(encoding="utf-8") if arguments.text else embedded_text()
    quantised = [name for item in arguments.quantised for name in item.split(",") if name]
    checks = verify(directory, text=text, tokens=arguments.tokens, quantised=quantised)
    console.print(verification_table(checks, str(directory)))
    for line in notes(checks):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return MISMATCH if mismatches(checks) else 0


def embedded_text(records: int = 60) -> str:
    """Return running text that needs no file: test records of the embedded corpus, of each domain in turn."""
    from atp import embedded

    texts = [
        str(record.get("text") or f"{record['prompt']}{record.get('completion', '')}")
        for domain in embedded.DOMAINS
        for record in embedded.records(domain, "test", records)
    ]
    return "\n\n".join(text for pair in zip(texts[::2], texts[1::2], strict=False) for text in pair)


def _push(directory: Path, repository: str, console: Console, *, public: bool) -> None:
    from atp.export.bundle import upload

    console.print(f"hub: {upload(directory, repository, public=public)}")


if __name__ == "__main__":
    sys.exit(main())
