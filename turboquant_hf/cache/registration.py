"""Teach `generate` the names "turboquant" and "turboquant_static": transformers keeps no registry of caches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import configuration_utils
from transformers.utils.generic import is_flash_attention_requested

from turboquant_hf.cache.base import ATTENTION_NAME, PackedCache
from turboquant_hf.cache.cache import TurboQuantCache
from turboquant_hf.cache.defaults import cache_defaults, complete
from turboquant_hf.cache.given import check_given
from turboquant_hf.cache.messages import (
    AS_WITHOUT,
    OWN_STATE,
    USE_CACHE_OFF,
    logger,
    tell,
    tell_advice,
    tell_attentions,
    tell_coverage,
    tell_dense,
    tell_unused,
)
from turboquant_hf.cache.ring import STEP_TOKENS
from turboquant_hf.cache.serving import NO_CONTINUOUS_BATCHING, answers_clients
from turboquant_hf.cache.static import TurboQuantStaticCache
from turboquant_hf.cache.switching import (
    asks_for_attentions,
    attention_of,
    could_switch,
    undo_switch,
    use_turboquant_attention,
    why_dense,
)
from turboquant_hf.cache.wrapping import wrap_once
from turboquant_hf.checks import check_flag, check_json, check_keys
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, load_preset
from turboquant_hf.names import CACHE_NAME, STATIC_NAME, UPSTREAM, add_cache_names, cache_argument

ATTENTION_CHOICES = ("auto", "keep")


def register_cache() -> bool:
    """Add both names and wrap the method that builds caches. Idempotent.

    Returns:
        False if this version of transformers refuses a name; `past_key_values=` still works then.
    """
    add_cache_names(configuration_utils)
    wrap_once("_prepare_cache_for_generation", _wrap)
    wrap_once("_prefill", _watch_prefill)
    wrap_once("init_continuous_batching", _refuse_continuous_batching)
    try:
        for ours in UPSTREAM:
            GenerationConfig(cache_implementation=ours).validate()
    except ValueError as error:
        logger.warning_once(
            f'turboquant_hf: this transformers refuses cache_implementation="{ours}" ({error}); '
            "pass past_key_values=TurboQuantCache(model.config) instead."
        )
        return False
    return True


def _wrap(original):
    signature = inspect.signature(original)

    @functools.wraps(original)
    @answers_clients
    def prepare(self, *args: Any, **kwargs: Any):
        bound = signature.bind(self, *args, **kwargs).arguments
        generation_config, model_kwargs = bound["generation_config"], bound["model_kwargs"]
        complete(generation_config, model_kwargs, type(self).__name__)
        wanted = generation_config.cache_implementation
        wanted = wanted if wanted in UPSTREAM else None
        name = cache_argument(model_kwargs)
        given = model_kwargs[name] if name else None
        _check_attention(self)
        asks = asks_for_attentions(self, generation_config)
        if asks:
            undo_switch(self)  # an earlier call may have switched; attentions must be the model's own, to the last bit
        if wanted and getattr(generation_config, "is_assistant", False):
            # An assistant's cache is cropped at every step and is small: let transformers choose.
            generation_config.cache_implementation = None
            return original(self, *args, **kwargs)
        if not wanted or given is not None:
            own = getattr(given, "self_attention_cache", given)
            if isinstance(own, PackedCache):
                check_given(self, own, generation_config, model_kwargs)
            result = original(self, *args, **kwargs)
            if isinstance(given, TurboQuantStaticCache):
                _check_room(given, bound["max_cache_length"])
            if isinstance(given, PackedCache):
                _advise(self, given)
                given.note_padding(_prompt_mask(model_kwargs, given))
            return result
        preset, attention, offloading, graph = parse_cache_config(generation_config.cache_config)
        generation_config.cache_implementation = UPSTREAM[wanted][0]
        # Upstream would allocate its static cache at once for a prompt in chunks; here it only shows the layers.
        chunk, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None
        if getattr(bound["generation_mode"], "value", None) == "assisted_generation":
            # Assisted decoding checks candidates beyond the last token of the answer, and crops them.
            bound["max_cache_length"] += STEP_TOKENS + (generation_config.prompt_lookup_num_tokens or 0)
        kept = self.__dict__.pop("_cache", None)  # early versions keep a static cache for the next call
        try:
            result = original(**bound)
        finally:
            generation_config.cache_implementation, generation_config.prefill_chunk_size = wanted, chunk
            self.__dict__.pop("_cache", None)
            if kept is not None:
                self.__dict__["_cache"] = kept
        name = cache_argument(model_kwargs)
        if name is None:
            tell(self, USE_CACHE_OFF if generation_config.use_cache is False else OWN_STATE)
            return result
        model_kwargs[name], packed = _convert(self, model_kwargs[name], preset, offloading, model_kwargs)
        if packed:
            model_kwargs[name].graph = graph
        if wanted == STATIC_NAME:
            _restore_mask(self, generation_config, model_kwargs, bound["batch_size"])
        if packed:
            _choose_attention(self, attention, asks)
        return result

    return prepare


def _choose_attention(model: Any, attention: str, asks: bool) -> None:
    """Switch to the attention that reads packed tiles, or log why not.

    Args:
        attention: the user's choice, one of `ATTENTION_CHOICES`.
        asks: whether the call wants attention weights, which the model's own attention then gives.
    """
    if why_dense(model):
        tell_dense(model, why_dense(model))
    elif attention == "auto" and asks and could_switch(model):
        tell_attentions(model, attention_of(model))
    elif attention == "auto" and not asks:
        use_turboquant_attention(model)


def _restore_mask(model: Any, generation_config: GenerationConfig, model_kwargs: dict, batch_size: int) -> None:
    """Restore the mask of ones that flash attention needs to leave out the empty slots of a static cache.

    Newer versions drop a mask of ones, except for their own cache named "static".
    """
    length = getattr(generation_config, "_mask_length", None)
    if length and model_kwargs.get("attention_mask", 0) is None and is_flash_attention_requested(model.config):
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=model.device)


def _advise(model: Any, cache: PackedCache) -> None:
    """Log which layers the user's own cache does not compress, and which attention would read it better."""
    if not model._supports_default_dynamic_cache():
        return  # whether the model uses the cache is known after the prefill
    tell_coverage(model, cache)
    if cache.packed_layers and why_dense(model):
        tell_dense(model, why_dense(model))
    elif cache.packed_layers and could_switch(model):
        tell_advice(model, attention_of(model), ATTENTION_NAME)


def parse_cache_config(cache_config: Any):
    """(preset, attention choice, offloading, graph) from generate's `cache_config`, which is not changed."""
    if cache_config is not None and not isinstance(cache_config, Mapping):
        raise ValueError(
            f"cache_config={cache_config!r} is not supported; allowed: a mapping, such as "
            f'{{"preset": "{DEFAULT_PRESET}"}}'
        )
    options = dict(cache_config or {})
    check_json("cache_config", options)
    check_keys("cache_config", options, {"attention", "graph", "offloading", "preset", *CachePreset.field_names()})
    attention = options.pop("attention", "auto")
    if attention not in ATTENTION_CHOICES:
        raise ValueError(
            f"cache_config: attention={attention!r} is not supported; allowed: {', '.join(ATTENTION_CHOICES)}"
        )
    offloading, graph = options.pop("offloading", False), check_flag("graph", options.pop("graph", True))
    return load_preset(options.pop("preset", DEFAULT_PRESET), **options), attention, offloading, graph


def _check_room(cache: TurboQuantStaticCache, tokens: int) -> None:
    """Raise ValueError, before anything runs, if prompt and answer do not fit into the user's own cache."""
    room = [layer.max_cache_len for layer in cache.packed_layers]
    if room and tokens > room[0]:
        raise ValueError(
            f"max_cache_len={room[0]} of the given cache is not enough for this call; allowed: {tokens} and more"
        )


def _convert(model: Any, cache: Any, preset: Any, offloading: Any, model_kwargs: dict) -> tuple[Any, bool]:
    """(the cache to use, whether it packs anything)."""
    if isinstance(cache, EncoderDecoderCache):
        packed = _pack(cache.self_attention_cache, model.config, preset, offloading)
        cache.self_attention_cache = packed
        tell_coverage(model, packed)
        return cache, bool(packed.packed_layers)
    if type(cache) not in (DynamicCache, StaticCache):
        tell(model, f"it brings its own {type(cache).__name__}, which is kept: nothing is compressed, {AS_WITHOUT}.")
        return cache, False
    packed = _pack(cache, model.config, preset, offloading)
    tell_coverage(model, packed)
    packed.note_padding(_prompt_mask(model_kwargs, packed))
    return packed, bool(packed.packed_layers)


def _pack(cache: Any, config: Any, preset: Any, offloading: Any) -> PackedCache:
    """Our cache, made from upstream's empty dynamic or static cache."""
    ours = TurboQuantStaticCache if isinstance(cache, StaticCache) else TurboQuantCache
    return ours.from_upstream(cache, config, preset, offloading)


def _prompt_mask(model_kwargs: dict, cache: PackedCache):
    """The prompt's 2D mask, if it can tell the left padding of an empty cache."""
    mask = model_kwargs.get("attention_mask")
    return None if "decoder_attention_mask" in model_kwargs or cache.tokens else mask


def _check_attention(model: Any) -> None:
    if attention_of(model) == ATTENTION_NAME and not model._can_set_attn_implementation():
        raise ValueError(
            f'{type(model).__name__} has its attention in its own code and cannot use attn_implementation="'
            f'{ATTENTION_NAME}"; load it without. cache_implementation="{CACHE_NAME}" then gives it dense tensors.'
        )


def _watch_prefill(original: Callable) -> Callable:
    """Log if a model has read its prompt without the cache: PEFT's prefix tuning replaces it, RWKV ignores it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def prefill(self, *args: Any, **kwargs: Any):
        model_kwargs = signature.bind(self, *args, **kwargs).arguments["model_kwargs"]
        given = model_kwargs.get(cache_argument(model_kwargs))
        outputs = original(self, *args, **kwargs)
        ours = getattr(given, "self_attention_cache", given)
        layers = ours.packed_layers if isinstance(ours, PackedCache) else []
        if layers and not any(layer.is_initialized for layer in layers):
            tell_unused(self, given, outputs.get(cache_argument(outputs)))
        return outputs

    return prefill


def _refuse_continuous_batching(original: Callable) -> Callable:
    """Raise an error for `generate_batch`, which would silently use its own paged cache."""

    @functools.wraps(original)
    @answers_clients
    def init(self, generation_config=None, *args: Any, **kwargs: Any):
        config = self.generation_config if generation_config is None else generation_config
        defaults = cache_defaults()
        by_default = defaults is not None and defaults.cache_implementation is not None
        named = getattr(config, "cache_implementation", None) in UPSTREAM
        if named or by_default or attention_of(self) == ATTENTION_NAME:
            raise ValueError(NO_CONTINUOUS_BATCHING)
        return original(self, generation_config, *args, **kwargs)

    return init
