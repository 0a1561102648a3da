"""`PackedCache`: what the growing and the preallocated cache share: packing layers, padding, counting memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from turboquant_hf.cache.copies import tensors_in
from turboquant_hf.cache.hybrid import packed_part
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.cache.profiles import profile_for
from turboquant_hf.cache.serialization import config_field, model_fields
from turboquant_hf.checks import check_flag, shown
from turboquant_hf.config import CachePreset
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.quantizers.profile import Profile

ATTENTION_NAME = "turboquant"


class LiveAttention:
    """Says at every `update` whether the model's attention is "turboquant" now: it can be switched at any time."""

    def __init__(self, config: PreTrainedConfig) -> None:
        decoder = config.get_text_config(decoder=True)
        # A flat encoder-decoder config returns a new copy at every access, and a copy would not see a switch.
        self.config = decoder if decoder is config.get_text_config(decoder=True) else config

    def __call__(self) -> bool:
        if torch.compiler.is_compiling():
            return self.config._attn_implementation == ATTENTION_NAME
        # Attribute access on a configuration runs Python code, 5 us per layer and step: read its __dict__ instead.
        fields = object.__getattribute__(self.config, "__dict__")
        name = fields.get("_attn_implementation_internal") or self.config._attn_implementation
        return name == ATTENTION_NAME

    def __deepcopy__(self, memo: dict) -> LiveAttention:
        return self


def raw_nbytes(layers: Iterable[Any]) -> int:
    """Bytes of the storages behind the tensors of transformers' layers. A storage can be larger than its tensor."""
    storages = (x.untyped_storage() for x in tensors_in([vars(layer) for layer in layers]))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def check_config(config: Any) -> None:
    """Raise ValueError if `config` is not a model's configuration."""
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config={shown(config)} is not supported; allowed: the model's configuration (model.config)")


def owning_layers(config: PreTrainedConfig) -> int:
    """The number of decoder layers that keep their own keys and values. They are the first layers.

    In Gemma 3n and 4, the last layers read the keys and values of earlier layers. In T5, `num_hidden_layers` counts the
    encoder. Some versions of transformers make a cache with more layers; a model never reaches those.
    """
    decoder = config.get_text_config(decoder=True)
    layers = getattr(decoder, "num_decoder_layers", None) if decoder.is_encoder_decoder else None
    return (layers or decoder.num_hidden_layers) - (getattr(decoder, "num_kv_shared_layers", None) or 0)


def is_latent(config: PreTrainedConfig) -> bool:
    """Whether a model has multi-head latent attention. It expands the cached latent, so it needs the dense tensor."""
    return getattr(config.get_text_config(decoder=True), "kv_lora_rank", None) is not None


def never_packed() -> bool:
    """The `reads_packed` of a model with latent attention."""
    return False


class Compression:
    """Compression ratios, from the byte counts of a subclass."""

    nbytes: int
    resident_nbytes: int
    dense_nbytes: int

    @property
    def compression_ratio(self) -> float:
        """`dense_nbytes` / `resident_nbytes`: how many times smaller than a 16-bit cache, all counted; 1 if empty."""
        resident = self.resident_nbytes
        return self.dense_nbytes / resident if resident else 1.0

    @property
    def compression_ratio_in_use(self) -> float:
        """`dense_nbytes` / `nbytes`: the same without the room allocated ahead; 1 if empty."""
        used = self.nbytes
        return self.dense_nbytes / used if used else 1.0


class PackedCache(Compression, Cache):
    """A cache whose full-attention layers are packed; the others are transformers' own.

    Attributes:
        preset: the preset of all packed layers.
        profile: the profile that the packed layers use, or None.
        graph: let `generate` record decode steps in CUDA graphs (`turboquant_hf.generation`).
        graph_nbytes: bytes of the graphs that a running `generate` has recorded; counted in `spare_nbytes`.
        recorded: whether a running `generate` records its steps over this cache. It then compiles nothing.
        excess_steps: how many steps a running `generate` may take too many (`generation.ahead`), or None.
    """

    kinds: tuple[type, ...]
    """The layer classes of transformers that packed layers replace."""
    preset: CachePreset
    profile: Profile | None = None
    offloader: Offloader | None = None
    graph = True
    graph_nbytes = 0
    recorded = False
    excess_steps: int | None = None

    @classmethod
    def from_upstream(
        cls, cache: Cache, config: PreTrainedConfig, preset: CachePreset, offloading: bool = False
    ) -> PackedCache:
        """Build a packed cache from an empty cache of transformers. Its special layers are kept as they are."""
        new = cls.__new__(cls)
        vars(new).update(vars(cache))
        new.preset, new.layers = preset, list(cache.layers)
        new._pack_layers(config, offloading)
        return new

    def _pack_layers(self, config: PreTrainedConfig, offloading: bool = False) -> None:
        check_flag("offloading", offloading)
        # Not upstream's `offloading`, which would move whole layers.
        self.offloader = Offloader() if offloading else None
        self.model_fields = model_fields(config)
        self.layer_class_to_replicate = None
        latent = is_latent(config)
        head_dim = config_field(config.get_text_config(decoder=True), "head_dim")
        if isinstance(head_dim, int) and not latent:
            self.preset.validate(head_dim)
        reads_packed = never_packed if latent else LiveAttention(config)
        packed = [i for i, layer in enumerate(self.layers[: owning_layers(config)]) if type(layer) in self.kinds]
        self.preset.check_layers(len(packed))
        self.profile = profile_for(self.preset, config, len(packed))
        for ordinal, index in enumerate(packed):
            sides = self.preset.layer_quantizers(ordinal, len(packed))
            if self.profile is not None:
                sides = self.profile.quantizers(ordinal, *sides)
            self.layers[index] = self._packed(self.layers[index], *sides, reads_packed)

    def _packed(self, layer: CacheLayerMixin, keys: Quantizer, values: Quantizer, reads_packed: Any) -> CacheLayerMixin:
        """Make the packed layer that replaces an empty layer of transformers."""
        raise NotImplementedError

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Append [B, H, T, D] keys and values to a layer, as in upstream's caches; returns what attention reads.

        Raises:
            ValueError: the model has more layers than the cache was made for.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this cache was made for a model of {len(self.layers)} layers, and this model has more (it asks for "
                f"layer {layer_idx}); allowed: a cache of its own configuration, {type(self).__name__}(model.config)"
            )
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """Upstream's rule, written out: torch 2.11 can trace neither `super()` nor `bool` of a list here."""
        return len(self.layers) > 0 and not self.recorded and all(layer.is_compileable for layer in self.layers)

    @property
    def packed_layers(self) -> list[TurboQuantLayer]:
        """The layers that hold packed tiles, in order; of a hybrid layer, its attention part."""
        return [part for part in map(packed_part, self.layers) if part is not None]

    @property
    def tokens(self) -> int:
        """Tokens per sequence, padding included; 0 if no layer counts its tokens."""
        return max((layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)), default=0)

    def note_padding(self, attention_mask) -> None:
        """Tell an empty cache where each sequence begins, from a 0/1 mask [B, T] of left-padded input.

        `generate` calls this itself. Without it, padding still never reaches the output, and attention "turboquant"
        learns from the masks of prompts where sequences begin. With another attention, padding counts as tokens when
        sinks are chosen and keys are measured. None removes an earlier note.

        Raises:
            ValueError: the mask is not a tensor.
        """
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                f"attention_mask={shown(attention_mask)} is not supported; allowed: a tensor [B, T] of zeros and ones, "
                "or None"
            )
        if self.tokens:
            return
        padded = attention_mask is not None and attention_mask.dim() == 2
        starts = (attention_mask != 0).int().argmax(dim=1).tolist() if padded else None
        for layer in self.packed_layers:
            layer.note_padding(starts)

    @property
    def nbytes(self) -> int:
        """Bytes in use: packed tiles, scales, means, sinks, tail, statistics, shared rotations, raw layers."""
        shared = {}
        for layer in self.packed_layers:
            if layer.is_initialized:
                for quantizer, dim in zip(layer.quantizers, layer.head_dims, strict=True):
                    shared[quantizer, dim] = quantizer.shared_nbytes(dim)
        return sum(layer.nbytes for layer in self.packed_layers) + sum(shared.values()) + self._raw_nbytes()

    @property
    def spare_nbytes(self) -> int:
        """Bytes allocated ahead: room for new tokens, staging of offloaded tiles, graphs. `nbytes` leaves them out."""
        staging = self.offloader.staging_nbytes if self.offloader is not None else 0
        return sum(layer.spare_nbytes for layer in self.packed_layers) + staging + self.graph_nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same tokens take in a 16-bit DynamicCache."""
        return sum(layer.dense_nbytes for layer in self.packed_layers) + self._raw_nbytes()

    @property
    def resident_nbytes(self) -> int:
        """Bytes allocated: `nbytes` and the room for tokens to come, `spare_nbytes`."""
        return self.nbytes + self.spare_nbytes

    def _raw_nbytes(self) -> int:
        return raw_nbytes(layer for layer in self.layers if not isinstance(layer, TurboQuantLayer))

    def __repr__(self) -> str:
        packed = len(self.packed_layers)
        resident, used, dense = self.resident_nbytes, self.nbytes, self.dense_nbytes
        size = f"resident bytes={resident:,}"
        if used and dense:
            size += f", {_times(dense, resident)} than 16 bit; {used:,} in use, {_times(dense, used)}"
        return (
            f"{type(self).__name__}(preset={self.preset.label!r}, tokens={self.tokens}, "
            f"layers={len(self.layers)} ({packed} packed), {size})"
        )


def _times(dense: int, held: int) -> str:
    """The words "2.00x smaller" for a cache of `held` bytes beside one of `dense` bytes."""
    return f"{dense / held:.2f}x smaller" if held <= dense else f"{held / dense:.2f}x larger"
