"""The calls of `generate` that tests make: a prompt, a cache of small tiles, a fixed seed and number of tokens."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

TILES = {"tile": 8, "recent_window": 8, "sinks": 4, "min_statistics": 16}
"""Options of a preset with which a prompt of 41 tokens fills several tiles."""
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
"""Options of `generate` with which it returns `.sequences` and `.logits`."""


def inputs_of(batch: int = 2, length: int = 45, padding: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random token ids and a mask, [batch, length]; the last sequence begins with `padding` tokens of padding."""
    ids = torch.randint(3, 199, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[-1, :padding] = mask[-1, :padding] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def turboquant(preset: str = "lossless", *, static: bool = False, **config) -> dict:
    """The options of `generate` that ask for a packed cache with small tiles."""
    name = "turboquant_static" if static else "turboquant"
    return {"cache_implementation": name, "cache_config": {"preset": preset, **TILES, **config}}


def generate(model, inputs, cache=None, *, new: int = 24, **options):
    """`model.generate` from a fixed seed: `new` tokens per sequence, the most likely ones unless options say otherwise.

    Args:
        inputs: named inputs, or token ids [B, T] without padding.
        cache: None, or a cache of the test's own.
    """
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    if cache is not None:
        options["past_key_values"] = cache
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **options})


class Dictated(LogitsProcessor):
    """Dictates the sequences: `tokens`, [B, T], whatever the logits are."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, input_ids.shape[1], None], 0.0)


def assert_same(got, expected, *, atol: float = 2e-4, rtol: float = 2e-4) -> None:
    """Two results with `LOGITS` have equal tokens and nearly equal logits."""
    assert torch.equal(got.sequences, expected.sequences)
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda text, step=step: f"step {step}: {text}")
