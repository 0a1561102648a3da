"""What a process sets for calls of `generate` that say nothing, or not all, about their cache.

`turboquant-hf run` uses this for clients that cannot be told: harnesses, servers, scripts of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from turboquant_hf.names import CACHE_NAME, UPSTREAM, cache_argument

logger = logging.get_logger(__name__)


@dataclass
class CacheDefaults:
    """The defaults in force, and what became of them.

    Attributes:
        cache_implementation: for calls that name no cache; None leaves them to transformers.
        cache_config: for calls whose cache is ours: fields that the call's own `cache_config` lacks. A call that names
            its own preset is left as it is.
        calls: how many calls of `generate` made a cache of ours.
    """

    cache_implementation: str | None = None
    cache_config: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 0


_current: CacheDefaults | None = None


def cache_defaults() -> CacheDefaults | None:
    """What `set_cache_defaults` set last, or None."""
    return _current


def set_cache_defaults(cache_implementation: str | None = None, **cache_config: Any) -> CacheDefaults:
    """Set the defaults of this process, for every model, in place of earlier ones.

    Args:
        cache_implementation: "turboquant", "turboquant_static" or None.
        **cache_config: what generate's `cache_config` takes: `preset`, fields of a preset, `attention`, `offloading`.

    Raises:
        ValueError: an unknown name, preset or field.
    """
    global _current
    if cache_implementation is not None and cache_implementation not in UPSTREAM:
        raise ValueError(f"cache={cache_implementation!r} is not supported; allowed: {', '.join(UPSTREAM)}")
    from turboquant_hf.cache.registration import parse_cache_config  # it asks this module in every call of generate

    parse_cache_config(cache_config)
    _current = CacheDefaults(cache_implementation, cache_config)
    return _current


def clear_cache_defaults() -> None:
    """Undo `set_cache_defaults`."""
    global _current
    _current = None


def complete(config: GenerationConfig, model_kwargs: Mapping[str, Any], model: str) -> None:
    """Write the defaults, if any are in force, into the configuration of one call, which is generate's own copy."""
    given = cache_argument(model_kwargs) is not None
    if _current is None or given or config.use_cache is False or getattr(config, "is_assistant", False):
        return
    if config.cache_implementation is None:
        config.cache_implementation = _current.cache_implementation
    if config.cache_implementation in UPSTREAM:
        _current.calls += 1
        config.cache_config = _merge(config.cache_config, _current.cache_config)
    else:
        logger.warning_once(
            f"turboquant_hf: {model}.generate ran with cache_implementation={config.cache_implementation!r}, which is "
            f'not compressed; name "{CACHE_NAME}" there, or start with "turboquant-hf run --cache {CACHE_NAME} ...", '
            "which names it for calls that name none."
        )


def _merge(own: Any, default: Mapping[str, Any]) -> Any:
    """A call's own `cache_config`, with the default's fields where it lacks them and names no preset."""
    if own is None:
        return dict(default) or None
    if not isinstance(own, Mapping) or "preset" in own:
        return own
    return {**default, **own}
