"""Every default preset, encoded and read by every backend of a GPU, on odd shapes; small enough for a memory checker:
`compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest tests/attention/test_backends.py`.
"""

from __future__ import annotations

import pytest
import torch

from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.attention.mask import turboquant_mask
from turboquant_hf.attention.packed import packed_attention
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.cache.sides import SIDES
from turboquant_hf.config import load_preset
from turboquant_hf.kernels import dispatch

PRESETS = ["k8v4", "k4v4", "k4v3", "k3v3", "k2v2", "k25v25", "k4v4-scalar", "k3v3-scalar", "k2v2-scalar"]
HEADS, GROUP = 2, 3
SHAPES = {
    # tokens in each sequence, left padding, queries of the last block
    "one-tile": (261, [0], 1),
    "odd-tail": (128 * 3 + 77, [0, 0, 0], 1),
    "padded": (128 * 4 + 1, [0, 300], 1),
    "block": (128 * 3 + 131, [0, 150], 5),
    "fuller": (128 * 21 + 3, [0], 2),
}


def run(preset, dim, shape, dtype, value_dim=None):
    """(output of the kernels, output over decoded tensors), [B, q, Hq, D] each."""
    tokens, starts, queries = shape
    generator = torch.Generator().manual_seed(0)
    batch = len(starts)
    layer = TurboQuantLayer(preset, preset.keys, preset.values, lambda: True)
    layer.note_padding(starts)
    blocks = [tokens - queries, queries]
    for count in blocks:
        sizes = (batch, HEADS, count)
        layer.commit()
        layer.update(*(torch.randn(*sizes, dim, generator=generator).to("cuda", dtype) for _ in range(2)))
        if count == blocks[0]:
            layer.observe(torch.randn(batch, HEADS * GROUP, count, dim, generator=generator).to("cuda", dtype))
            layer.commit()
    assert layer.tiles[0].count
    query = torch.randn(batch, HEADS * GROUP, queries, dim, generator=generator).to("cuda", dtype)
    padding = None
    if any(starts):
        padding = (torch.arange(tokens) >= torch.tensor(starts)[:, None]).to("cuda")
    options = {"batch_size": batch, "q_length": queries, "kv_length": tokens, "q_offset": tokens - queries}
    mask = turboquant_mask(**options, attention_mask=padding, device=torch.device("cuda"), allow_is_causal_skip=True)
    got = packed_attention(layer, query, mask, scaling=dim**-0.5)
    if mask is None and queries > 1:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device="cuda").tril(tokens - queries)[None, None]
    dense = [layer.dense(SIDES[index]).float() for index in (0, 1)]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = GROUP, False
    expected, _ = dense_attention(module, query.float(), *dense, mask, scaling=dim**-0.5)
    return got, expected


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", PRESETS)
@torch.inference_mode()
def test_decode_of_every_preset(name, dim, backend, monkeypatch):
    reason = dispatch.unavailable(backend, "cuda")
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    preset = load_preset(name, min_statistics=0)
    if backend == "cuda" and name == "k2v2-scalar" and dim == 64:
        with pytest.raises(RuntimeError, match="does not support this call: key groups of no whole units"):
            run(preset, dim, SHAPES["one-tile"], torch.bfloat16)
        return
    for label, shape in SHAPES.items():
        got, expected = run(preset, dim, shape, torch.bfloat16)
        torch.cuda.synchronize()
        assert got is not None, f"{label}: not served"
        error = (got.float() - expected).norm() / expected.norm()
        assert error < 0.02, f"{label}: {error:.3g}"


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "backend"), [(20, "triton"), (80, "triton"), (96, "triton"), (96, "cuda")])
@torch.inference_mode()
def test_odd_head_dims(dim, backend, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    got, expected = run(load_preset("k4v4", min_statistics=0), dim, SHAPES["padded"], torch.float16)
    assert (got.float() - expected).norm() / expected.norm() < 0.02
