"""Input that a layer refuses: the error names it, and the layer still holds what it held."""

from __future__ import annotations

import pytest
import torch

from tests.support.layers import make_layer, states


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.bool, torch.complex64], ids=str
)
def test_an_unsupported_dtype_is_named_in_the_error(dtype):
    keys = torch.zeros(1, 2, 8, 16).to(dtype)
    with pytest.raises(ValueError, match=f"keys: dtype={dtype}.*allowed: torch.float16, torch.bfloat16, torch.float32"):
        make_layer().update(keys, keys)


@pytest.mark.parametrize(
    ("shape", "value_shape"),
    [
        ((2, 8, 16), (2, 8, 16)),
        ((1, 2, 8, 16), (2, 8, 16)),
        ((1, 2, 8, 16), (1, 2, 7, 16)),
        ((1, 2, 8, 16), (1, 4, 8, 16)),
        ((), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_wrong_shapes_are_refused_and_nothing_is_lost(shape, value_shape, first):
    layer = make_layer()
    if not first:
        layer.update(*states(20))
    length = layer.get_seq_length()
    with pytest.raises(ValueError, match="keys|values"):
        layer.update(torch.zeros(shape), torch.zeros(value_shape))
    assert layer.get_seq_length() == length
    layer.update(*states(3))
    assert layer.get_seq_length() == length + 3


@pytest.mark.parametrize(
    "change", [{"batch": 2}, {"heads": 4}, {"dim": 8}, {"dtype": torch.bfloat16}], ids=lambda change: str(*change)
)
def test_a_later_block_must_continue_the_first(change):
    layer = make_layer()
    layer.update(*states(20))
    with pytest.raises(ValueError, match="does not continue"):
        layer.update(*states(3, **change))
    assert layer.get_seq_length() == 20


def test_padding_of_another_batch_is_refused():
    layer = make_layer()
    layer.note_padding([0, 1, 2])
    with pytest.raises(ValueError, match="3 sequences.*batch has 1"):
        layer.update(*states(20))


def test_backward_through_a_packed_cache_is_refused():
    layer = make_layer()
    keys, values = (x.requires_grad_() for x in states(40))
    dense, _ = layer.update(keys, values)
    assert torch.equal(dense, keys)
    with pytest.raises(RuntimeError, match="keeps no gradients.*use_cache=False"):
        dense.sum().backward()
