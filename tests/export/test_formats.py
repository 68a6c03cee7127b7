"""The table of formats: an added row is refused, written, verified, described and offered like the others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from atp import embedded
from atp.commands.export import main
from atp.errors import UserError
from atp.export.bundle import check_formats, verify_formats, write_formats
from atp.export.extras import Package
from atp.export.formats import FORMATS, Asked, Engine, Format, Intended, Written, asked_formats
from atp.export.hf.card import CardFacts, model_card
from atp.export.hf.loading import StoredModel
from atp.export.verify.limits import Limit
from atp.export.verify.reference import token_windows
from atp.model.widths import layer_widths

ENGINE = '''
"""Reads the toy format: a number by which it moves the logits that it is compared with; it writes no text."""
import json
from pathlib import Path

import numpy as np


class ToyEngine:
    remark = "a toy"

    def __init__(self, task):
        self.moved = json.loads(Path(task["path"]).read_text())["moved"]
        self.ids_WT, self.logits_WTV = np.load(task["ids"]), np.load(task["reference"])

    def logits(self, ids_T):
        return self.logits_WTV[(self.ids_WT == ids_T).all(1).argmax()] + np.float32(self.moved)

    def generate(self, prompt_T, new_tokens):
        return []
'''


def toy_format(folder: Path) -> Format:
    def write(directory: Path, output: Path | None, asked: Asked) -> list[Written]:
        target = (output or directory / "toy") / "model.toy"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"moved": 0.0}))
        return [Written(target, target.stat().st_size, "small")]

    def check(intended: Intended, asked: Asked) -> None:
        if "hidden" in intended.axes:
            raise UserError("TOY: no hidden units; take hidden out of prune.space, or leave export.toy out")

    (folder / "toy_engine.py").write_text(ENGINE)
    return Format(
        name="toy",
        makes="toy/model.toy",
        read_by="toy.cpp",
        pattern="toy/*.toy",
        engine=Engine(folder / "toy_engine.py", "ToyEngine", Package("numpy")),
        limit=Limit(1e-4, 0.999, 5e-5),
        write=write,
        check=check,
        loading=lambda file: f"toy-cli {file}",
        language="bash",
        remark="`{file}` is a toy.",
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded.base_dir(), tmp_path / "model"))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Format:
    row = toy_format(tmp_path)
    unread = replace(FORMATS["hf"].engine, package=Package("not_installed_anywhere"))  # spares the test a process
    monkeypatch.setitem(FORMATS, "hf", replace(FORMATS["hf"], engine=unread))
    monkeypatch.setitem(FORMATS, "toy", row)
    return row


def test_a_format_added_to_the_table_goes_all_the_way(toy: Format, model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    stored = StoredModel(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    check_formats(stored.config, tokenizer, uniform=False, axes=["heads"], toy=True)
    with pytest.raises(UserError, match="take hidden out"):
        check_formats(stored.config, tokenizer, uniform=False, axes=["hidden"], toy=True)
    write_formats(model_dir, toy=True)
    assert (model_dir / "toy" / "model.toy").is_file()
    (model_dir / "toy" / "wrong.toy").write_text(json.dumps({"moved": 0.5}))
    checks = {check.file: check for check in verify_formats(model_dir, token_windows(stored, None, 32), None, 1)}
    assert checks.keys() == {".", "toy/model.toy", "toy/wrong.toy"}
    assert checks["."].ok is None and "not_installed_anywhere is not installed" in checks["."].note
    right, wrong = checks["toy/model.toy"], checks["toy/wrong.toy"]
    assert right.ok and (right.format, right.note, right.load) == ("toy", "a toy", "toy-cli toy/model.toy")
    assert wrong.ok is False and "rms 0.5" in wrong.note
    facts = CardFacts(
        title="T", architecture="M", stock=True, widths=layer_widths(stored.config), files=["toy/model.toy"]
    )
    assert "toy.cpp:\n\n```bash\ntoy-cli toy/model.toy\n```\n\n`toy/model.toy` is a toy." in model_card(facts)


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed: pip install 'atp[onnx]'")
def test_the_command_offers_and_writes_an_added_format(
    toy: Format, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model_dir), "--to", "toi"]) == 2
    assert "--to toi: unknown; did you mean 'toy'? known: hf, adapter, gguf, onnx, toy" in capsys.readouterr().err
    assert main([str(model_dir), "to=toy"]) == 0
    assert f"toy: {model_dir / 'toy' / 'model.toy'} (0.00 MiB, small)" in capsys.readouterr().out
    assert main([str(model_dir), "to=toy,onnx", "output=" + str(model_dir.parent / "both")]) == 0
    assert {path.name for path in (model_dir.parent / "both").iterdir()} == {"toy", "onnx"}
    capsys.readouterr()
    assert main(["--help"]) == 0
    assert "--to hf|adapter|gguf|onnx|toy ..." in capsys.readouterr().out


def test_a_name_that_is_no_format_is_refused() -> None:
    with pytest.raises(UserError, match="no format 'tflite'; known: hf, adapter, gguf, onnx"):
        asked_formats({"tflite": True})
    assert [(row.name, asked.types) for row, asked in asked_formats({"onnx": True, "gguf": ["f16", "q8_0"]})] == [
        ("gguf", ("f16", "q8_0")),
        ("onnx", ()),
    ]
    assert asked_formats({"gguf": [], "onnx": False}) == []


def test_all_that_cannot_be_written_is_told_at_once(toy: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = (kind.from_pretrained(embedded.base_dir()) for kind in (AutoConfig, AutoTokenizer))
    with pytest.raises(UserError, match=r"'f12' is not known.*; TOY: no hidden units"):
        check_formats(config, tokenizer, uniform=False, axes=["hidden"], gguf=["f12"], toy=True)
