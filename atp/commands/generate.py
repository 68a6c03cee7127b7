"""``atp generate``: streams text from an exported model, from its Hugging Face directory or a GGUF file.

A thin command line for trying a result. The prompt reaches the model as training made prompts: verbatim after the
beginning-of-sequence token, or filled into one of the training tasks' templates (``--task``), within the prompt that
the model was evaluated with (its ``prompt.json``; ``--plain`` leaves that out); ``--chat`` uses the tokenizer's chat
template instead. Reads the prompt from standard input when that is piped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from atp.commands.grammar import argument, option, run_command
from atp.commands.places import EMBEDDED, model_directory
from atp.errors import UserError
from atp.export.formats import FORMATS
from atp.model.gguf.packages import PACKAGED, packaged_file

if TYPE_CHECKING:
    from atp.data.records import Frame


@dataclass
class Options:
    """Stream text from an exported model."""

    model: Path = argument("a run directory, a model directory, a .gguf file, 'embedded' or 'smollm2'")
    prompt: str | None = option(None, "the text to continue; read from standard input when that is piped")
    format: str | None = option(None, "which of a directory's formats; by default hf", choices=("hf", "gguf"))
    max_new_tokens: int = option(128, "longest continuation")
    temperature: float = option(0.0, "0 takes the likeliest token each time")
    top_p: float = option(1.0, "sample from the likeliest tokens of this mass")
    seed: int = option(0, "seed of sampling")
    task: str | None = option(None, "fill the prompt into this task's template, e.g. casehold, and instruct so")
    plain: bool = option(False, "without the prompt that the model was evaluated with")
    chat: bool = option(False, "use the tokenizer's chat template")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Returns:
        0, 2 after a user's mistake, or 130 after Ctrl-C.
    """
    return run_command(Options, _run, argv, name="generate")


def _run(options: Options) -> int:
    prompt, frame = _prompt(options)
    for piece in stream(
        options.model,
        prompt,
        frame=frame,
        engine=options.format,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _prompt(options: Options) -> tuple[str, Frame]:
    """The prompt, and what of it a chat template wrote."""
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise UserError("there is no prompt; give --prompt TEXT, or pipe a text in")
    if options.task and options.chat:
        raise UserError("--task and --chat are two ways of framing the prompt; choose one")
    return _framed(prompt, options)


def _framed(text: str, options: Options) -> tuple[str, Frame]:
    """The text in its task's template, and in the prompt that the model was evaluated with."""
    from atp.data.encoding.tokenizer import load_tokenizer
    from atp.data.prompt import Prompt, read_prompt
    from atp.data.tasks import fill_prompt, load_tasks

    own = Prompt()
    if not (options.plain or options.chat):
        path, kind = find_model(options.model, options.format)
        folder = path if kind == "hf" else path.parent
        own = read_prompt(folder.parent if folder.name == "gguf" else folder)
    instructed = options.task in own.instructions and options.task not in load_tasks()
    if options.task and not instructed:
        text = fill_prompt(options.task, text)
    if own.is_empty:
        return text, ()
    tokenizer = load_tokenizer(folder, local_files_only=True) if own.chat else None
    sys.stderr.write(f"prompt: {own.name}, from the model's prompt.json; --plain leaves it out\n")
    return own.framed(text, options.task or "text", tokenizer)


def stream(
    model: str | Path,
    prompt: str,
    *,
    engine: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    frame: Frame = (),
) -> Iterator[str]:
    """Continues a prompt piece by piece.

    Args:
        model: A run directory, a model directory, a GGUF file, or the name of a base model that ships or has a package.
        prompt: The text to continue.
        engine: hf or gguf; by default hf, or gguf for a GGUF file.
        chat: Frame the prompt by the tokenizer's chat template.
        max_new_tokens: Longest continuation, in tokens.
        temperature: 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens of this probability mass.
        seed: Seed of sampling.
        frame: Stretches of the prompt that a chat template wrote; elsewhere control tokens' names are text.

    Returns:
        Pieces of text.

    Raises:
        ValueError: There is no such model, no such format, no tokenizer, or a value is out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} must be at least 1, --temperature {temperature} not negative, "
            f"--top-p {top_p} in (0, 1]"
        )
    path, kind = find_model(Path(model), engine)
    streams: dict[str, Callable[..., Iterator[str]]] = {"hf": _stream_hf, "gguf": _stream_gguf}
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    return streams[kind](path, prompt, chat, frame, **sampling)


def find_model(path: Path, engine: str | None) -> tuple[Path, str]:
    """The file or directory to load, and its engine.

    Raises:
        ValueError: There is none of that format.
    """
    packaged = str(path) in PACKAGED and not path.exists()
    if packaged or path.suffix == ".gguf":
        file = packaged_file(str(path)) if packaged else path
        if not file.is_file():
            raise UserError(f"{path}: no such file")
        if engine == "hf":
            raise UserError(f"{path} is a GGUF file; leave --format out")
        return file, "gguf"
    directory = model_directory(path)
    if engine != "gguf":
        return directory, "hf"
    files = sorted(FORMATS["gguf"].find(directory), key=lambda file: -file.stat().st_size)
    if not files:
        where = " --output DIRECTORY" if str(path) == EMBEDDED else ""
        raise UserError(f"{path} holds no GGUF file; write one with: python -m atp.export {path} --to gguf{where}")
    return files[0], "gguf"


def _stream_hf(path: Path, prompt: str, chat: bool, frame: Frame, **sampling: Any) -> Iterator[str]:
    import torch
    from transformers import TextIteratorStreamer

    from atp.data.encoding import Encoder
    from atp.data.encoding.chat import ChatTemplate
    from atp.data.encoding.tokenizer import check_ids, load_tokenizer
    from atp.data.records import ChatRecord
    from atp.export.hf.loading import load_exported

    try:
        tokenizer = load_tokenizer(path, local_files_only=True)
    except OSError as error:
        raise UserError(f"{path} holds no tokenizer that can be read; copy the base model's files there") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_exported(path, device=device)
    check_ids(tokenizer, model.config.vocab_size, path)
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer in {path} has no chat template; leave --chat out")
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""})
        ids = ChatTemplate(tokenizer).prompt_ids(ChatRecord(turns, where="--prompt"))
    else:
        context = model.config.max_position_embeddings
        if sampling["max_new_tokens"] >= context:
            raise UserError(f"--max-new-tokens {sampling['max_new_tokens']} must be below the context of {context}")
        ids = Encoder(tokenizer, context).prompts([prompt], sampling["max_new_tokens"], [frame])[0]
    torch.manual_seed(sampling["seed"])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    input_ids = torch.tensor([ids], device=device)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling["temperature"]:
        options |= {"do_sample": True, "temperature": sampling["temperature"], "top_p": sampling["top_p"], "top_k": 0}
    options |= {"max_new_tokens": sampling["max_new_tokens"], "streamer": streamer}
    options |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**options, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
        except BaseException as error:  # handed to the reader of the stream, which would wait for ever
            failures.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def _stream_gguf(path: Path, prompt: str, chat: bool, frame: Frame, **sampling: Any) -> Iterator[str]:
    from atp.data.encoding.text import stretches
    from atp.export.llama_cpp.server import LlamaCppServer

    server = LlamaCppServer(path, private=True, chat=chat)
    try:
        if chat:
            yield from server.chat([{"role": "user", "content": prompt}], **sampling)
            return
        ids = []
        for start, end, framed in stretches(prompt, frame):
            ids += server.tokens(prompt[start:end], first=start == 0, control=framed)
        yield from server.complete(ids, **sampling)
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(main())
