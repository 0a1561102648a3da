"""Switches a model's attention to "turboquant", and back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from turboquant_hf.cache.base import ATTENTION_NAME, is_latent
from turboquant_hf.cache.messages import tell_switch

RECORD = "_turboquant_switched_from"
"""The attribute in which a switched model keeps {path of a configuration: its attention before the switch}."""


def attention_of(model: Any) -> str | None:
    return model.config.get_text_config(decoder=True)._attn_implementation


def default_attention(model: Any) -> str:
    """The attention that transformers picks: "sdpa", or "eager" for models with soft-caps or sinks."""
    interface_only = getattr(model, "_supports_attention_backend", False) and not getattr(model, "_supports_sdpa", True)
    return "eager" if interface_only else "sdpa"


def why_dense(model: Any) -> str | None:
    """What prevents a model from reading packed tiles under any attention, or None."""
    if is_latent(model.config):
        return "multi-head latent attention"
    if not model._can_set_attn_implementation():
        return "an attention in the model's own code"
    return None


def could_switch(model: Any) -> bool:
    """Whether the model has the default attention and could use "turboquant" instead."""
    return attention_of(model) == default_attention(model) and why_dense(model) is None


def use_turboquant_attention(model: Any) -> bool:
    """Switch a model from the default attention to "turboquant"; returns whether it has that attention now."""
    if attention_of(model) == ATTENTION_NAME:
        return True
    if not could_switch(model):
        return False
    before = {where: config._attn_implementation for where, config in _configs(model).items()}
    current = attention_of(model)
    model.set_attn_implementation(ATTENTION_NAME)
    vars(model)[RECORD] = before
    tell_switch(model, current, ATTENTION_NAME)
    return attention_of(model) == ATTENTION_NAME


def restore_attention(model: torch.nn.Module) -> bool:
    """Restore the attention that a model had before `generate` switched it to "turboquant".

    A model whose attention was set to "turboquant" by hand gets the attention that transformers picks. A model with
    another attention is left as it is. A wrapper around the model (PEFT, torch.compile, data parallel) works too.

    Args:
        model: any module that is, or holds, a transformers model.

    Returns:
        Whether anything changed.

    Raises:
        ValueError: `model` is not a module.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from turboquant_hf import restore_attention
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1))
        >>> ids = torch.ones(1, 4, dtype=torch.long)
        >>> _ = model.generate(ids, max_new_tokens=2, pad_token_id=0, cache_implementation="turboquant")
        >>> restore_attention(model), model.config._attn_implementation
        (True, 'sdpa')
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model={type(model).__name__} is not supported; allowed: a model (torch.nn.Module)")
    changed = [undo_switch(module) for module in model.modules()]
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and attention_of(module) == ATTENTION_NAME:
            _set(module, {"": module.get_correct_attn_implementation(None)})
            changed.append(True)
    return any(changed)


def undo_switch(model: torch.nn.Module) -> bool:
    """Undo the switch of this model. If the user has chosen another attention since then, that choice stays."""
    before = vars(model).pop(RECORD, None)
    if before is None or attention_of(model) != ATTENTION_NAME:
        return False
    _set(model, before)
    return True


def asks_for_attentions(model: Any, generation_config: Any) -> bool:
    """Whether a call of generate asks for attention weights, by its arguments or by the model's configuration."""
    holders = (generation_config, model.config, model.config.get_text_config(decoder=True))
    return any(getattr(holder, "output_attentions", False) for holder in holders)


def _set(model: Any, names: dict[str, str]) -> None:
    """Replace "turboquant" in every configuration by names[path], or by names[""] where the path is missing."""
    for where, config in _configs(model).items():
        if config._attn_implementation == ATTENTION_NAME:
            config._attn_implementation_internal = names.get(where, names[""])


def _configs(model: torch.nn.Module) -> dict[str, PreTrainedConfig]:
    """{path: configuration} of a model (path "") and its parts. Every object appears once."""
    modules = [(name, getattr(module, "config", None)) for name, module in model.named_modules()]
    waiting = [(name, config) for name, config in modules if isinstance(config, PreTrainedConfig)]
    found: dict[str, PreTrainedConfig] = {}
    seen: set[int] = set()
    for where, config in waiting:  # grows while it is read
        if id(config) not in seen:
            seen.add(id(config))
            found[where] = config
            parts = ((f"{where}/{part}", getattr(config, part, None)) for part in config.sub_configs)
            waiting.extend((name, part) for name, part in parts if isinstance(part, PreTrainedConfig))
    return found
