"""`TurboQuantCache`: a DynamicCache whose full-attention layers keep their history packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from turboquant_hf.cache.base import PackedCache, check_config, owning_layers
from turboquant_hf.cache.hybrid import HybridLayer
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cache.measuring import MeasuringLayer
from turboquant_hf.cache.serialization import read_cache, save_cache
from turboquant_hf.checks import check_flag, shown
from turboquant_hf.config import AUTO, DEFAULT_PRESET, CachePreset, load_preset
from turboquant_hf.quantizers import Quantizer

if TYPE_CHECKING:
    from turboquant_hf.cache.estimate import MemoryEstimate


def check_device(device: Any) -> None:
    """Raise ValueError if `load` cannot put layers on `device`."""
    for one in device.values() if isinstance(device, Mapping) else [device]:
        try:
            torch.device("cpu" if one is None else one)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"device={shown(device)} is not supported; allowed: a device such as 'cuda:0', "
                "{layer index: device}, or None for where the cache was"
            ) from error


class TurboQuantCache(PackedCache, DynamicCache):
    """A KV cache for `model.generate(past_key_values=...)` or for a model's forward.

    Sliding-window, linear-attention and other special layers stay transformers' own; they do not grow with the
    context. All others hold the first tokens and a recent window in the model's dtype and the rest in packed tiles.

    Args:
        config: the model's configuration.
        preset: a shipped preset's name, the path of a YAML file, a mapping, or a `CachePreset`.
        offloading: keep packed tiles in host memory and fetch them one layer ahead (`cache.offload`). This is for
            contexts that do not fit into the GPU's memory.
        graph: let `generate` record decode steps in CUDA graphs (`turboquant_hf.generation`).
        **overrides: any field of `CachePreset`, such as `recent_window=0` or `boundary_layers=2`.

    Raises:
        ValueError: for an unknown preset or field, or a head dim that a quantizer cannot serve.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig
        >>> from turboquant_hf import TurboQuantCache
        >>> config = LlamaConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
        >>> cache = TurboQuantCache(config, preset="k3v3")
        >>> keys, values = torch.randn(2, 1, 2, 700, 64)
        >>> read_keys, read_values = cache.update(keys, values, 0)
        >>> read_keys.shape
        torch.Size([1, 2, 700, 64])
        >>> cache.nbytes < cache.dense_nbytes
        True
    """

    kinds = (DynamicLayer, LinearAttentionAndFullAttentionLayer)

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str | Path | dict | CachePreset = DEFAULT_PRESET,
        offloading: bool = False,
        graph: bool = True,
        **overrides: Any,
    ) -> None:
        check_config(config)
        self.preset = load_preset(preset, **overrides)
        self.graph = check_flag("graph", graph)
        DynamicCache.__init__(self, config=config)
        self._pack_layers(config, offloading)

    @classmethod
    def from_yaml(cls, path: str | Path, config: PreTrainedConfig, **overrides: Any) -> TurboQuantCache:
        """An empty cache with the preset of a YAML file.

        Args:
            path: the preset file.
            config: the model's configuration.
            **overrides: as for a new cache.

        Raises:
            ValueError: the file holds no valid preset.
            FileNotFoundError: there is no such file.

        Example:
            >>> from pathlib import Path
            >>> from transformers import LlamaConfig
            >>> from turboquant_hf import TurboQuantCache
            >>> _ = Path("mine.yaml").write_text("preset: k4v4\\nrecent_window: 64\\n")
            >>> TurboQuantCache.from_yaml("mine.yaml", LlamaConfig()).preset.recent_window
            64
        """
        return cls(config, preset=CachePreset.from_yaml(path), **overrides)

    @staticmethod
    def estimate(
        config: PreTrainedConfig,
        tokens: int,
        preset: str | Path | dict | CachePreset = DEFAULT_PRESET,
        batch: int = 1,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        **overrides: Any,
    ) -> MemoryEstimate:
        """Bytes that this cache takes behind a prompt, from the model's configuration alone; needs no weights.

        The bytes are those of `nbytes` and `resident_nbytes` after a prompt that was read by the attention that
        `generate` switches to. CUDA graphs and their memory pools are not counted.

        Args:
            config: the model's configuration.
            tokens: tokens of every sequence.
            preset: as for a new cache.
            batch: number of sequences.
            dtype: the model's dtype; None takes the configuration's.
            chunk: how many tokens of the prompt are read at a time (`prefill_chunk_size`); None reads it at once.
            **overrides: any field of `CachePreset`.

        Raises:
            ValueError: for an unknown preset or field, a head dim that a quantizer cannot serve, or a model whose
                configuration does not tell what it caches.

        Example:
            >>> from transformers import LlamaConfig
            >>> from turboquant_hf import TurboQuantCache
            >>> config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)
            >>> estimate = TurboQuantCache.estimate(config, tokens=32_768, preset="k4v4")
            >>> f"{estimate.dense_nbytes / 2**20:.0f} MiB in 16 bit, {estimate.compression_ratio:.1f}x less here"
            '256 MiB in 16 bit, 3.6x less here'
        """
        from turboquant_hf.cache.estimate import MemoryPlan  # it builds caches

        return MemoryPlan(config, dtype).estimate(tokens, load_preset(preset, **overrides), batch, chunk=chunk)

    def save(self, path: str | Path) -> None:
        """Write the cache to one file, all or nothing; `load` continues from it. See `cache.serialization`.

        Raises:
            CacheFileError: a layer holds something that cannot be written.
            ValueError: `path` is a folder, or not a path.
            OSError: the file cannot be written.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig
            >>> from turboquant_hf import TurboQuantCache
            >>> config = LlamaConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
            >>> cache = TurboQuantCache(config)
            >>> _ = cache.update(*torch.randn(2, 1, 2, 700, 64), 0)
            >>> cache.save("prompt.cache")
            >>> TurboQuantCache.load("prompt.cache", config).tokens
            700
        """
        save_cache(self, path)

    @classmethod
    def load(
        cls, path: str | Path, config: PreTrainedConfig, device: Any = None, offloading: bool = False
    ) -> TurboQuantCache:
        """The cache that `save` wrote, for a model of the same configuration (weights are not compared).

        Args:
            path: the file.
            config: the configuration of the model that will use the cache.
            device: where the layers go: a device, {layer index: device}, or None for the devices that they were on.
            offloading: as for a new cache.

        Raises:
            CacheFileError: the file is damaged, is not a saved cache, or belongs to another model or format version.
            ValueError: `config` is not a configuration, or `device` is not a device.
        """
        check_config(config)
        check_device(device)
        preset, fill = read_cache(path, config)
        cache = cls(config, preset, offloading)
        if cache.profile is None:  # what was saved without one is read without, whatever lies in the model's folder
            cache.preset = replace(preset, profile=AUTO)
        fill(cache, device)
        return cache

    def _pack_layers(self, config: PreTrainedConfig, offloading: bool = False) -> None:
        # Early versions make a cache without layers for assisted decoding, and for models that may share layers.
        self.layers = self.layers or [DynamicLayer() for _ in range(owning_layers(config))]
        super()._pack_layers(config, offloading)

    def _packed(self, layer: CacheLayerMixin, keys: Quantizer, values: Quantizer, reads_packed: Any) -> CacheLayerMixin:
        kind = MeasuringLayer if self.preset.encode_first else TurboQuantLayer
        packed = kind(self.preset, keys, values, reads_packed, self.offloader)
        return packed if type(layer) is DynamicLayer else HybridLayer(layer, packed)

    @property
    def offloaded_nbytes(self) -> int:
        """The part of `nbytes` that is kept in host memory by `offloading=True`."""
        layers = [layer for layer in self.packed_layers if layer.is_initialized and self.offloader is not None]
        return sum(store.nbytes for layer in layers for store in layer.tiles)
