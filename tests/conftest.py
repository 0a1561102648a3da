"""Shared by all tests: the hypothesis profile, the `gpu` marker, a tiny llama."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import LlamaConfig, LlamaForCausalLM

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def make_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    """A random llama whose answers depend on its whole history. It never stops by itself."""
    sizes = {
        "vocab_size": 199,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Two layers, 4 heads on 2 KV heads of 8 channels, float32, attention "sdpa"."""
    return make_llama()


@pytest.fixture
def small_llama():
    """The function that makes `llama`, for tests that need other sizes: small_llama(head_dim=64, seed=1)."""
    return make_llama
