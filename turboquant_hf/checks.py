"""Checks of user input. Errors name the field, the value, what is allowed, and the nearest allowed name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def shown(value: Any, limit: int = 80) -> str:
    """`value` for an error message: its repr, or its class if the repr is long (a model, a configuration)."""
    text = repr(value)
    if isinstance(value, (str, Path)) or (len(text) <= limit and "\n" not in text):
        return text
    return f"<{type(value).__name__}>"


def guess(name: str, allowed: Collection[str]) -> str:
    """The words " (did you mean ...?)" with the nearest allowed name, ignoring case; "" if none is near."""
    by_lower = {one.lower(): one for one in allowed}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""


def check_flag(name: str, value: Any) -> bool:
    """Return the value; raise ValueError if it is not a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} is not supported; allowed: true, false")
    return value


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError if `value` is not a whole number from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limit = "" if high is None else f" to {high:,}"
        raise ValueError(f"{name}={shown(value)} is not supported; allowed: whole numbers from {low}{limit}")


def check_keys(owner: str, data: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raise ValueError for a field that `owner` does not have, with the nearest name and all allowed names."""
    for key, value in data.items():
        if key not in allowed:
            what = f"{owner}: unknown field {key!r}={shown(value)}{guess(str(key), allowed)}"
            raise ValueError(f"{what}; allowed: {', '.join(sorted(allowed))}")


def check_json(owner: str, data: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that JSON cannot hold, because a generation config is printed and saved as JSON."""
    for key, value in data.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            allowed = "text, numbers, true, false, lists and mappings"
            if isinstance(value, Path):
                allowed = f"the path as text, {str(value)!r}"
            elif hasattr(value, "to_dict"):
                allowed = f"a name, or {type(value).__name__}.to_dict()"
            raise ValueError(
                f"{owner}: {key}={shown(value)} is not supported, because a generation config is saved as JSON; "
                f"allowed: {allowed}"
            ) from None


def check_file(name: str, path: Any, kind: str) -> Path:
    """`path` as a Path to an existing file.

    Raises:
        ValueError: `path` is a folder, or not a path.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(path, (str, Path)):
        raise ValueError(f"{name}={shown(path)} is not supported; allowed: the path of {kind}")
    if Path(path).is_dir():
        raise ValueError(f"{name}={str(path)!r} is not supported, because it is a folder; allowed: {kind}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}={str(path)!r}: no such file")
    return Path(path)
