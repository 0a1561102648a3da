"""`TurboQuantStaticCache`: a StaticCache whose full-attention layers are packed and preallocated, for torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, StaticCache, StaticLayer

from turboquant_hf.cache.base import PackedCache, check_config, owning_layers
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.checks import check_flag, check_whole
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, load_preset
from turboquant_hf.quantizers import Quantizer

if TYPE_CHECKING:
    from turboquant_hf.cache.estimate import MemoryEstimate


class TurboQuantStaticCache(PackedCache, StaticCache):
    """A packed cache of a fixed size: compiled code sees the same shapes at every step.

    Sliding-window, linear-attention and other special layers are transformers' own static ones.

    Args:
        config: the model's configuration.
        max_cache_len: tokens that fit, prompt and answer together.
        preset: a shipped preset's name, the path of a YAML file, a mapping, or a `CachePreset`.
        graph: let `generate` record decode steps in CUDA graphs (`turboquant_hf.generation`).
        **overrides: any field of `CachePreset`.

    Raises:
        ValueError: for an unknown preset or field, a length that is not a positive number, or a head dim that a
            quantizer cannot serve; from `update`, when more tokens come than fit.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig
        >>> from turboquant_hf import TurboQuantStaticCache
        >>> config = LlamaConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
        >>> cache = TurboQuantStaticCache(config, max_cache_len=1024)
        >>> keys, _ = cache.update(*torch.randn(2, 1, 2, 700, 64), 0)
        >>> keys.shape, cache.tokens
        (torch.Size([1, 2, 1024, 64]), 700)
    """

    kinds = (StaticLayer,)

    def __init__(
        self,
        config: PreTrainedConfig,
        max_cache_len: int,
        preset: str | Path | dict | CachePreset = DEFAULT_PRESET,
        graph: bool = True,
        **overrides: Any,
    ) -> None:
        check_config(config)
        self.graph = check_flag("graph", graph)
        if "offloading" in overrides:
            raise ValueError("offloading is not supported by a static cache; use TurboQuantCache")
        check_whole("max_cache_len", max_cache_len, 1)
        self.preset = load_preset(preset, **overrides)
        StaticCache.__init__(self, config=config, max_cache_len=max_cache_len)
        # Early versions make a cache without layers for models that may share layers.
        self.layers = self.layers or [StaticLayer(max_cache_len) for _ in range(owning_layers(config))]
        self._pack_layers(config)

    def _pack_layers(self, config: PreTrainedConfig, offloading: bool = False) -> None:
        if offloading is not False:
            raise ValueError(f'offloading={offloading!r} is not supported by "turboquant_static"; allowed: false')
        if not self.layers:
            raise ValueError(
                "this version of transformers makes a static cache without layers for this model; allowed: "
                "TurboQuantStaticCache(model.config, max_cache_len) as past_key_values, or a dynamic cache"
            )
        super()._pack_layers(config)

    def _packed(self, layer: CacheLayerMixin, keys: Quantizer, values: Quantizer, reads_packed: Any) -> CacheLayerMixin:
        return TurboQuantStaticLayer(self.preset, keys, values, layer.max_cache_len, reads_packed)

    @staticmethod
    def estimate(
        config: PreTrainedConfig,
        max_cache_len: int,
        tokens: int | None = None,
        preset: str | Path | dict | CachePreset = DEFAULT_PRESET,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> MemoryEstimate:
        """As `TurboQuantCache.estimate`, for a prompt of `tokens` in room for `max_cache_len`; None is a full cache.

        On a GPU, the kernels' workspace is not counted. It takes less than 1 %.

        Example:
            >>> from transformers import LlamaConfig
            >>> from turboquant_hf import TurboQuantStaticCache
            >>> config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)
            >>> TurboQuantStaticCache.estimate(config, max_cache_len=32_768).tokens
            32768
        """
        from turboquant_hf.cache.estimate import MemoryPlan  # it builds caches

        check_whole("max_cache_len", max_cache_len, 1)
        preset = load_preset(preset, **overrides)
        tokens = max_cache_len if tokens is None else tokens
        return MemoryPlan(config, dtype).estimate(tokens, preset, batch, max_cache_len=max_cache_len)

    def save(self, path: str | Path) -> None:
        raise NotImplementedError("a static cache cannot be saved; prefill and save a TurboQuantCache instead")
