"""Kernels over arrays of fixed size, which read on the device how many tiles and tokens are filled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.cases import attend, attention_inputs, in_buffers, moved, starting_at
from turboquant_hf.kernels.append import reference as append_reference
from turboquant_hf.kernels.append.reference import FixedTokens
from turboquant_hf.kernels.decode import reference
from turboquant_hf.kernels.decode.inputs import RawTokens

TILE, RING = 32, 96


@pytest.fixture
def triton_decode(device):
    from turboquant_hf.kernels.decode import triton

    return triton.decode_attention


@pytest.fixture
def triton_append(device):
    from turboquant_hf.kernels.append import triton

    return triton.append_tokens


CASES = {
    "empty-tiles": {"tiles": 1, "tail": 40},
    "wrapped": {"tiles": 2, "tail": 60},
    "several-splits": {"tiles": 5, "tail": 33, "heads": 1},
    "queries": {"tiles": 3, "tail": 21, "queries": 5},
    "full-ring": {"tiles": 3, "tail": RING},
}


@pytest.mark.parametrize("case", CASES)
def test_reference_reads_counts(case):
    arguments = starting_at(attention_inputs(batch=2, **CASES[case]), [0, 37])
    mask = torch.rand(2, 7 * TILE + RING, generator=torch.Generator().manual_seed(1)) > 0.2
    buffers = in_buffers(arguments, capacity=6)
    length = int(buffers[1].counts[1])
    expected = attend(reference.decode_attention, arguments, scaling=0.2, mask=mask[:, :length])
    torch.testing.assert_close(attend(reference.decode_attention, buffers, scaling=0.2, mask=mask), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_decode_reads_counts(triton_decode, device, case, masked):
    arguments = starting_at(attention_inputs(batch=2, **CASES[case]), [0, 37])
    mask = torch.rand(2, 7 * TILE + RING, generator=torch.Generator().manual_seed(1)) > 0.2
    buffers = in_buffers(arguments, capacity=6)
    seen = mask[:, : int(buffers[1].counts[1])] if masked else None
    expected = attend(reference.decode_attention, arguments, scaling=0.2, mask=seen)
    moved_mask = mask.to(device) if masked else None
    out = attend(triton_decode, moved(buffers, device, torch.float32), scaling=0.2, mask=moved_mask)
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-4, atol=2e-5)


def test_decode_without_any_tile(triton_decode, device):
    query, history = starting_at(attention_inputs(batch=2, tiles=1, tail=40), [0, 3])

    def none(side):
        return replace(side, codes=side.codes[:, :, :0], scale=side.scale[:, :, :0],
                       mean=None if side.mean is None else side.mean[:, :, :0])  # fmt: skip

    empty = query, replace(history, keys=none(history.keys), values=none(history.values))
    _, held = in_buffers((query, history), capacity=2)
    rings = [torch.full_like(x, torch.nan) for x in (held.tail.keys, held.tail.values)]
    for ring, x in zip(rings, (history.tail.keys, history.tail.values), strict=True):
        ring[:, :, :40] = x
    buffers = query, replace(held, tail=RawTokens(*rings), counts=torch.tensor([0, 40], dtype=torch.int32))
    expected = attend(reference.decode_attention, empty, scaling=0.2)
    out = attend(triton_decode, moved(buffers, device, torch.float32), scaling=0.2)
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-4, atol=2e-5)


def append_inputs(queries, length, starts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, dim, value_dim = len(starts), 2, 24, 16
    # As models give them: heads and tokens exchanged.
    keys = torch.randn(batch, queries, heads, dim, generator=generator).transpose(1, 2)
    values = torch.randn(batch, queries, heads, value_dim, generator=generator).transpose(1, 2)
    ring = RawTokens(torch.zeros(batch, heads, RING, dim), torch.zeros(batch, heads, RING, value_dim))
    sinks = RawTokens(torch.zeros(batch, heads, 4, dim), torch.zeros(batch, heads, 4, value_dim))
    counts = torch.tensor([1, length], dtype=torch.int32)
    ticket = torch.zeros(1, dtype=torch.int32)
    return keys, values, FixedTokens(ring, sinks, torch.tensor(starts), counts, ticket, max_len=200)


APPENDS = {"start": (5, 0), "wraps": (16, 90), "one": (1, 97), "last-fits": (4, 196), "too-many": (6, 196)}


@pytest.mark.parametrize("case", APPENDS)
def test_append_reference(case):
    queries, length = APPENDS[case]
    keys, values, held = append_inputs(queries, length, [0, 3])
    ring, sinks = held.ring, held.sinks
    append_reference.append_tokens(keys, values, held)
    assert held.counts.tolist() == [1, min(length + queries, 200)]
    for j in range(queries):
        slot, kept = (length + j) % RING, length + j < 200
        assert torch.equal(ring.keys[:, :, slot], keys[:, :, j] * kept)
        assert torch.equal(ring.values[:, :, slot], values[:, :, j] * kept)
    if case == "start":
        assert torch.equal(sinks.keys[0], keys[0, :, :4]) and torch.equal(sinks.values[1, :, :2], values[1, :, 3:])
        assert not sinks.keys[1, :, 2:].any()
    else:
        assert not sinks.keys.any()


@pytest.mark.parametrize("case", APPENDS)
def test_append_kernel(triton_append, device, case):
    (*new, expected), (_, _, given) = (append_inputs(*APPENDS[case], [0, 3]) for _ in range(2))
    append_reference.append_tokens(*new, expected)

    def on(x):
        return RawTokens(x.keys.to(device), x.values.to(device)) if isinstance(x, RawTokens) else x.to(device)

    tensors = ("ring", "sinks", "starts", "counts", "ticket")
    given = replace(given, **{name: on(getattr(given, name)) for name in tensors})
    triton_append(*(x.to(device) for x in new), given)
    for ours, theirs in ((given.ring, expected.ring), (given.sinks, expected.sinks)):
        assert torch.equal(ours.keys.cpu(), theirs.keys) and torch.equal(ours.values.cpu(), theirs.values)
    assert torch.equal(given.counts.cpu(), expected.counts) and given.ticket.item() == 0
