"""The wandb workspace as code, and the sweep that wandb's agents drive: built, and checked against wandb's schema."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from atp.commands import dashboard
from atp.commands.train import compose_config

ROOT = Path(__file__).parent.parent.parent
SWEEP = ROOT / "dashboards" / "sweep.yaml"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic, inside wandb-workspaces
def test_workspace_definition_holds_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason="needs the extra 'dashboard'")
    monkeypatch.setattr("atp.train.login.is_logged_in", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert dashboard.main([]) == 0
    written = json.loads((tmp_path / "wandb_workspace.json").read_text())
    sections = written["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][: len(dashboard.SECTIONS)] == list(dashboard.SECTIONS)
    text = json.dumps(written)
    missing = [name for name in dashboard.logged_names() if name not in text]
    assert missing == []
    patterns = [p.pattern for panels in dashboard.SECTIONS.values() for p in panels if getattr(p, "pattern", "")]
    assert all(json.dumps(pattern) in text for pattern in patterns)
    committed = json.loads((ROOT / "dashboards" / "workspace.json").read_text())
    assert committed == written, "python -m atp.dashboard --json dashboards/workspace.json"


@pytest.mark.parametrize(
    ("arguments", "logged_in", "message"),
    [
        ([], True, "--entity is not set"),
        (["--sweep", "legal", "--entity", "me"], False, "log in with `wandb login`"),
    ],
)
def test_what_the_server_needs_is_said(
    arguments: list[str],
    logged_in: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("atp.train.login.is_logged_in", lambda: logged_in)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert dashboard.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dashboard.main(["--json", os.devnull]) == 2
    assert "pip install 'atp[dashboard]'" in capsys.readouterr().err


def sweep_file() -> dict[str, Any]:
    return dict(yaml.safe_load(SWEEP.read_text()))


def test_agents_call_train_with_options_it_has() -> None:
    sweep = sweep_file()
    assert sweep["command"] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    overrides = []
    for name, spec in sweep["parameters"].items():
        value = spec.get("value", spec.get("min", (spec.get("values") or [None])[0]))
        overrides.append(f"{name}={value}")
    compose_config(overrides)
    assert (ROOT / sweep["program"]).is_file()


def test_sweep_fits_the_schema_of_wandb() -> None:
    package = importlib.util.find_spec("sweeps")
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    if package is None or package.origin is None:
        pytest.skip("wandb's package of schemas is not here: pip install --no-deps sweeps")
    schema = json.loads((Path(package.origin).parent / "config" / "schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(sweep_file())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({**sweep_file(), "method": "guess"})


def test_patterns_are_regular_expressions_over_logged_names() -> None:
    for panels in dashboard.SECTIONS.values():
        for panel in panels:
            if getattr(panel, "pattern", ""):
                assert re.compile(panel.pattern)
