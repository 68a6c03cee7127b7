"""``atp export``: convert and verify what a run exported, at any later time.

A thin command over the table of formats and the verification. It reads model directories; for an adapter it hands the
run to its own pipeline.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atp.commands.grammar import argument, option, run_command
from atp.commands.places import EMBEDDED, gguf_file, model_directory, run_directory
from atp.errors import UserError
from atp.export.formats import FORMATS, QUANTISED, WEIGHT_DTYPES, Asked, Format, has_adapter

if TYPE_CHECKING:
    from rich.console import Console

MISMATCH = 1
TABLE_WIDTH = 120
_MAKES = "; ".join(f"{name}: {form.makes}" for name, form in FORMATS.items())


@dataclass
class Options:
    """Convert and verify a pruned model."""

    directory: Path = argument("a run directory, a model directory, 'embedded'; to hf: a GGUF file or smollm2")
    to: list[str] = option([], f"what to write ({_MAKES})", choices=FORMATS)
    gguf_type: list[str] = option(["f16"], "gguf: f32, f16, bf16, q8_0, or llama.cpp's K-quants")
    tokenizer: bool = option(True, "gguf: with the vocabulary; without, token ids only")
    cache: bool = option(True, "onnx: with KV cache")
    output: Path | None = option(
        None, "where to write, each of several formats in its folder; default: below the run or model"
    )
    dtype: str | None = option(None, "hf: type of the weights; by default the stored one", choices=WEIGHT_DTYPES)
    overwrite: bool = option(False, "replace what is there")
    verify: bool = option(False, "load every format in a fresh process and compare logits")
    tokens: int = option(2048, "verify: tokens to compare on")
    text: Path | None = option(None, "verify: text to compare on; by default the embedded corpus")
    quantised: list[str] = option([], "verify: also load quantised: " + ", ".join(QUANTISED), choices=QUANTISED)
    push_to_hub: str | None = option(None, "upload the directory to this repository, once it matches if verified")
    public: bool = option(False, "push_to_hub: make a new repository public, not private")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Returns:
        0, 1 when a format does not match, 2 after a user's mistake, 130 after Ctrl-C.
    """
    return run_command(Options, _run, argv, name="export")


def _run(options: Options) -> int:
    from rich.console import Console

    _check(options)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    target = _new_directory(options)
    directory = _source(options)
    forms = [form for name, form in FORMATS.items() if name in options.to]
    code = max((_write(form, directory, options, console) for form in forms), default=0)
    if options.verify:
        code = max(code, _verify(target or directory, options, console))
    if options.push_to_hub and code == 0:
        from atp.export.bundle import upload

        console.print(f"hub: {upload(target or directory, options.push_to_hub, public=options.public)}")
    return code


def _source(options: Options) -> Path:
    """The model directory to read, or the GGUF file to make one of."""
    file = gguf_file(options.directory)
    if file is None:
        return model_directory(options.directory)
    if options.to != ["hf"]:
        raise UserError(
            f"{file} is a GGUF file; make a model directory of it first, and go on with that: "
            f"python -m atp.export {options.directory} --to hf --output DIRECTORY"
        )
    return file


def _check(options: Options) -> None:
    """Refuses what does not go together, and what lacks a package, before anything is written."""
    if sum(FORMATS[name].is_directory for name in set(options.to)) > 1:
        raise UserError(f"--to {' '.join(options.to)}: each is a directory of its own; ask for one at a time")
    if not options.to and not options.verify and not options.push_to_hub:
        raise UserError("nothing to do; give --to FORMAT, --verify or --push-to-hub REPO")
    if options.public and not options.push_to_hub:
        raise UserError("--public says who sees an upload; give --push-to-hub REPO too, or leave it out")
    if options.verify and options.output and _new_directory(options) is None:
        raise UserError("--verify looks at the formats below the model directory; leave --output out")
    if options.to and str(options.directory) == EMBEDDED and not options.output:
        raise UserError("the embedded model is part of the package; give --output DIRECTORY to write elsewhere")
    for package in (package for name in options.to for package in FORMATS[name].packages):
        package.require()


def _write(form: Format, directory: Path, options: Options, console: Console) -> int:
    if form.write is None:
        return _write_from_run(directory, options, console)
    around = _new_directory(options) or (options.output if len(set(options.to)) > 1 else None)
    output = around / form.name if around and not form.is_directory else options.output
    types = getattr(options, f"{form.name}_type", ())
    asked = Asked(tuple(types), options.tokenizer, options.cache, options.dtype, options.overwrite)
    for file in form.write(directory, output, asked):
        note = f", {file.note}" if file.note else ""
        console.print(f"{form.name}: {file.path} ({file.size_bytes / 2**20:.2f} MiB{note})", soft_wrap=True)
    return 0


def _write_from_run(directory: Path, options: Options, console: Console) -> int:
    """The pruned base and its adapter, which only the finished run can take apart."""
    from atp.run.pipeline import export_adapter

    if has_adapter(directory):
        raise UserError(f"{directory} holds the pruned base and its adapter already, in {directory / 'adapter'}")
    output = _new_directory(options)
    assert output is not None
    difference, fault = export_adapter(run_directory(options.directory), output, overwrite=options.overwrite)
    compared = f"largest logit difference from {directory}: {difference:.2g}"
    console.print(f"adapter: {output} (pruned base) and {output / 'adapter'}; {compared}", soft_wrap=True)
    if fault:
        sys.stderr.write(f"error: {output} does not match the run: {compared}, {fault}\n")
    return MISMATCH if fault else 0


def _new_directory(options: Options) -> Path | None:
    """The model directory that this command makes, if it makes one."""
    made = [FORMATS[name] for name in options.to if FORMATS[name].is_directory]
    if made and made[0].write is None:
        return options.output or run_directory(options.directory) / "unmerged"
    return options.output if made else None


def _verify(directory: Path, options: Options, console: Console) -> int:
    from atp.export.verify.verification import mismatches, notes, verification_table, verify

    text = options.text.read_text(encoding="utf-8") if options.text else embedded_text()
    checks = verify(directory, text=text, tokens=options.tokens, quantised=options.quantised)
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


if __name__ == "__main__":
    sys.exit(main())
