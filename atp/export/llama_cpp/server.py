"""A GGUF file in llama.cpp's own server, started in this process: text piece by piece, and an address for others.

``atp generate`` and ``atp serve`` use it. What is wrong with a file is found before llama.cpp sees it, or asked of
llama.cpp afterwards, as its server tells no reason. Knows files and texts, nothing of models, tasks or commands.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from atp.errors import UserError
from atp.export.extras import LLAMA_CPP, LLAMA_CPP_SERVER
from atp.export.llama_cpp.engine import why_not_loaded
from atp.model.gguf.reading import GgufFile

LOOPBACK = "127.0.0.1"
_REACHED = {"0.0.0.0": LOOPBACK, "[::]": "[::1]"}  # where this machine finds a server that listens everywhere
_WAIT_SECONDS = 60.0
_QUIET = -1  # verbosity
_RANDOM_SEED = 2**32 - 1  # means a seed that differs each time
_PLAIN = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0, "presence_penalty": 0.0}
"""What llama.cpp would otherwise do to probabilities by default."""


class LlamaCppServer:
    """A running server.

    Args:
        path: The GGUF file.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        context: Longest sequence in tokens, shared by the slots; 0 is the model's.
        slots: Requests that are computed at once; others wait.
        threads: Threads; by default as many as this process may use.
        private: Whether only this object may ask, not others on this machine.
        chat: Whether the file must bring a chat template.

    Raises:
        UserError: xllamacpp is missing or too old, the file cannot be served, or the port is taken.
    """

    def __init__(
        self,
        path: Path,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        context: int = 0,
        slots: int = 1,
        threads: int | None = None,
        private: bool = False,
        chat: bool = False,
    ) -> None:
        xllamacpp: Any = LLAMA_CPP_SERVER.require()
        self._file = _checked(path)
        if chat and not self.has_chat_template:
            raise UserError(f"{path} holds no chat template; leave --chat out")
        self._key, self._host = secrets.token_hex() if private else "", host
        _check_port(host, port)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.model_alias = {path.stem}
        settings.hostnames, settings.port = [host], port
        settings.api_keys = [self._key] if private else []
        settings.n_ctx, settings.n_parallel = context, slots
        settings.verbosity, settings.warmup = _QUIET, False
        for kind in (settings.cpuparams, settings.cpuparams_batch):
            kind.n_threads = threads or usable_threads()
        try:
            self._server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise UserError(_why_not(path, context)) from error
        self._ask("/slots")  # its loop answers, so it runs; closed any earlier, the server waits for itself for ever

    @property
    def address(self) -> str:
        """Where it listens, as ``http://host:port``."""
        return str(self._server.listening_address)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file brings a chat template of its own."""
        return bool(self._file.value("tokenizer.chat_template"))

    def tokens(self, text: str, *, first: bool, control: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            first: Whether it begins a sequence.
            control: Whether names of control tokens in it mean the tokens.
        """
        asked = {"content": text, "add_special": first, "parse_special": control}
        return list(self._ask("/tokenize", asked)["tokens"])

    def complete(self, ids: Sequence[int], **sampling: Any) -> Iterator[str]:
        """Continues token ids piece by piece; ``sampling`` as for :meth:`chat`."""
        asked = {"prompt": list(ids), **_request(sampling)}
        for piece in self._pieces(self._server.handle_completions, asked):
            yield piece["choices"][0].get("text") or ""

    def chat(self, messages: Sequence[Mapping[str, str]], **sampling: Any) -> Iterator[str]:
        """Answers a conversation, framed by the file's chat template, piece by piece.

        Args:
            messages: Turns with ``role`` and ``content``.
            sampling: ``max_new_tokens``, ``temperature``, ``top_p``, ``seed``.

        Raises:
            UserError: llama.cpp refuses, as where the prompt is longer than the context.
        """
        asked = {"messages": [dict(turn) for turn in messages], **_request(sampling)}
        for piece in self._pieces(self._server.handle_chat_completions, asked):
            yield piece["choices"][0]["delta"].get("content") or ""

    def close(self) -> None:
        """Stop listening and free the model."""
        self._server = None

    def _ask(self, path: str, asked: Mapping[str, Any] | None = None) -> Any:
        """What the server answers at a path of its own."""
        port = self.address.rpartition(":")[2]
        host = f"[{self._host}]" if ":" in self._host else self._host
        body = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(f"http://{_REACHED.get(host, host)}:{port}{path}", body)
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {self._key}")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
        with direct.open(request, timeout=_WAIT_SECONDS) as answer:
            return json.load(answer)

    def _pieces(self, ask: Callable[..., Any], asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a call that reports to a function reports, as it comes; the call ends when nobody takes more."""
        queue: SimpleQueue[Any] = SimpleQueue()
        left = False

        def take(piece: Any) -> bool:
            queue.put(piece)
            return left

        def work() -> None:
            try:
                ask(asked, take)
                queue.put(None)
            except BaseException as error:  # handed to the reader, which would wait for ever
                queue.put(error)

        worker = Thread(target=work, daemon=True)
        worker.start()
        try:
            while (piece := queue.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if "error" in piece:
                    raise UserError(f"llama.cpp: {piece['error'].get('message', piece['error'])}")
                yield piece
        finally:
            left = True
            worker.join(_WAIT_SECONDS)


def usable_threads() -> int:
    """Threads that this process may use: what OMP_NUM_THREADS says, or its processors."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(path: Path) -> GgufFile:
    """The file's header: whole, of a model, with a vocabulary."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    file = GgufFile(path)
    if file.value("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        raise UserError(f"{path} was written without vocabulary (--no-tokenizer), so it takes no text")
    return file


def _check_port(host: str, port: int) -> None:
    """Refuses a port that is taken, and a host that is not this machine."""
    if not 0 <= port < 2**16:
        raise UserError(f"port={port} must be in 0..65535; 0 takes a free one")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        way = "give another, or port=0 for a free one" if taken else "give an address of this machine, as 127.0.0.1"
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror or error}); {way}") from error


def _why_not(path: Path, context: int) -> str:
    """Why llama.cpp did not start with a file, as far as it says."""
    if reason := "" if LLAMA_CPP.fault else why_not_loaded(path):
        return f"llama.cpp does not load {path}: {reason}"
    return f"llama.cpp does not start with {path} and context={context}; is there memory for it? Try a smaller context"


def _request(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling in llama.cpp's words, with nothing but what was asked for."""
    return {
        **_PLAIN,
        "stream": True,
        "max_tokens": sampling["max_new_tokens"],
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "seed": sampling["seed"] % _RANDOM_SEED,
    }
