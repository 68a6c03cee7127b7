"""The one grammar of commands: spellings, complaints and help that all of them share, and the script that runs them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atp.__main__ import COMMANDS
from atp.commands.grammar import argument, help_text, option, parse, run_command
from atp.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Options:
    """Do something with a run."""

    run: Path = argument("a run directory")
    to: list[str] = option([], "what to write", choices=("hf", "gguf", "onnx"))
    tokens: int = option(2048, "tokens to compare on")
    top_p: float = option(1.0, "mass")
    cache: bool = option(True, "with cache")
    verify: bool = option(False, "compare")
    prompt: str | None = option(None, "text", also=["text"])


SPELLINGS: list[tuple[list[str], dict[str, Any]]] = [
    (["r"], {"run": Path("r"), "tokens": 2048, "cache": True, "prompt": None, "to": []}),
    (["r", "--to", "hf", "gguf", "--verify"], {"to": ["hf", "gguf"], "verify": True}),
    (["to=[hf,gguf]", "r", "verify=true"], {"run": Path("r"), "to": ["hf", "gguf"], "verify": True}),
    (["--to", "hf", "--to=onnx", "--tokens", "9", "r"], {"to": ["hf", "onnx"], "tokens": 9, "run": Path("r")}),
    (["r", "--top-p=0.5", "--no-cache"], {"top_p": 0.5, "cache": False}),
    (["r", "top_p=1e-2", "cache=false"], {"top_p": 0.01, "cache": False}),
    (["r", "--prompt", "${oc.env:HOME} ??? a=b"], {"prompt": "${oc.env:HOME} ??? a=b"}),
    (["r", "text=--- a, b"], {"prompt": "--- a, b"}),
    (["--prompt", "-1", "--", "--odd"], {"prompt": "-1", "run": Path("--odd")}),
    (["~/r"], {"run": Path.home() / "r"}),
]


@pytest.mark.parametrize(("words", "expected"), SPELLINGS)
def test_one_option_has_every_spelling(words: list[str], expected: dict[str, Any]) -> None:
    read = vars(parse(Options, words))
    assert {name: read[name] for name in expected} == expected


MISTAKES = [
    (["r", "--tokns", "3"], "there is no option 'tokns'; did you mean 'tokens'"),
    (["r", "tokns=3"], "there is no option 'tokns'; did you mean 'tokens'"),
    (["r", "-x"], "there is no option 'x'"),
    (["r", "--tokens", "few"], "tokens='few' must be a whole number"),
    (["r", "tokens=2.5"], "tokens='2.5' must be a whole number"),
    (["r", "top_p=half"], "top_p='half' must be a number"),
    (["r", "verify=perhaps"], "verify='perhaps' must be true or false"),
    (["r", "--to", "onxn"], "--to onxn: unknown; did you mean 'onnx'? known: hf, gguf, onnx"),
    (["r", "--tokens", "1", "tokens=2"], "tokens is given twice, as '1' and '2'"),
    (["r", "--prompt"], "--prompt has no value"),
    (["r", "--prompt", "--verify"], "--prompt has no value"),
    ([], "give RUN; got none"),
    (["a", "b"], "give RUN; got a b"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_named_with_the_way_out(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Options, lambda options: 0, words, name="x") == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and message in told.err and told.err.count("\n") == 1 and not told.out


def test_a_run_directory_of_a_sweep_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prune.sparsity=0.5").mkdir()
    assert parse(Options, ["prune.sparsity=0.5"]).run == Path("prune.sparsity=0.5")
    with pytest.raises(UserError, match=r"no option 'prune\.sparsity'"):
        parse(Options, ["prune.sparsity=0.6"])


def test_only_the_users_mistakes_are_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Any:
        def work(options: Options) -> int:
            raise error

        return work

    for error, code in ((UserError("a"), 2), (OSError("full"), 2), (KeyboardInterrupt(), 130)):
        assert run_command(Options, fails(error), ["r"], name="x") == code
    assert "Traceback" not in (told := capsys.readouterr().err) and "error: full\n" in told
    with pytest.raises(ValueError, match="a fault of ours"):
        run_command(Options, fails(ValueError("a fault of ours")), ["r"], name="x")


def test_help_tells_every_option_with_its_default() -> None:
    text = help_text(Options, "export")
    assert text.startswith("usage: atp export RUN [--name value | name=value] ...   (or: python -m atp.export)\n")
    for part in ("Do something with a run.", "--to hf|gguf|onnx ...", "--tokens INT", "[2048]", "[on; --no-cache]"):
        assert part in text


# ---- the script, in processes of its own


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=ROOT)


BAD = {
    "train": ["prune.sparsty=0.5"],
    "evaluate": ["embedded", "task=legal", "batch_size=few"],
    "export": ["nowhere", "--to", "gguf"],
    "generate": ["nowhere", "--prompt", "a"],
    "serve": ["nowhere"],
    "report": ["nowhere"],
    "compare": ["nowhere", "nowhere"],
    "dashboard": ["--entity"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_ends_with_one_line_and_code_2(name: str) -> None:
    done = run("-m", "atp", name, *BAD[name])
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("door", ["evaluate", "export", "generate", "serve", "report", "compare", "dashboard"])
def test_every_door_of_before_opens(door: str) -> None:
    done = run("-m", f"atp.{door}", "--help")
    assert done.returncode == 0 and f"usage: atp {door} " in done.stdout, done.stderr


def test_help_is_quick_and_imports_no_torch() -> None:
    script = "import sys; from atp.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    told = run("-c", script).stdout
    assert all(f"  {name}" in told for name in COMMANDS) and told.endswith("False\n")
    names = [name for name in COMMANDS if name != "train"]  # whose help is the whole configuration's
    script = f"""
import importlib, sys
for name in {names}:
    importlib.import_module("atp.commands." + name).main(["-h"])
print("torch" in sys.modules, "matplotlib" in sys.modules)
"""
    assert run("-c", script).stdout.endswith("False False\n")


def test_a_place_without_a_model_is_told_before_torch_is_imported() -> None:
    script = """
import sys
from atp.commands import export, generate
codes = export.main(["nowhere", "--to", "gguf"]), generate.main(["nowhere", "--prompt", "a"])
print(codes, "torch" in sys.modules)
"""
    assert run("-c", script).stdout == "(2, 2) False\n"
