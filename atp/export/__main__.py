"""``python -m atp.export``: convert and verify what a run exported, at any later time.

A thin command line over the exporters and the verification; it reads model directories only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

FORMATS = ("hf", "gguf", "onnx")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
USER_ERROR, MISMATCH = 2, 1
TABLE_WIDTH = 120


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m atp.export", description="Convert and verify a pruned model.")
    made.add_argument("directory", type=Path, help="a run directory, or a model directory")
    made.add_argument("--to", nargs="+", default=[], metavar="FORMAT", help=f"formats to write: {', '.join(FORMATS)}")
    made.add_argument("--gguf-type", nargs="+", default=["f16"], help="f32, f16, bf16, q8_0, or llama.cpp's K-quants")
    made.add_argument("--no-tokenizer", action="store_true", help="GGUF without vocabulary: token ids only")
    made.add_argument("--no-cache", action="store_true", help="ONNX without KV cache")
    made.add_argument("--output", type=Path, help="where to write; by default below the model directory")
    made.add_argument("--dtype", choices=DTYPES, help="hf: type of the weights; by default the stored one")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")
    made.add_argument("--verify", action="store_true", help="load every format in a fresh process and compare logits")
    made.add_argument("--tokens", type=int, default=2048, help="verify: tokens to compare on (2048)")
    made.add_argument("--text", type=Path, help="verify: text to compare on; by default the embedded legal corpus")
    made.add_argument("--quantised", nargs="+", default=[], help="verify: also load quantised, e.g. bnb-int8 bnb-4bit")
    made.add_argument("--push-to-hub", metavar="REPO", help="upload the directory to this hub repository")
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
        raise ValueError(f"{path} is a run that has exported no model yet; go on with: python train.py resume={path}")
    if (path / "config.json").is_file():
        return path  # loading says what is wrong with its weights
    raise ValueError(f"{path} holds no model: neither config.json nor pruned/config.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Returns:
        0, 1 when a format does not match, 2 after a user's mistake.
    """
    arguments = parser().parse_args(argv)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    try:
        return _run(arguments, console)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR


def _run(arguments: argparse.Namespace, console: Console) -> int:
    formats = [name for item in arguments.to for name in item.split(",") if name]
    if unknown := sorted(set(formats) - set(FORMATS)):
        way = "; an adapter is written by a run with export=[hf,adapter]" if "adapter" in unknown else ""
        raise ValueError(f"--to {unknown[0]}: unknown format; known: {', '.join(FORMATS)}{way}")
    if not formats and not arguments.verify and not arguments.push_to_hub:
        raise ValueError("nothing to do; give --to FORMAT, --verify or --push-to-hub REPO")
    directory = model_directory(arguments.directory)
    for name in formats:
        _WRITERS[name](directory, arguments, console)
    target = arguments.output if "hf" in formats else directory
    if arguments.push_to_hub:
        _push(target, arguments.push_to_hub, console)
    return _verify(target, arguments, console) if arguments.verify else 0


def _to_hf(directory: Path, arguments: argparse.Namespace, console: Console) -> None:
    from transformers import AutoTokenizer

    from atp.export.huggingface import export_hf
    from atp.export.loading import load_exported

    if arguments.output is None:
        raise ValueError("--to hf needs --output DIRECTORY, as the model directory itself is one")
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    model = load_exported(directory)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True) if has_tokenizer else None
    result = export_hf(model, tokenizer, arguments.output, dtype=dtype, overwrite=arguments.overwrite)
    console.print(f"hf: {result.directory} ({result.weight_bytes / 2**20:.2f} MiB, {result.architecture})")


def _to_gguf(directory: Path, arguments: argparse.Namespace, console: Console) -> None:
    from atp.export.gguf_file import export_gguf

    types = [name for item in arguments.gguf_type for name in item.split(",") if name]
    output = arguments.output / "gguf" if "hf" in arguments.to else arguments.output
    written = export_gguf(
        directory, output, types=types, tokenizer=not arguments.no_tokenizer, overwrite=arguments.overwrite
    )
    for file in written:
        besides = f"{(file.size_bytes - file.tensor_bytes) / 2**20:.2f} of them vocabulary and names"
        sizes = f"{file.size_bytes / 2**20:.2f} MiB, {besides}"
        console.print(f"gguf: {file.path} ({sizes}; {file.architecture}, {file.type})", soft_wrap=True)


def _to_onnx(directory: Path, arguments: argparse.Namespace, console: Console) -> None:
    from atp.export.onnx_graph import export_onnx

    output = arguments.output / "onnx" if "hf" in arguments.to else arguments.output
    path = export_onnx(directory, output, cache=not arguments.no_cache, overwrite=arguments.overwrite)
    console.print(f"onnx: {path} ({sum(f.stat().st_size for f in path.parent.iterdir()) / 2**20:.2f} MiB)")


_WRITERS = {"hf": _to_hf, "gguf": _to_gguf, "onnx": _to_onnx}


def _verify(directory: Path, arguments: argparse.Namespace, console: Console) -> int:
    from atp.export.verification import mismatches, verification_table, verify

    text = arguments.text.read_text(encoding="utf-8") if arguments.text else embedded_text()
    quantised = [name for item in arguments.quantised for name in item.split(",") if name]
    checks = verify(directory, text=text, tokens=arguments.tokens, quantised=quantised)
    console.print(verification_table(checks, str(directory)))
    return MISMATCH if mismatches(checks) else 0


def embedded_text(records: int = 60) -> str:
    """Running text that is always there: test records of the embedded corpus, of each domain in turn."""
    from atp import embedded

    texts = [
        str(record.get("text") or f"{record['prompt']}{record.get('completion', '')}")
        for domain in embedded.DOMAINS
        for record in embedded.records(domain, "test", records)
    ]
    return "\n\n".join(text for pair in zip(texts[::2], texts[1::2], strict=False) for text in pair)


def _push(directory: Path, repository: str, console: Console) -> None:
    from atp.export.bundle import upload

    console.print(f"hub: {upload(directory, repository)}")


if __name__ == "__main__":
    sys.exit(main())
