"""Storage, the layer that transformers talks to, the cache, and its registration with `generate`."""

from turboquant_hf.cache.cache import ATTENTION_NAME, TurboQuantCache
from turboquant_hf.cache.handles import PackedHandle, PackedKeys, PackedValues
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cache.registration import register_cache
from turboquant_hf.cache.serialization import CacheFileError
from turboquant_hf.cache.static import TurboQuantStaticCache
from turboquant_hf.cache.static_layer import StaticHandle, TurboQuantStaticLayer
from turboquant_hf.cache.switching import restore_attention

__all__ = [
    "ATTENTION_NAME",
    "CacheFileError",
    "PackedHandle",
    "PackedKeys",
    "PackedValues",
    "StaticHandle",
    "TurboQuantCache",
    "TurboQuantLayer",
    "TurboQuantStaticCache",
    "TurboQuantStaticLayer",
    "register_cache",
    "restore_attention",
]
