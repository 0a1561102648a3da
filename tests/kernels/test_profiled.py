"""Tiles with the maps of a profile, full matrices that are no rotations: Triton against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.profiles import random_maps, random_vectors
from turboquant_hf.config import load_preset
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.kernels.decode.reference import decode_attention
from turboquant_hf.kernels.encode import reference
from turboquant_hf.quantizers.profiled import profiled

TILE, TILES = 32, 1
CASES = {
    "k4v4-d64": ("k4v4", 64, torch.float16),
    "k3v3-d48": ("k3v3", 48, torch.bfloat16),
    "k2v2-d32": ("k2v2", 32, torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_encode_decode_and_attend(device, case):
    from turboquant_hf.kernels.decode import triton as decode_triton
    from turboquant_hf.kernels.encode import triton

    preset, dim, dtype = CASES[case]
    sides = profiled(
        load_preset(preset).keys, load_preset(preset).values, (random_maps(2, dim), random_maps(2, dim, 2))
    )
    weight = torch.ones(1, TILES, TILE)
    weight[:, 0, :4] = 0
    found, exact = [], []
    for seed, quantizer in enumerate(sides):
        x = random_vectors(2, dim, 2 * seed, TILES * TILE).unflatten(2, (TILES, TILE)).to(dtype)
        state = quantizer.fit(x, weight, None)
        coding = quantizer.coding(state, x.shape, torch.device("cpu"))
        wanted = reference.encode_tiles(x, coding, weight=weight)
        moved = quantizer.coding({n: s.to(device) for n, s in state.items()}, x.shape, torch.device(device))
        packed = triton.encode_tiles(x.to(device), moved, weight=weight.to(device))
        same = [(packed[name].cpu() == wanted[name]).float().mean() for name in ("codes", "scale")]
        assert min(same) > 0.995  # a number between two levels may go either way
        inverse = quantizer.inverse(state, dim, 2, torch.device("cpu"))
        dense = reference.decode_tiles(wanted, inverse, coding)
        on_device = {name: array.to(device) for name, array in wanted.items()}
        got = triton.decode_tiles(on_device, inverse.to(device), moved)
        torch.testing.assert_close(got.cpu(), dense, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))
        exact.append(quantizer.packed_side(wanted, state, dim))
        found.append(quantizer.packed_side(on_device, {n: s.to(device) for n, s in state.items()}, dim))

    none, tail = torch.zeros(1, 2, 0, dim), torch.randn(1, 2, 3, dim, generator=torch.Generator().manual_seed(0))
    query = torch.randn(1, 6, 1, dim, generator=torch.Generator().manual_seed(1))
    raw, starts = [RawTokens(none, none), RawTokens(tail, tail)], torch.zeros(1, dtype=torch.int64)
    expected = decode_attention(query, History(*exact, *raw, starts), Scoring(0.1))
    moved = [replace(part, keys=part.keys.to(device), values=part.values.to(device)) for part in raw]
    history = History(*found, *moved, starts.to(device))
    got = decode_triton.decode_attention(query.to(device), history, Scoring(0.1))
    torch.testing.assert_close(got.cpu(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
