"""`TurboQuantCache`: a DynamicCache whose full-attention layers keep their history packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, load_preset

ATTENTION_NAME = "turboquant"


class TurboQuantCache(DynamicCache):
    """A KV cache for `model.generate(past_key_values=...)` or for a model's forward.

    Sliding-window, linear-attention and other special layers stay transformers' own; they do not grow with the
    context. All others hold the first tokens and a recent window in the model's dtype and the rest in packed tiles.

    Args:
        config: the model's configuration.
        preset: a shipped preset's name, the path of a YAML file, a mapping, or a `CachePreset`.
        **overrides: any field of `CachePreset`, such as `recent_window=0` or `boundary_layers=2`.

    Raises:
        ValueError: for an unknown preset or field, or a head dim that a quantizer cannot serve.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str | Path | dict | CachePreset = DEFAULT_PRESET,
        **overrides: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config={config!r} is not supported; allowed: the model's configuration (model.config)")
        self.preset = load_preset(preset, **overrides)
        super().__init__(config=config)
        self._pack_layers(config.get_text_config(decoder=True))

    @classmethod
    def from_yaml(cls, path: str | Path, config: PreTrainedConfig, **overrides: Any) -> TurboQuantCache:
        """The cache that a preset file describes."""
        return cls(config, preset=CachePreset.from_yaml(path), **overrides)

    @classmethod
    def from_dynamic(cls, cache: DynamicCache, config: PreTrainedConfig, preset: CachePreset) -> TurboQuantCache:
        """Take over an empty DynamicCache: its special layers as they are, packed ones for the rest."""
        new = cls.__new__(cls)
        new.__dict__.update(cache.__dict__)
        new.preset = preset
        new.layers = list(cache.layers)
        new._pack_layers(config.get_text_config(decoder=True))
        return new

    def _pack_layers(self, config: PreTrainedConfig) -> None:
        self.layer_class_to_replicate = None
        head_dim = getattr(config, "head_dim", None)
        if isinstance(head_dim, int) and not getattr(config, "kv_lora_rank", None):
            self.preset.validate(head_dim)

        def returns_handles() -> bool:
            # Read at every step: the attention of a live model can be switched. A closure survives deepcopy.
            return config._attn_implementation == ATTENTION_NAME and not getattr(config, "kv_lora_rank", None)

        packed = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        for ordinal, index in enumerate(packed):
            keys, values = self.preset.layer_quantizers(ordinal, len(packed))
            self.layers[index] = TurboQuantLayer(self.preset, keys, values, returns_handles)

    @property
    def packed_layers(self) -> list[TurboQuantLayer]:
        """The layers that this package holds, in order."""
        return [layer for layer in self.layers if isinstance(layer, TurboQuantLayer)]

    def note_padding(self, attention_mask) -> None:
        """Tell an empty cache where each sequence begins, from a 0/1 mask [B, T] of left-padded input.

        `generate` does this itself. Without it padding still never reaches the output, but it counts as tokens
        when sinks are chosen and keys are measured.
        """
        if self.get_seq_length() or attention_mask is None or attention_mask.dim() != 2:
            return
        starts = (attention_mask != 0).int().argmax(dim=1).tolist()
        for layer in self.packed_layers:
            layer.note_padding(starts)

    @property
    def nbytes(self) -> int:
        """Bytes in use: packed tiles, scales, means, sinks, tail, statistics, shared rotations, raw layers."""
        shared = {}
        for layer in self.packed_layers:
            if layer.is_initialized:
                for quantizer, dim in zip(layer.quantizers, layer.head_dims):
                    shared[quantizer, dim] = quantizer.shared_nbytes(dim)
        return sum(layer.nbytes for layer in self.packed_layers) + sum(shared.values()) + self._raw_nbytes()

    @property
    def spare_nbytes(self) -> int:
        """Bytes allocated ahead for tokens to come, not counted in `nbytes`."""
        return sum(layer.spare_nbytes for layer in self.packed_layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same tokens take in a 16-bit DynamicCache."""
        return sum(layer.dense_nbytes for layer in self.packed_layers) + self._raw_nbytes()

    @property
    def compression_ratio(self) -> float:
        """`dense_nbytes` / `nbytes`: how many times smaller than a 16-bit cache, every overhead counted; 1 if empty."""
        return self.dense_nbytes / self.nbytes if self.nbytes else 1.0

    def _raw_nbytes(self) -> int:
        raw = (layer for layer in self.layers if not isinstance(layer, TurboQuantLayer))
        tensors = (x for layer in raw for x in (getattr(layer, "keys", None), getattr(layer, "values", None)))
        return sum(x.numel() * x.itemsize for x in tensors if x is not None)

    def __repr__(self) -> str:
        packed = len(self.packed_layers)
        return (
            f"{type(self).__name__}(preset={self.preset.name!r}, tokens={self.get_seq_length()}, "
            f"layers={len(self.layers)} ({packed} packed), bytes={self.nbytes:,}, "
            f"{self.compression_ratio:.2f}x smaller than 16 bit)"
        )
