"""The packed KV cache: storage, the layers that transformers calls, the cache classes, registration with `generate`."""

from turboquant_hf.cache.base import ATTENTION_NAME, PackedCache
from turboquant_hf.cache.cache import TurboQuantCache
from turboquant_hf.cache.handles import PackedHandle
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cache.registration import register_cache
from turboquant_hf.cache.serialization import CacheFileError
from turboquant_hf.cache.static import TurboQuantStaticCache
from turboquant_hf.cache.static_layer import TracedHandle, TurboQuantStaticLayer
from turboquant_hf.cache.switching import restore_attention

__all__ = [
    "ATTENTION_NAME",
    "CacheFileError",
    "PackedCache",
    "PackedHandle",
    "TracedHandle",
    "TurboQuantCache",
    "TurboQuantLayer",
    "TurboQuantStaticCache",
    "TurboQuantStaticLayer",
    "register_cache",
    "restore_attention",
]
