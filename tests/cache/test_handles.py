"""What a layer returns in place of dense tensors knows its shape and is decoded when other code reads it."""

from __future__ import annotations

import pytest
import torch

from tests.support.layers import make_layer, states


def test_handles_know_their_shape_without_decoding():
    layer = make_layer(handles=True)
    keys, _ = layer.update(*states(30, batch=3))
    layer.dense = None
    assert keys.shape == keys.size() == (3, 2, 30, 16)
    assert keys.size(2) == 30 and keys.shape[-2] == 30 and keys.dim() == keys.ndim == 4 and len(keys) == 3
    assert keys.dtype == torch.float32 and keys.device.type == "cpu"
    assert keys.to(torch.float32) is keys and keys.to("cpu") is keys
    assert "[3, 2, 30, 16]" in repr(keys)


USES = {
    "slice": lambda x: x[:, :, 3:5],
    "left of a product": lambda x: x @ torch.ones(16, 2),
    "right of a product": lambda x: torch.ones(2, 30) @ x,
    "sum": lambda x: x * 2 + x - 1,
    "right of a difference": lambda x: 1 - x / 3,
    "transpose": lambda x: x.transpose(2, 3),
    "cat": lambda x: torch.cat([x, x], dim=2),
    "sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "to": lambda x: x.to(torch.float64),
    "repeat": lambda x: x.repeat_interleave(2, dim=1),
    "einsum": lambda x: torch.einsum("bhtd,bhsd->bhts", x, x),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_handles_are_tensors_to_code_that_does_not_know_them(use):
    layer = make_layer(handles=True)
    x = states(30)
    keys, _ = layer.update(*x)
    layer.commit()
    assert layer.tiles[0].count
    assert torch.equal(use(keys), use(x[0]))


def test_an_old_handle_keeps_its_length():
    layer = make_layer(handles=True)
    x = states(30)
    keys, _ = layer.update(*x)
    layer.update(*states(20, seed=1))
    assert keys.shape[2] == 30 and torch.equal(keys.dense(), x[0])
