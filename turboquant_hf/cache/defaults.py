"""Defaults of a process for calls of `generate` that do not name a cache, or do not name all of its options.

`turboquant-hf run` sets them for programs that have no option for the cache: harnesses, servers, scripts.
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
    """The defaults in force, and how often they were used.

    Attributes:
        cache_implementation: the name for calls that name no cache; None leaves such calls to transformers.
        cache_config: fields that are added where a call uses one of our caches and its own `cache_config` lacks them.
            A call that names its own preset stays as it is.
        calls: how many calls of `generate` made one of our caches.
    """

    cache_implementation: str | None = None
    cache_config: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 0


_current: CacheDefaults | None = None


def cache_defaults() -> CacheDefaults | None:
    """The defaults that `set_cache_defaults` set last, or None."""
    return _current


def set_cache_defaults(cache_implementation: str | None = None, **cache_config: Any) -> CacheDefaults:
    """Set the defaults of this process for every model; earlier defaults are replaced.

    Args:
        cache_implementation: "turboquant", "turboquant_static" or None.
        **cache_config: the fields of generate's `cache_config`: `preset`, fields of a preset, `attention`, `graph`,
            `offloading`.

    Raises:
        ValueError: an unknown name, preset or field.

    Example:
        >>> from turboquant_hf.cache.defaults import clear_cache_defaults, set_cache_defaults
        >>> set_cache_defaults("turboquant", preset="k3v3").cache_config
        {'preset': 'k3v3'}
        >>> clear_cache_defaults()
    """
    global _current
    if cache_implementation is not None and cache_implementation not in UPSTREAM:
        raise ValueError(f"cache={cache_implementation!r} is not supported; allowed: {', '.join(UPSTREAM)}")
    from turboquant_hf.cache.registration import parse_cache_config  # that module imports this one

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
    """A call's own `cache_config`. Unless it names a preset, the default adds the fields that it lacks."""
    if own is None:
        return dict(default) or None
    if not isinstance(own, Mapping) or "preset" in own:
        return own
    return {**default, **own}
