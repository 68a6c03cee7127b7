"""Whether a server answers, asked before a library that would wait for it for minutes.

Beside the loggers. One small request with a short limit, through the proxies of the environment; any answer at all
counts, also a refusal. Nothing is sent but the request itself. It knows no logger.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.error
import urllib.request

SECONDS = 4.0
"""What a server may take, names and proxies included."""


def why_unreachable(url: str, seconds: float = SECONDS) -> str | None:
    """Ask a server for anything.

    Args:
        url: ``http`` or ``https`` address; anything else counts as reachable.
        seconds: How long to wait.

    Returns:
        None if it answers, otherwise the reason in a few words.
    """
    if not url.lower().startswith(("http://", "https://")):
        return None
    found = [f"no answer within {seconds:g} s"]
    # In a thread, since looking up a name takes no limit; it ends with the process where it hangs.
    asking = threading.Thread(target=lambda: found.insert(0, _ask(url, seconds)), daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] or None


def _ask(url: str, seconds: float) -> str:
    """Empty for an answer, otherwise the reason."""
    try:
        opener = urllib.request.build_opener()  # with the proxies of now
        opener.open(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return ""  # it answers
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return ""  # it answers; whom to trust is the library's to decide
        reason = error.reason
        return str(getattr(reason, "strerror", None) or reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error) or type(error).__name__
    return ""
