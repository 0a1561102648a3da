"""`TurboQuantStaticCache`: a StaticCache whose full-attention layers are packed and preallocated, for torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import StaticCache, StaticLayer

from turboquant_hf.cache.cache import (
    LiveAttention,
    TurboQuantCache,
    check_config,
    is_latent,
    never_packed,
    owning_layers,
)
from turboquant_hf.cache.serialization import config_field, model_fields
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.checks import check_flag, check_whole
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, load_preset


class TurboQuantStaticCache(StaticCache):
    """A packed cache whose buffers never grow or move: one compiled graph serves every step.

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
    """

    packed_layer_class = TurboQuantStaticLayer
    offloader = None
    graph = True
    graph_nbytes = 0
    packed_layers = TurboQuantCache.packed_layers
    tokens = TurboQuantCache.tokens
    note_padding = TurboQuantCache.note_padding
    update = TurboQuantCache.update
    nbytes = TurboQuantCache.nbytes
    dense_nbytes = TurboQuantCache.dense_nbytes
    resident_nbytes = TurboQuantCache.resident_nbytes
    compression_ratio = TurboQuantCache.compression_ratio
    compression_ratio_in_use = TurboQuantCache.compression_ratio_in_use
    _raw_nbytes = TurboQuantCache._raw_nbytes

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
        super().__init__(config=config, max_cache_len=max_cache_len)
        # Early versions leave a cache without layers where a model could share layers and does not.
        self.layers = self.layers or [StaticLayer(max_cache_len) for _ in range(owning_layers(config))]
        self._pack_layers(config)

    @classmethod
    def from_static(cls, cache: StaticCache, config: PreTrainedConfig, preset: CachePreset) -> TurboQuantStaticCache:
        """Take over an empty StaticCache: its special layers as they are, packed ones for the rest."""
        if not cache.layers:
            raise ValueError(
                "this version of transformers makes a static cache without layers for this model; allowed: "
                "TurboQuantStaticCache(model.config, max_cache_len) as past_key_values, or a dynamic cache"
            )
        new = cls.__new__(cls)
        new.__dict__.update(cache.__dict__)
        new.preset, new.layers = preset, list(cache.layers)
        new._pack_layers(config)
        return new

    def _pack_layers(self, config: PreTrainedConfig) -> None:
        decoder = config.get_text_config(decoder=True)
        latent = is_latent(config)
        head_dim = config_field(decoder, "head_dim")
        if isinstance(head_dim, int) and not latent:
            self.preset.validate(head_dim)
        reads_packed = never_packed if latent else LiveAttention(config)
        self.model_fields = model_fields(config)
        workspaces: dict = {}
        owned = self.layers[: owning_layers(config)]
        packed = [index for index, layer in enumerate(owned) if type(layer) is StaticLayer]
        self.preset.check_layers(len(packed))
        for ordinal, index in enumerate(packed):
            keys, values = self.preset.layer_quantizers(ordinal, len(packed))
            length = self.layers[index].max_cache_len
            self.layers[index] = TurboQuantStaticLayer(self.preset, keys, values, length, reads_packed, workspaces)

    @property
    def spare_nbytes(self) -> int:
        """Bytes allocated ahead for tokens to come, and to work with, not counted in `nbytes`."""
        layers = self.packed_layers
        shared = {layer.device: layer.workspace.nbytes for layer in layers if layer.is_initialized}
        return sum(layer.spare_nbytes for layer in layers) + sum(shared.values()) + self.graph_nbytes

    def save(self, path: str | Path) -> None:
        raise NotImplementedError("a static cache cannot be saved; prefill and save a TurboQuantCache instead")

    def __repr__(self) -> str:
        packed = len(self.packed_layers)
        return (
            f"{type(self).__name__}(preset={self.preset.label!r}, layers={len(self.layers)} ({packed} packed), "
            f"bytes={self.nbytes:,}, {self.spare_nbytes:,} more ahead)"
        )
