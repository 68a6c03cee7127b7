"""Loggers whose server does not answer: files within seconds, with a warning; nobody is asked without need."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from atp.errors import UserError
from atp.train import loggers, login
from atp.train.login import goes_offline, wandb_server
from atp.train.reach import why_unreachable

CLOSED = "http://127.0.0.1:9"  # the discard port, which nothing serves


class Refuses(http.server.BaseHTTPRequestHandler):
    """A server that says no to everything."""

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(403)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    made = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    made.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))


def address(server: http.server.HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_any_answer_counts(server: http.server.HTTPServer) -> None:
    assert why_unreachable(address(server)) is None
    assert "refused" in str(why_unreachable(CLOSED))
    assert why_unreachable("sqlite:///x.db") is None


def test_proxy_of_the_environment_is_asked(server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", address(server))
    assert why_unreachable("http://wandb.example.org") is None
    assert server.asked == ["http://wandb.example.org"]  # type: ignore[attr-defined]


def test_server_that_accepts_and_says_nothing_costs_no_more_than_the_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert why_unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
        assert time.monotonic() - started < 2


def test_key_without_network_goes_offline_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    assert goes_offline("")
    assert "127.0.0.1:9 cannot be reached" in caplog.text and "WANDB_MODE=offline" in caplog.text
    with pytest.raises(UserError, match=r"WANDB_MODE=online, but .*cannot be reached.*WANDB_MODE=offline"):
        goes_offline("online")


def test_key_with_network_goes_online(server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address(server))
    assert not goes_offline("")


def test_nobody_is_asked_without_a_key_or_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(login, "why_unreachable", asked.append)
    assert goes_offline("")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert goes_offline("offline") and goes_offline("disabled")
    assert asked == []


def test_server_of_an_earlier_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("[default]\nbase_url = https://own.example.org/%7E\n")
    assert wandb_server({"WANDB_CONFIG_DIR": str(tmp_path)}) == "https://own.example.org/%7E"
    assert wandb_server({"WANDB_CONFIG_DIR": str(tmp_path), "WANDB_BASE_URL": CLOSED}) == CLOSED
    assert wandb_server({"WANDB_CONFIG_DIR": str(tmp_path / "none")}) == "https://api.wandb.ai"


def test_mlflow_server_that_is_away_is_replaced_by_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[dict[str, object]] = []
    stand_in = types.SimpleNamespace(MLFlowLogger=lambda **options: made.append(options))
    monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers", stand_in)
    monkeypatch.setattr(loggers, "_need", lambda package, extra: None)
    loggers.mlflow_logger(str(tmp_path / "m"), tracking_uri="http://me:secret@127.0.0.1:9")
    assert str(made[0]["tracking_uri"]).startswith("sqlite:///")
    assert "cannot be reached" in caplog.text and "secret" not in caplog.text


def test_refusal_of_a_loggers_library_is_one_line() -> None:
    class WandbLogger:
        def log_hyperparams(self, settings: object) -> None:
            raise RuntimeError("\n401: key is not valid\nmore")

    with pytest.raises(UserError, match=r"^logger=wandb: cannot be opened \(401: key is not valid\); .*wandb login"):
        login.open_logger(WandbLogger(), {})  # type: ignore[arg-type]
