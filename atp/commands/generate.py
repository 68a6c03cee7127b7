"""``atp generate``: streams text from an exported model or a base, from its Hugging Face directory or a GGUF file.

A thin command line for trying a result. The prompt reaches the model as training made prompts: verbatim after the
beginning-of-sequence token, or filled into one of the training tasks' templates (``--task``), within the prompt that
the model was evaluated with (its ``prompt.json``), else within an instruct model's chat template; ``--plain`` leaves
both out, ``--chat`` takes the chat template alone. Reads the prompt from standard input when that is piped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from atp.commands.grammar import argument, option, run_command
from atp.commands.places import EMBEDDED, gguf_file, model_directory, prompt_folder
from atp.errors import UserError
from atp.export.formats import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from atp.data.prompt import Prompt
    from atp.data.records import Frame


@dataclass
class Options:
    """Stream text from an exported model or a base."""

    model: Path = argument("a run directory, a model directory, a .gguf file, smollm2, or 'embedded'")
    prompt: str | None = option(None, "the text to continue; read from standard input when that is piped")
    format: str | None = option(
        None, "which of a directory's formats; by default hf. Of a .gguf file, hf: de-quantised", choices=("hf", "gguf")
    )
    max_new_tokens: int = option(128, "longest continuation")
    temperature: float = option(0.0, "0 takes the likeliest token each time")
    top_p: float = option(1.0, "sample from the likeliest tokens of this mass")
    seed: int = option(0, "seed of sampling")
    task: str | None = option(None, "fill the prompt into this task's template, e.g. casehold, and instruct so")
    plain: bool = option(False, "verbatim: without the model's own prompt, and no chat with an instruct model")
    chat: bool = option(False, "the chat template alone, as by default with an instruct model that has no prompt.json")


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
    if options.plain and options.chat:
        raise UserError("--plain leaves the chat template out and --chat asks for it; choose one")
    return _framed(prompt, options)


def _framed(text: str, options: Options) -> tuple[str, Frame]:
    """The text in its task's template, and in the prompt or the chat template that the model is asked with."""
    from atp.data.prompt import CHAT_NAME, Prompt
    from atp.data.tasks import fill_prompt, load_tasks

    own, tokenizer = Prompt(), None
    if not (options.plain or options.chat):
        own, tokenizer = _own_prompt(*find_model(options.model, options.format))
    instructed = options.task in own.instructions and options.task not in load_tasks()
    if options.task and not instructed:
        text = fill_prompt(options.task, text)
    if own.is_empty:
        return text, ()
    where = "of an instruct model" if own.name == CHAT_NAME else "from the model's prompt.json"
    sys.stderr.write(f"prompt: {own.name}, {where}; --plain leaves it out\n")
    return own.framed(text, options.task or "text", tokenizer)


def _own_prompt(path: Path, kind: str) -> tuple[Prompt, PreTrainedTokenizerBase | None]:
    """What a model is asked with, and the tokenizer of its chat template."""
    from atp.data.encoding.tokenizer import load_tokenizer
    from atp.data.prompt import PROMPT_FILE, Prompt, prompt_of, read_prompt
    from atp.model.gguf.base import companions
    from atp.model.stops import stored_stops

    folder = prompt_folder(path)
    own = read_prompt(folder) if (folder / PROMPT_FILE).is_file() else None
    if own is not None and own.chat is None:
        return own, None
    try:
        home = folder if (folder / "config.json").is_file() else companions(path)
        tokenizer = load_tokenizer(home, local_files_only=True)
        stops = stored_stops(home)
    except (OSError, UserError) as error:
        if own is not None:
            raise UserError(f"{folder / PROMPT_FILE} wants a chat template: {error}; --plain leaves it out") from None
        if kind == "gguf":
            sys.stderr.write(f"prompt: continued as it stands, as a chat template is not looked for ({error})\n")
        return Prompt(), None  # of a directory without a tokenizer, loading says so
    return own or prompt_of(folder, tokenizer, stops), tokenizer


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
    if file := gguf_file(path):
        packaged = not path.exists()
        return file, engine or ("hf" if packaged else "gguf")
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

    from atp.data.encoding.tokenizer import check_ids, load_tokenizer
    from atp.data.encoding.turn import end_token
    from atp.export.hf.loading import load_exported
    from atp.model.gguf.base import companions
    from atp.model.loading import load_model
    from atp.model.stops import stop_ids

    try:
        tokenizer = load_tokenizer(companions(path) if path.is_file() else path, local_files_only=True)
    except OSError as error:
        raise UserError(f"{path} holds no tokenizer that can be read; copy the base model's files there") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_model(str(path)) if path.is_file() else load_exported(path, device=device)
    model = model.to(device)
    check_ids(tokenizer, model.config.vocab_size, path)
    stops = {tokenizer.eos_token_id, *stop_ids(model.generation_config)}
    if chat or frame:
        stops.add(end_token(tokenizer))
    ids = _hf_ids(tokenizer, prompt, chat, frame, sampling["max_new_tokens"], model.config.max_position_embeddings)
    torch.manual_seed(sampling["seed"])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    input_ids = torch.tensor([ids], device=device)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling["temperature"]:
        options |= {"do_sample": True, "temperature": sampling["temperature"], "top_p": sampling["top_p"], "top_k": 0}
    options |= {"max_new_tokens": sampling["max_new_tokens"], "streamer": streamer}
    options |= {"eos_token_id": sorted(stops - {None}) or None}
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


def _hf_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, frame: Frame, new_tokens: int, context: int
) -> list[int]:
    """The ids to go on from; in a chat those that a server would make."""
    from atp.data.encoding import Encoder
    from atp.data.encoding.chat import ChatTemplate
    from atp.data.records import ChatRecord

    if new_tokens >= context:
        raise UserError(f"--max-new-tokens {new_tokens} must be below the context of {context}")
    if not chat:
        return Encoder(tokenizer, context).prompts([prompt], new_tokens, [frame])[0]
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; leave --chat out")
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""})
    return ChatTemplate(tokenizer).prompt_ids(ChatRecord(turns, where="--prompt"))


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
            # what a template wrote begins as it says, with a beginning of sequence or without one
            ids += server.tokens(prompt[start:end], first=start == 0 and not framed, control=framed)
        yield from server.complete(ids, **sampling)
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(main())
