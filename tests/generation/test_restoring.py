"""restore_attention gives a model back its own attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.support.attentions import EAGER, PACKED, attention_of, check_same, eager_model, generate
from tests.support.generating import TILES
from turboquant_hf import TurboQuantCache, restore_attention


@pytest.fixture
def ids():
    return torch.randint(3, 198, (1, 41), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def composite():
    """A model of two parts with different attentions."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=199, num_key_value_heads=2, bos_token_id=1, eos_token_id=None, **sizes),
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=32, **sizes),
        image_token_index=198,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"vision_config": "eager"})
    return model


def attentions(model) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "wrapper": lambda model: torch.nn.ModuleDict({"wrapped": model}),
}


@pytest.mark.parametrize("how", COPIES)
def test_restore_attention(composite, ids, how):
    before = attentions(composite)
    assert set(before) == {"eager", "sdpa"}
    for _ in range(2):
        generate(composite, ids, **PACKED)
        assert attention_of(composite) == "turboquant"
        model = COPIES[how](composite)
        assert restore_attention(model)
        assert attentions(model) == before
        assert not restore_attention(model)
    assert not any("turboquant" in name for name in vars(model)), "nothing is left behind"


@pytest.mark.parametrize("name", EAGER)
def test_restore_attention_of_a_saved_model(name, ids, tmp_path):
    model = eager_model(name)
    generate(model, ids, **PACKED)
    model.save_pretrained(tmp_path)
    assert "turboquant" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert not restore_attention(loaded)
    assert attention_of(loaded) == "eager"
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="turboquant")
    assert restore_attention(loaded)
    assert attention_of(loaded) == "eager", "by hand: what transformers picks by itself"


def test_a_choice_made_since_the_switch_stays(llama, ids):
    generate(llama, ids, **PACKED)
    llama.set_attn_implementation("eager")
    assert not restore_attention(llama)
    assert attention_of(llama) == "eager"
    llama.set_attn_implementation("sdpa")
    assert not restore_attention(llama)


def test_attention_set_by_hand_is_left_to_a_call_that_asks_for_attentions(llama, ids):
    llama.set_attn_implementation("eager")
    expected = generate(llama, ids, output_attentions=True)
    llama.set_attn_implementation("turboquant")
    check_same(generate(llama, ids, output_attentions=True, **PACKED), expected)
    assert attention_of(llama) == "turboquant"


def test_restore_attention_refuses_what_is_not_a_model(llama):
    with pytest.raises(ValueError, match="model=LlamaConfig is not supported; allowed: a model"):
        restore_attention(llama.config)


@torch.no_grad()
def test_restoring_behind_a_live_cache(llama, ids):
    """The cache notices at once that it must return dense tensors."""
    expected = llama(ids).logits
    llama.set_attn_implementation("turboquant")
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    llama(ids[:, :30], past_key_values=cache)
    restore_attention(llama)
    torch.testing.assert_close(llama(ids[:, 30:], past_key_values=cache).logits, expected[:, 30:])
