"""``atp serve``: a GGUF file behind an address that OpenAI's clients speak to, by llama.cpp's own server.

A thin command line: which file, where to listen, and the line that asks it. It listens on this machine alone unless
told otherwise, and stops at Ctrl-C. What a file must have is checked by :mod:`atp.export.llama_cpp.server`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from atp.commands.generate import find_model
from atp.commands.grammar import argument, option, run_command
from atp.errors import UserError

if TYPE_CHECKING:
    from atp.export.llama_cpp.server import LlamaCppServer

_HEARTBEAT_SECONDS = 3600.0


@dataclass
class Options:
    """Serve a GGUF file to OpenAI's clients, until Ctrl-C."""

    model: Path = argument("a .gguf file, a run or model directory with one (the largest is taken), or 'smollm2'")
    port: int = option(8080, "where to listen; 0 takes a free port")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets others in, without a password")
    context: int = option(0, "longest sequence in tokens, shared by the slots; 0 is the model's own")
    slots: int = option(1, "requests computed at once; further ones wait")
    threads: int | None = option(None, "threads; by default all processors, or what OMP_NUM_THREADS says")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Returns:
        2 after a user's mistake; once it serves, the process ends with 0 when it is stopped.
    """
    return run_command(Options, _run, argv, name="serve")


def _run(options: Options) -> int:
    from atp.export.llama_cpp.server import LlamaCppServer

    if options.slots < 1 or options.context < 0 or (options.threads is not None and options.threads < 1):
        raise UserError(
            f"slots={options.slots} and threads={options.threads} must be at least 1, context={options.context} not "
            "negative"
        )
    path, _ = find_model(options.model, "gguf")
    server = LlamaCppServer(
        path,
        host=options.host,
        port=options.port,
        context=options.context,
        slots=options.slots,
        threads=options.threads,
    )
    if not _is_loopback(options.host):
        sys.stderr.write(
            f"warning: whoever reaches {server.address} can use it; host=127.0.0.1 keeps it to this machine\n"
        )
    sys.stdout.write(f"{path}\nserved at {server.address}/v1, a page to chat at {server.address}; Ctrl-C stops it\n")
    sys.stdout.write(f"{curl_line(server)}\n")
    sys.stdout.flush()
    _wait()
    sys.stdout.write("stopped\n")
    sys.stdout.flush()
    # Closed in order, llama.cpp's server would wait half a minute for a request in progress and hold the interpreter.
    os._exit(0)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def curl_line(server: LlamaCppServer) -> str:
    """The line of shell that asks a server: for an answer where its file has a chat template, else to continue."""
    asked: dict[str, Any] = {"max_tokens": 64}
    if server.has_chat_template:
        asked |= {"messages": [{"role": "user", "content": "What is a contract?"}]}
    else:
        asked |= {"prompt": "The tenant shall"}
    path = "chat/completions" if server.has_chat_template else "completions"
    return f"curl {server.address}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(asked))}"


def _wait() -> None:
    """Return at Ctrl-C, or when the process is asked to end."""
    ended = Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        while not ended.wait(_HEARTBEAT_SECONDS):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
