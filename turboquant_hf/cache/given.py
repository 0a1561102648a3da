"""Checks of a cache that the user gives to `generate`, made before anything runs."""

from __future__ import annotations

from typing import Any

from turboquant_hf.cache.serialization import model_fields

SHAPES = ("num_hidden_layers", "num_key_value_heads", "head_dim", "layer_types", "kv_lora_rank")
"""The fields of a configuration that decide the number, the kinds and the shapes of a cache's layers."""


def check_given(model: Any, cache: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a cache belongs to another model, or is not shorter than the prompt that comes with it.

    `generate` takes the whole prompt, cached tokens included, and feeds only what follows the cached tokens. It knows
    their number and not the tokens themselves: the caller must pass a prompt that begins with exactly these tokens.
    """
    mine, theirs = cache.model_fields, model_fields(model.config)
    for name in SHAPES:
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"the given cache was made for a model with {name}={mine.get(name)!r}, but {type(model).__name__} has "
                f"{theirs.get(name)!r}; allowed: a cache made from this model's configuration, "
                f"{type(cache).__name__}(model.config)"
            )
    prompt = _prompt_tokens(model, generation_config, model_kwargs)
    held = int(cache.tokens)
    if prompt is not None and held >= prompt:
        raise ValueError(
            f"the given cache holds {held} tokens and the prompt has {prompt}: the prompt must begin with the cached "
            "tokens and go on with new ones. If the cache also holds an answer, give a copy that was taken before it "
            f"(copy.deepcopy), or remove the answer with cache.crop({prompt - held - 1})"
        )


def _prompt_tokens(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt, cached ones included, by the length of its mask; None if there is no such mask."""
    if model.config.is_encoder_decoder:
        return None
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        return getattr(generation_config, "_mask_length", None)  # newer versions drop a mask of ones
    return mask.shape[1] if getattr(mask, "ndim", 0) == 2 else None
