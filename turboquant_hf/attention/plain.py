"""`is_plain`: the one place that knows which calls no reader of packed tiles serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADDED = ("sliding_window", "position_bias", "sinks")
"""Options that change which tokens are seen, or add to their scores."""


def is_plain(options: Mapping[str, Any]) -> bool:
    """Whether a call is causal attention over all tokens, without dropout and without returned weights.

    Soft-caps and `s_aux` are not asked about: some readers serve them.
    """
    return (
        not options.get("dropout")
        and not options.get("output_attentions")
        and options.get("is_causal") is not False
        and all(options.get(name) is None for name in ADDED)
    )
