"""Log lines about a model: one line per class and situation. Each says what the situation means for memory."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from turboquant_hf.cache.hybrid import packed_part

logger = logging.get_logger("turboquant_hf")

AS_WITHOUT = "memory is what it is without turboquant_hf"
OWN_STATE = f"the model keeps its own state, in no cache of generate's: nothing is compressed, {AS_WITHOUT}."
USE_CACHE_OFF = "use_cache=False, so there is no cache to compress; allowed: use_cache=True."


def tell(model: Any, text: str) -> None:
    """Log a line with the model's class name, once per class and text."""
    logger.warning_once(f"turboquant_hf: {type(model).__name__}: {text}")


def tell_coverage(model: Any, cache: Any) -> None:
    """Log which layers keep every token and are not packed, or that nothing is packed."""
    packed = cache.packed_layers
    others = [layer for layer in cache.layers if packed_part(layer) is None and isinstance(layer, CacheLayerMixin)]
    growing = [type(layer).__name__ for layer in others if not getattr(layer, "is_sliding", False)]
    kept = ", ".join(f"{growing.count(name)} {name}" for name in dict.fromkeys(growing))
    if packed and kept:
        tell(model, f"{len(packed)} layers are compressed; {kept} keep every token uncompressed.")
    elif kept:
        tell(
            model,
            f"nothing is compressed: this package packs plain full-attention layers only. {kept} keep every token "
            f"uncompressed: {AS_WITHOUT}.",
        )
    elif not packed:
        tell(
            model,
            "nothing is compressed: no layer keeps every token (sliding windows and recurrent states have a fixed "
            f"size). {AS_WITHOUT.capitalize()} and stops growing by itself.",
        )


def tell_unused(model: Any, given: Any, returned: Any) -> None:
    """Log that a model has read a prompt and left the given cache empty."""
    if returned is not None and returned is not given:
        what = f"a {type(returned).__name__} replaced the {type(given).__name__} (PEFT's prefix tuning does this)"
    else:
        what = f"the model does not use the {type(given).__name__} that it was given"
    tell(model, f"{what}: nothing is compressed, {AS_WITHOUT}.")


def tell_dense(model: Any, why: str) -> None:
    tell(
        model,
        f"{why} needs dense keys and values: the cache is compressed in memory, and decoded one layer at a time at "
        "every step, which takes time.",
    )


def tell_eager_steps(model: Any, why: str) -> None:
    tell(model, f"decode steps run without CUDA graphs: {why}.")


def tell_switch(model: Any, before: str, now: str) -> None:
    tell(
        model,
        f'attention switched from "{before}" to "{now}", which can read packed tiles (dense tensors still go to SDPA). '
        "The switch outlives this call; turboquant_hf.restore_attention(model) undoes it, and "
        'cache_config={"attention": "keep"} avoids it.',
    )


def tell_attentions(model: Any, attention: str) -> None:
    hint = ' "sdpa" returns no attentions; "eager" and "turboquant", set by hand, do.' if attention == "sdpa" else ""
    tell(
        model,
        f'this call asks for attentions, so it runs with the model\'s own attention "{attention}", which reads decoded '
        f"tensors at every step and shows the cache no queries: same memory, slower, less accurate.{hint}",
    )


def tell_advice(model: Any, attention: str, better: str) -> None:
    tell(
        model,
        f'the model\'s attention is "{attention}", which reads decoded tensors at every step and shows the cache no '
        f'queries: same memory, but model.set_attn_implementation("{better}") is faster and more accurate.',
    )
