"""Finds out what a model keeps in its cache, from the model's configuration alone.

There is no table of model families. The decoder is built on the meta device, which holds shapes and no numbers, and
reads two tokens. Its cache then shows what every layer keeps, in the shapes of the model's own code. This takes no
memory, and one or two seconds for a large model.
"""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from turboquant_hf.names import CACHE_ARGUMENTS

TOKENS = 2
"""Tokens of the prompt that is read. It is not one, because some models treat a single token differently."""


def probed_layers(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """transformers' cache layers of one sequence after `TOKENS` tokens, their tensors on the meta device.

    Layers that keep nothing of their own are left as they were made.

    Returns: those of self-attention, and those of an encoder-decoder's cross-attention, after `TOKENS` tokens of the
        encoder.

    Args:
        config: the model's configuration.
        dtype: the model's dtype.

    Raises:
        ValueError: the model cannot be built or run without numbers, or uses no cache of transformers.
    """
    try:
        return _run(config, dtype)
    except Exception as error:  # whatever a model's own code raises
        raise ValueError(
            f"config: what a {config.model_type!r} model keeps in its cache cannot be told from its configuration "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error


def _run(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    decoder = _decoder(config, dtype)
    cache, cross = (DynamicCache(config=config.get_text_config(decoder=True)) for _ in range(2))
    given, inputs = cache, {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long, device="meta")}
    if config.is_encoder_decoder:
        given = EncoderDecoderCache(cache, cross)
        width = decoder.get_input_embeddings().weight.shape[1]
        inputs["encoder_hidden_states"] = torch.zeros(1, TOKENS, width, dtype=dtype, device="meta")
    with torch.no_grad():
        decoder(**inputs, use_cache=True, **{cache_parameter(type(decoder)): given})
    return cache.layers, cross.layers if config.is_encoder_decoder else []


@lru_cache(maxsize=256)
def cache_parameter(kind: type) -> str:
    """The argument by which a model class takes its cache: `cache` from transformers 5.24 on."""
    taken = inspect.signature(kind.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in taken), CACHE_ARGUMENTS[-1])


def _decoder(config: PreTrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The text decoder on the meta device, in eval mode."""
    # Eager masks and batched experts read no numbers. Without a padding token, no code searches for it.
    options = {"dtype": dtype, "attn_implementation": "eager"}
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        part._experts_implementation, part.pad_token_id = "batched_mm", None
    with torch.device("meta"):
        if not config.is_encoder_decoder and type(text) in AutoModel._model_mapping:
            return AutoModel.from_config(text, **options).eval()
        return AutoModel.from_config(config, **options).eval().get_decoder()
