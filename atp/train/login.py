"""Opening a logger: whether a wandb run goes online, and a library's refusal in one line.

Beside the loggers. Login, ``WANDB_MODE`` and whether the server answers decide. A run that is not logged in, or whose
server does not answer, is written offline; nothing is ever asked. It knows wandb's files and
variables, not its package.
"""

from __future__ import annotations

import configparser
import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from atp.errors import UserError
from atp.train.reach import why_unreachable

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

_NETRC = (".netrc", "_netrc")


def wandb_server(environment: Mapping[str, str]) -> str:
    """Address of the wandb server that is configured: by the environment, by ``wandb login --host``, or wandb's own."""
    own = environment.get("WANDB_BASE_URL")
    folder = environment.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    settings = configparser.RawConfigParser()
    try:
        settings.read(Path(folder) / "settings", encoding="utf-8")
    except (OSError, ValueError, configparser.Error):
        settings.clear()
    return own or settings.get("default", "base_url", fallback="") or "https://api.wandb.ai"


def is_logged_in(environment: dict[str, str] | None = None) -> bool:
    """Whether a wandb API key is at hand: in the environment, or in the netrc file for the configured server."""
    env = os.environ if environment is None else environment
    if env.get("WANDB_API_KEY"):
        return True
    host = urlparse(wandb_server(env)).netloc
    candidates = [env["NETRC"]] if env.get("NETRC") else [os.path.expanduser(f"~/{name}") for name in _NETRC]
    for candidate in candidates:
        try:
            if netrc.netrc(candidate).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def goes_offline(mode: str) -> bool:
    """Whether wandb is to write files alone; a server that does not answer is found out here, within seconds."""
    if mode in ("offline", "dryrun", "disabled"):
        return True
    if mode != "online" and not is_logged_in():
        log.info("wandb: not logged in, so the run is written offline; `wandb sync` uploads it later")
        return True
    server = wandb_server(os.environ)
    reason = why_unreachable(server)
    if reason and mode == "online":
        raise UserError(f"WANDB_MODE=online, but {server} cannot be reached ({reason}); set WANDB_MODE=offline")
    if reason:
        log.warning(
            "wandb: %s cannot be reached (%s), so the run is written offline; `wandb sync` uploads it later. "
            "WANDB_MODE=offline does not ask",
            server,
            reason,
        )
    return bool(reason)


def open_logger(logger: Logger, settings: Mapping[str, Any]) -> None:
    """Start a logger's run and hand it the settings, with its library's complaints in one line.

    Raises:
        UserError: The library refuses, as for a key that is not valid or a project that the user may not write to.
    """
    name = type(logger).__name__.removesuffix("Logger").lower()
    try:
        logger.log_hyperparams(dict(settings))
    except Exception as error:  # whatever a library or its server says
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        way = (
            "log in again with `wandb login`, set WANDB_MODE=offline, or leave out" if name == "wandb" else "leave out"
        )
        raise UserError(f"logger={name}: cannot be opened ({reason}); {way} logger={name}") from error
