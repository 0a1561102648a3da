"""Checks that a hub id can be loaded, because the hub's own client tries for most of a minute before it gives up."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError

FILES = ("config.json", "adapter_config.json")
SECONDS = 3.0


def check_reachable(name: str) -> None:
    """Return if the model `name` was downloaded earlier, or if the hub can be asked for it.

    Raises:
        FileNotFoundError: neither is so; or `name` is no hub id.
    """
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES):
            return
    except HFValidationError:
        raise FileNotFoundError(f"model={name!r}: there is no such folder or file, and it is no hub id") from None
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE forbids to ask the hub"
    elif getproxies() or _answers(constants.ENDPOINT):
        return
    else:
        why = f"{constants.ENDPOINT} cannot be reached"
    raise FileNotFoundError(f"model={name!r}: there is no such folder or file, it was not downloaded before, and {why}")


def _answers(endpoint: str) -> bool:
    """Whether something listens at this address. Not called if there is a proxy, which makes the connections."""
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
