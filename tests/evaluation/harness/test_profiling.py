"""Profiles are made of what attention sees: moments against the model's own tensors, and the share that is chosen."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.profiles import random_moment
from turboquant_hf import make_profile
from turboquant_hf.evaluation.harness import profiling
from turboquant_hf.evaluation.harness.profiling import Moments, best_share, output_weights, window_moments


def windows(count=2, length=200, seed=0):
    return list(torch.randint(3, 199, (count, length), generator=torch.Generator().manual_seed(seed)).split(1))


def seen_by_attention(model, window):
    """[(queries, keys, values)] of every layer, as a plain attention gets them."""
    seen = []

    def attend(module, query, key, value, mask, **options):
        seen.append((query[0], key[0], value[0]))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options["scaling"], enable_gqa=True
        ).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("seen", attend)
    model.set_attn_implementation("seen")
    with torch.no_grad():
        model(window)
    return seen


def test_moments_are_those_of_what_attention_reads(llama):
    window = windows(1, 4 + 2 * 128 + 50)[0]
    expected = seen_by_attention(llama, window)
    llama.set_attn_implementation("turboquant")
    found = window_moments(llama, window)
    for layer, (q, k, v) in enumerate(expected):
        q = q[:, 4:].double().unflatten(0, (2, 2)).flatten(1, 2)
        torch.testing.assert_close(found.queries[layer], q.transpose(1, 2) @ q / q.shape[1], rtol=1e-4, atol=1e-5)
        tiles = k[:, 4:260].double().unflatten(1, (2, 128))
        tiles = (tiles - tiles.mean(dim=2, keepdim=True)).flatten(1, 2)
        torch.testing.assert_close(found.keys[layer], tiles.transpose(1, 2) @ tiles / 256, rtol=1e-4, atol=1e-5)
        v = v[:, 4:].double()
        torch.testing.assert_close(found.values[layer], v.transpose(1, 2) @ v / v.shape[1], rtol=1e-4, atol=1e-5)


def test_output_weights_weigh_an_error_of_values_as_the_output_does(llama):
    moments = Moments([], [], [torch.zeros(2, 8, 8)] * 2)
    weights, known = output_weights(llama, moments)
    assert known == 2
    error = torch.randn(8)
    for layer, weight in zip(llama.model.layers, weights, strict=True):
        for head in range(2):
            reached = torch.zeros(4, 8)
            reached[2 * head] = error  # one query head after the other: their outputs do not add up coherently
            other = torch.zeros(4, 8)
            other[2 * head + 1] = error
            expected = sum(layer.self_attn.o_proj(x.flatten()).square().sum() for x in (reached, other))
            got = error.double() @ weight[head] @ error.double()
            torch.testing.assert_close(got, expected.double(), rtol=1e-4, atol=0.0)


def test_without_o_proj_channels_count_alike_and_it_is_said(llama):
    for layer in llama.model.layers:
        layer.self_attn.o_proj = Hidden(layer.self_attn.o_proj)
    weights, known = output_weights(llama, Moments([], [], [torch.zeros(2, 8, 8)] * 2))
    assert known == 0 and torch.equal(weights[0][1], torch.eye(8).double())
    said = []
    profile = make_profile(llama, windows(), values=True, note=said.append)
    assert said == ["values: 2 of 2 layers have no o_proj: their channels count alike"]
    assert profile.about["output_weights"] == "0 of 2 layers"


class Hidden(torch.nn.Module):
    """A linear layer whose weight nobody finds."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_the_share_that_predicts_least_error_is_chosen():
    moments = [random_moment(2, 16, seed) for seed in range(4)]
    # What was left out is like what was seen, but for correlations: full matrices fit noise.
    diagonal = [torch.diag_embed(x.diagonal(dim1=1, dim2=2)) for x in moments]
    assert best_share(moments[:1], moments[1:2], moments[:1], moments[1:2]) == 0.0
    assert best_share(moments[:1], moments[1:2], diagonal[:1], diagonal[1:2]) == 1.0


def test_a_profile_says_how_it_was_made_and_leaves_the_model_as_it_was(llama):
    before = llama.config._attn_implementation
    profile = make_profile(llama, windows(3), values=True)
    assert llama.config._attn_implementation == before
    assert (profile.about["tokens"], profile.about["context"]) == (600, 200)
    assert set(profile.about["share"].values()) <= set(profiling.SHARES)
    assert [maps.heads for layer in profile.layers for maps in layer] == [2] * 4
    assert make_profile(llama, windows(3), values=True).checksum == profile.checksum
    fixed = make_profile(llama, windows(3), share=0.25)
    assert fixed.about["share"] == {"keys": 0.25, "values": None} and fixed.checksum != profile.checksum
    assert all(torch.equal(values.matrix[0], torch.eye(8)) for _, values in fixed.layers)


@pytest.mark.parametrize("given", [[], windows(1), [*windows(1), *windows(1, 150)], windows(2, 100)])
def test_windows_that_do_not_serve_are_refused(llama, given):
    with pytest.raises(ValueError, match="windows=.* allowed: two and more of equal length"):
        make_profile(llama, given)


def test_models_whose_attention_shows_no_queries_are_refused(llama, monkeypatch):
    monkeypatch.setattr(type(llama), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported: an attention in the model's own code"):
        make_profile(llama, windows())


def test_keys_that_float16_does_not_hold_are_refused(llama):
    llama.model.layers[1].self_attn.k_proj.weight.data *= 1e5
    with pytest.raises(ValueError, match="layer 1: keys beyond 32752 are not supported"):
        make_profile(llama, windows())
