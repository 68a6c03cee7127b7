"""The `atp` script: every command by its name, unknown ones refused."""

from __future__ import annotations

import pytest

from atp.__main__ import COMMANDS, main

OWN = {name: f"atp.{name}" for name in COMMANDS} | {"train": "python train.py"}


@pytest.mark.parametrize(("name", "says"), OWN.items())
def test_a_command_answers_by_its_name(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert not end.value.code
    assert says in capsys.readouterr().out


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["exprot"])
    assert end.value.code == 2
    assert "exprot" in (told := capsys.readouterr().err) and "export" in told
