"""Teach `generate` the names "turboquant" and "turboquant_static": transformers keeps no registry of caches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from turboquant_hf.cache.cache import ATTENTION_NAME, TurboQuantCache, check_flag
from turboquant_hf.cache.static import TurboQuantStaticCache
from turboquant_hf.cache.static_plan import STEP_TOKENS
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, check_keys, load_preset

logger = logging.get_logger(__name__)

CACHE_NAME = "turboquant"
STATIC_NAME = "turboquant_static"
UPSTREAM = {
    CACHE_NAME: ("dynamic", ("DYNAMIC_CACHE_IMPLEMENTATIONS",)),
    STATIC_NAME: ("static", ("STATIC_CACHE_IMPLEMENTATIONS", "ALL_STATIC_CACHE_IMPLEMENTATIONS")),
}
"""Our names -> upstream's cache that is built first, and the tables beside the one of all names."""
ATTENTION_CHOICES = ("auto", "keep")
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What generate calls the cache among a model's arguments: the second name up to transformers 5.23."""


def register_cache() -> bool:
    """Add the name and wrap the one method that builds caches. Idempotent.

    Returns:
        False when this version of transformers refuses the name; `past_key_values=` works all the same.
    """
    for ours, (_, tables) in UPSTREAM.items():
        for table in ("ALL_CACHE_IMPLEMENTATIONS", *tables):
            names = getattr(configuration_utils, table, None)
            if names is not None and ours not in names:
                setattr(configuration_utils, table, type(names)((*names, ours)))
    original = GenerationMixin._prepare_cache_for_generation
    if not hasattr(original, "_turboquant_original"):
        GenerationMixin._prepare_cache_for_generation = _wrap(original)
    _refuse_continuous_batching()
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
    def prepare(self, *args: Any, **kwargs: Any):
        bound = signature.bind(self, *args, **kwargs).arguments
        generation_config, model_kwargs = bound["generation_config"], bound["model_kwargs"]
        wanted = generation_config.cache_implementation
        wanted = wanted if wanted in UPSTREAM else None
        name = _cache_argument(model_kwargs)
        given = model_kwargs[name] if name else None
        _check_attention(self)
        if wanted and getattr(generation_config, "is_assistant", False):
            # An assistant's cache is cropped at every step and is small: let transformers choose.
            generation_config.cache_implementation = None
            return original(self, *args, **kwargs)
        if not wanted or given is not None:
            result = original(self, *args, **kwargs)
            if isinstance(given, TurboQuantStaticCache):
                _check_room(given, bound["max_cache_length"])
            if isinstance(given, (TurboQuantCache, TurboQuantStaticCache)):
                _advise_attention(self, given)
                given.note_padding(_prompt_mask(model_kwargs, given))
            return result
        preset, attention, offloading, graph = _parse(generation_config.cache_config)
        generation_config.cache_implementation = UPSTREAM[wanted][0]
        # With chunks, upstream's static cache is allocated at once: it is only a pattern here.
        chunk, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None
        if getattr(bound["generation_mode"], "value", None) == "assisted_generation":
            # Candidates that are looked up in the prompt are checked, and cropped, even beyond the last token.
            bound["max_cache_length"] += STEP_TOKENS + (generation_config.prompt_lookup_num_tokens or 0)
        kept = self.__dict__.pop("_cache", None)  # early versions hold on to a static cache, to use it again
        try:
            result = original(**bound)
        finally:
            generation_config.cache_implementation, generation_config.prefill_chunk_size = wanted, chunk
            self.__dict__.pop("_cache", None)
            if kept is not None:
                self.__dict__["_cache"] = kept
        name = _cache_argument(model_kwargs)
        if name is None:
            if generation_config.use_cache is not False:
                logger.warning_once(
                    f"turboquant_hf: {type(self).__name__} keeps its state in a cache of another kind: "
                    "nothing is compressed."
                )
            return result
        model_kwargs[name], packed = _convert(model_kwargs[name], self.config, preset, offloading, model_kwargs)
        if packed:
            model_kwargs[name].graph = graph
        if wanted == STATIC_NAME:
            _restore_mask(self, generation_config, model_kwargs, bound["batch_size"])
        if packed and attention == "auto":
            use_turboquant_attention(self)
        return result

    prepare._turboquant_original = original
    return prepare


def _restore_mask(model: Any, generation_config: GenerationConfig, model_kwargs: dict, batch_size: int) -> None:
    """Give flash attention the mask of ones back by which it leaves out a static cache's empty slots.

    Newer versions drop such a mask, but not for the cache that they know by the name "static".
    """
    length = getattr(generation_config, "_mask_length", None)
    if length and model_kwargs.get("attention_mask", 0) is None and is_flash_attention_requested(model.config):
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=model.device)


def _advise_attention(model: Any, cache: TurboQuantCache | TurboQuantStaticCache) -> None:
    """Say once that a cache of the user's own is not read as it could be."""
    current = _attention_of(model)
    if cache.packed_layers and current == _default_attention(model) and model._can_set_attn_implementation():
        logger.warning_once(
            f'turboquant_hf: the model\'s attention is "{current}", which has the cache decoded at every step and '
            f'shows it no queries; model.set_attn_implementation("{ATTENTION_NAME}") is faster and more accurate.'
        )


def _cache_argument(model_kwargs: dict) -> str | None:
    """The name under which a cache is among a model's arguments, or None where there is none."""
    return next((name for name in CACHE_ARGUMENTS if model_kwargs.get(name) is not None), None)


def _parse(cache_config: Any):
    """(preset, attention choice, offloading, graph) from generate's `cache_config`, which is left as it is."""
    if cache_config is not None and not isinstance(cache_config, Mapping):
        raise ValueError(
            f"cache_config={cache_config!r} is not supported; allowed: a mapping, such as "
            f'{{"preset": "{DEFAULT_PRESET}"}}'
        )
    options = dict(cache_config or {})
    check_keys("cache_config", options, {"attention", "graph", "offloading", "preset", *CachePreset.field_names()})
    attention = options.pop("attention", "auto")
    if attention not in ATTENTION_CHOICES:
        raise ValueError(
            f"cache_config: attention={attention!r} is not supported; allowed: {', '.join(ATTENTION_CHOICES)}"
        )
    offloading, graph = options.pop("offloading", False), check_flag("graph", options.pop("graph", True))
    return load_preset(options.pop("preset", DEFAULT_PRESET), **options), attention, offloading, graph


def _check_room(cache: TurboQuantStaticCache, tokens: int) -> None:
    """Raise ValueError, before anything runs, where prompt and answer do not fit into a cache that the user gave."""
    room = [layer.max_cache_len for layer in cache.packed_layers]
    if room and tokens > room[0]:
        raise ValueError(
            f"max_cache_len={room[0]} of the given cache is not enough for this call; allowed: {tokens} and more"
        )


def _convert(cache: Any, config: Any, preset: Any, offloading: Any, model_kwargs: dict) -> tuple[Any, bool]:
    """(the cache to use, whether it packs anything)."""
    if isinstance(cache, EncoderDecoderCache):
        packed = _pack(cache.self_attention_cache, config, preset, offloading)
        cache.self_attention_cache = packed
        return cache, bool(packed.packed_layers)
    if type(cache) not in (DynamicCache, StaticCache):
        logger.warning_once(
            f"turboquant_hf: this model brings its own {type(cache).__name__}, which is kept: nothing is compressed."
        )
        return cache, False
    packed = _pack(cache, config, preset, offloading)
    if not packed.packed_layers:
        logger.warning_once(
            "turboquant_hf: this model has no full-attention layer with a growing cache: nothing is compressed."
        )
    packed.note_padding(_prompt_mask(model_kwargs, packed))
    return packed, bool(packed.packed_layers)


def _pack(cache: Any, config: Any, preset: Any, offloading: Any) -> TurboQuantCache | TurboQuantStaticCache:
    """Our cache in place of upstream's empty dynamic or static one."""
    if isinstance(cache, StaticCache):
        if offloading is not False:
            raise ValueError(f'offloading={offloading!r} is not supported by "{STATIC_NAME}"; allowed: false')
        return TurboQuantStaticCache.from_static(cache, config, preset)
    return TurboQuantCache.from_dynamic(cache, config, preset, offloading)


def _prompt_mask(model_kwargs: dict, cache: TurboQuantCache):
    """The prompt's 2D mask, where it speaks of left padding in an empty cache."""
    mask = model_kwargs.get("attention_mask")
    return None if "decoder_attention_mask" in model_kwargs or cache.tokens else mask


def use_turboquant_attention(model: Any) -> bool:
    """Switch a model from the default attention to the one that reads packed tiles; others are left alone."""
    current = _attention_of(model)
    if current == ATTENTION_NAME:
        return True
    if current != _default_attention(model) or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(ATTENTION_NAME)
    logger.warning_once(
        f'turboquant_hf: switched the model\'s attention from "{current}" to "{ATTENTION_NAME}", which reads the '
        'packed cache (dense tensors still go to SDPA). cache_config={"attention": "keep"} leaves it as it is.'
    )
    return _attention_of(model) == ATTENTION_NAME


def _attention_of(model: Any) -> str | None:
    return model.config.get_text_config(decoder=True)._attn_implementation


def _default_attention(model: Any) -> str:
    """What transformers picks by itself: models that SDPA cannot serve (soft-caps, sinks) start with "eager"."""
    interface_only = getattr(model, "_supports_attention_backend", False) and not getattr(model, "_supports_sdpa", True)
    return "eager" if interface_only else "sdpa"


def _check_attention(model: Any) -> None:
    if _attention_of(model) == ATTENTION_NAME and not model._can_set_attn_implementation():
        raise ValueError(
            f'{type(model).__name__} has its attention in its own code and cannot use attn_implementation="'
            f'{ATTENTION_NAME}"; load it without, cache_implementation="{CACHE_NAME}" then gives it dense tensors.'
        )


def _refuse_continuous_batching() -> None:
    """`generate_batch` has a paged cache of its own; say so instead of silently using that."""
    original = getattr(GenerationMixin, "init_continuous_batching", None)
    if original is None or hasattr(original, "_turboquant_original"):
        return

    @functools.wraps(original)
    def init(self, generation_config=None, *args: Any, **kwargs: Any):
        config = self.generation_config if generation_config is None else generation_config
        if getattr(config, "cache_implementation", None) in UPSTREAM or _attention_of(self) == ATTENTION_NAME:
            raise ValueError(
                f'"{CACHE_NAME}" does not serve continuous batching (generate_batch), which brings its own paged cache '
                'and attention; use generate, or cache_implementation=None and model.set_attn_implementation("sdpa").'
            )
        return original(self, generation_config, *args, **kwargs)

    init._turboquant_original = original
    GenerationMixin.init_continuous_batching = init
