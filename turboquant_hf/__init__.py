"""Compressed KV caches for Hugging Face Transformers.

Importing this package adds the names "turboquant" to transformers' caches and attentions; nothing else changes.
"""

from turboquant_hf.attention import register_attention
from turboquant_hf.cache import (
    CacheFileError,
    TurboQuantCache,
    TurboQuantStaticCache,
    register_cache,
    restore_attention,
)
from turboquant_hf.config import CachePreset, load_preset, preset_names
from turboquant_hf.generation import register_steps
from turboquant_hf.version import __version__

register_attention()
register_cache()
register_steps()

__all__ = [
    "CacheFileError",
    "CachePreset",
    "TurboQuantCache",
    "TurboQuantStaticCache",
    "__version__",
    "load_preset",
    "preset_names",
    "restore_attention",
]
