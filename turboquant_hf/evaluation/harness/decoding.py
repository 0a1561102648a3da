"""Answers through a cache: prefill in chunks, greedy decoding, the likelihood of a given answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import torch
from transformers import Cache, DynamicCache

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation.harness.models import forward


def new_cache(model, preset: CachePreset | None) -> Cache:
    """An empty cache for `model`. Preset None gives the uncompressed cache."""
    return DynamicCache(config=model.config) if preset is None else TurboQuantCache(model.config, preset)


@torch.inference_mode()
def prefill(model, tokens: torch.Tensor, cache: Cache, chunk: int = 128) -> torch.Tensor:
    """Feed tokens [B, T] (no padding) `chunk` at a time, 0 for all at once; logits [B, V] after the last, float32."""
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    for piece in tokens.split(chunk or tokens.shape[1], dim=1):
        logits = forward(model, piece, cache, **options).logits[:, -1]
    return logits.float()


@torch.inference_mode()
def decode_greedy(
    model,
    logits: torch.Tensor,
    cache: Cache,
    steps: int,
    stop: Collection[int] = (),
    enough: Callable[[list[list[int]]], bool] = lambda sequences: False,
) -> list[list[int]]:
    """Up to `steps` most likely tokens for each of B sequences, from logits [B, V].

    A sequence ends before a token of `stop`. All sequences end when `enough` returns True for what is decoded so far.
    """
    chosen = []
    for step in range(steps):
        token = logits.argmax(dim=-1)
        chosen.append(token.tolist())
        running = [not any(row[i] in stop for row in chosen) for i in range(len(token))]
        if step + 1 == steps or not any(running) or enough(_cut(chosen, stop)):
            break
        logits = forward(model, token[:, None], cache).logits[:, -1]
    return _cut(chosen, stop)


def _cut(chosen: list[list[int]], stop: Collection[int]) -> list[list[int]]:
    """Turn tokens by step into tokens by sequence, each up to its first token of `stop`."""
    sequences = [list(tokens) for tokens in zip(*chosen, strict=True)]
    return [s[: next((i for i, token in enumerate(s) if token in stop), len(s))] for s in sequences]


@torch.inference_mode()
def answer_nll(model, logits: torch.Tensor, cache: Cache, answers: list[list[int]]) -> list[float]:
    """Mean negative log-likelihood (nats per token) of each answer, teacher-forced through a copy of the cache.

    Args:
        logits: [B, V] after the prompt.
        cache: the cache of the prompt; it is not changed.
        answers: B token lists, which may differ in length.
    """
    length = max(map(len, answers))
    tokens = torch.tensor([a + [a[-1]] * (length - len(a)) for a in answers], device=logits.device)
    counted = torch.tensor([[i < len(a) for i in range(length)] for a in answers], device=logits.device)
    if length > 1:
        rest = forward(model, tokens[:, :-1], copy.deepcopy(cache)).logits.float()
        logits = torch.cat([logits[:, None], rest], dim=1)
    else:
        logits = logits[:, None]
    nll = -logits.log_softmax(dim=-1).gather(2, tokens[:, :, None])[:, :, 0]
    return ((nll * counted).sum(dim=1) / counted.sum(dim=1)).tolist()


def stop_tokens(model, tokenizer) -> set[int]:
    """Tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
