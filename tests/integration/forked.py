"""Commands in processes of their own that start at once: forked from one that has imported what every run imports.

``python train.py`` spends seconds on imports. Tests of what a command does, not of how it starts, leave them out by
:func:`forked`; everything else is as in a process that a user starts: arguments, directory, output, exit code, end.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 600

_SERVER = f"""
import gc, json, os, runpy, signal, sys
sys.path[0] = {str(ROOT)!r}
from atp.imports import uncollected, without_plots
without_plots()
with uncollected():
    import atp.commands.train, atp.run.pipeline, atp.run.checks, atp.run.stages
gc.freeze()
for line in iter(sys.stdin.readline, ""):
    asked = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm({SECONDS})
    os.chdir(asked["cwd"])
    for number, name in enumerate((os.devnull, asked["out"], asked["err"])):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.stdin = open(0)
    sys.argv = asked["argv"]
    run = runpy.run_path if os.path.isfile(sys.argv[0]) else runpy.run_module
    run(sys.argv[0], run_name="__main__")
    sys.exit()
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process to fork from; it ends with this one, whose end of the pipe it reads."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", _SERVER], stdin=pipe, stdout=pipe, text=True, env=environment)


def forked(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a command printed and its exit code.

    Args:
        argv: A script's path or a module's name, and its arguments.
        cwd: The directory it runs in.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        asked = {"argv": argv, "cwd": str(cwd), "out": out.name, "err": err.name}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        return subprocess.CompletedProcess(argv, int(answer), out.read(), err.read())
