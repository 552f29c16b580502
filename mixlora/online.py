"""Whether the Hugging Face hub answers: said within ten seconds, where its own libraries try again and again."""

import os
import ssl
import threading
import time
import urllib.error
import urllib.request

PATIENCE = 6.0  # seconds, name look-up included; with the time to start and to say so it stays below ten
KEPT = 20.0  # seconds for which a hub that did not answer is not asked again: loading a model asks several times
heard: dict[str, tuple[str | None, float]] = {}  # by endpoint: what was found, and when


def problem() -> str | None:
    """Why the hub cannot be asked; None where it answers, or the user has told not to ask."""
    why = None if offline() else unreachable(endpoint(), PATIENCE)
    return why and f"{endpoint()} cannot be reached ({why})"


def offline() -> bool:
    """Whether the user has told the Hugging Face libraries to use their cache alone."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def unreachable(url: str, patience: float) -> str | None:
    """What `asked` says, once for a process where `url` answers: a session outlives the troubles of a network."""
    known = heard.get(url)
    if known is None or (known[0] and time.monotonic() - known[1] > KEPT):
        known = heard[url] = asked(url, patience), time.monotonic()
    return known[0]


def asked(url: str, patience: float) -> str | None:
    """Why `url` gives no answer within `patience` seconds; None where it answers, were it with an error.

    In a thread of its own, because looking a name up knows no time limit.
    """
    found = ["no answer in time"]

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=patience).close()
            found[0] = ""
        except urllib.error.HTTPError:
            found[0] = ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            # Something answers, and the hub's own library may know its certificate, which it looks up elsewhere.
            found[0] = "" if isinstance(reason, ssl.SSLError) else str(reason)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(patience)
    return found[0] or None
