"""Calls of `generate` that return attentions, and what they are compared by."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support import generating
from tests.support.families import build, family_named
from tests.support.generating import turboquant

EAGER = ["gpt_oss", "gemma2"]
PACKED = turboquant()
generate = partial(generating.generate, new=9, return_dict_in_generate=True)


def attention_of(model) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def check_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.attentions) == len(expected.attentions)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


def eager_model(name):
    """A model whose default attention is "eager", which returns attentions."""
    model = build(family_named(name))
    if attention_of(model) != "eager":
        pytest.skip("with this transformers the model starts with SDPA")
    model.generation_config.eos_token_id = 198  # one that prompt lookup can compare with
    model.generation_config.suppress_tokens = [198]
    return model
