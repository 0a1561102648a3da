"""Compressed KV caches for Hugging Face Transformers.

Importing this package adds the names "turboquant" and "turboquant_static" to transformers' caches, and "turboquant" to
its attentions. Nothing else changes. The import takes no time: the public names below are imported at their first use,
and transformers learns its names when it loads the modules that they belong to (`import_hook.py`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turboquant_hf.import_hook import install
from turboquant_hf.version import __version__

if TYPE_CHECKING:
    from turboquant_hf.cache import CacheFileError, TurboQuantCache, TurboQuantStaticCache, restore_attention
    from turboquant_hf.config import CachePreset, load_preset, preset_names
    from turboquant_hf.evaluation.harness.profiling import make_profile
    from turboquant_hf.quantizers.profile import Profile

_EXPORTS = {
    "CacheFileError": "cache",
    "CachePreset": "config",
    "Profile": "quantizers.profile",
    "TurboQuantCache": "cache",
    "TurboQuantStaticCache": "cache",
    "load_preset": "config",
    "make_profile": "evaluation.harness.profiling",
    "preset_names": "config",
    "restore_attention": "cache",
}
"""{public name: the part of this package that defines it}."""
_PARTS = ("attention", "cache", "config", "evaluation", "generation", "kernels", "primitives", "quantizers")

install()


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "CacheFileError",
    "CachePreset",
    "Profile",
    "TurboQuantCache",
    "TurboQuantStaticCache",
    "__version__",
    "load_preset",
    "make_profile",
    "preset_names",
    "restore_attention",
]
