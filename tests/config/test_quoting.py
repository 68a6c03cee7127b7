"""What Hydra's grammar cannot read: paths work as they stand, other values come back with quotes, ready to copy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from atp.commands.train import _with_resume, compose_config, main
from atp.config.quoting import assigned, corrected, readable, text_of

ODD = ["dätä/x.jsonl", "a=b/x", "a[1].jsonl", "it's (2).jsonl", 'say "hi".txt', "a{b}", "100%;&|.txt", "b\\", "日本/ü"]


def value_of(override: str) -> object:
    """A value as Hydra reads it."""
    return OverridesParser.create().parse_override(override).value()


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("key", ["data.path", "run_dir"])
def test_paths_stand_as_they_are(key: str, name: str) -> None:
    (override,) = readable([f"{key}=/folder/{name}"])
    assert value_of(override) == f"/folder/{name}"


@pytest.mark.parametrize("given", ["~/x y.jsonl", "'~/x y.jsonl'"])
@pytest.mark.parametrize("key", ["data.path", "run_dir"])
def test_home_is_expanded(key: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert readable([f"{key}={given}"]) == [f'{key}="/home/me/x y.jsonl"']


def test_commas_mean_a_path_where_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "a,b.jsonl"
    assert readable([f"data.path={file}"]) == [f"data.path={file}"]
    file.touch()
    assert value_of(readable([f"data.path={file}"])[0]) == str(file)


def test_lists_and_sweeps_of_paths() -> None:
    assert compose_config(["data.path=[/ä.jsonl,/b.jsonl]"]).data.path == ["/ä.jsonl", "/b.jsonl"]
    assert readable(["-m", "data.path=/ä.jsonl,/b.jsonl"]) == ["-m", 'data.path="/ä.jsonl",/b.jsonl']


@pytest.mark.parametrize(
    ("arguments", "better"),
    [
        (["name=prüfung", "seed=1"], ['name="prüfung"', "seed=1"]),
        (["prompt.system=a=b, then"], ['prompt.system="a=b, then"']),
        (["-m", "name=ü,b"], ["-m", 'name="ü",b']),
        (["data.fields={text: größe}"], ['data.fields={text:"größe"}']),
    ],
)
def test_corrected_line_is_ready_to_copy(
    arguments: list[str], better: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[0].startswith("error: cannot read the override")
    assert shlex.split(lines[-1]) == ["python", "train.py", *better]


def test_nothing_is_offered_where_quotes_would_change_the_meaning() -> None:
    assert corrected(["prune.space=[heads,channels"]) is None
    assert corrected(["optim.lr=1e-3ü"]) is None


def test_value_with_commas_comes_with_three_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        main(["name=a,b", "seed=1"])
    text, listed, swept = capsys.readouterr().err.splitlines()[1:]
    assert text.endswith("""python train.py 'name="a,b"' seed=1""")
    assert listed.endswith("python train.py 'name=[a,b]' seed=1")
    assert swept.endswith("python train.py -m name=a,b seed=1")


@pytest.mark.parametrize("name", ["plain", "a=b", "dätä", "it's", "with space"])
def test_resume_takes_a_path_with_and_without_quotes(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text('{"overrides": ["seed=3"], "config": {}}')
    for given in (str(folder), assigned("", str(folder))[1:]):
        assert text_of(given) == str(folder)
        resumed = next(argument for argument in _with_resume([f"resume={given}"]) if argument.startswith("resume="))
        assert value_of(resumed) == str(folder)


def test_new_keys_of_other_groups_are_told_the_plus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["logger=wandb", "logger.wandb.entity=me"])
    assert "+logger.wandb.entity=<value>" in capsys.readouterr().err
