"""Statistics, and the steps of a device-side cache: Triton against the reference, both against `fit` and `encode`."""

from __future__ import annotations

import pytest
import torch

from turboquant_hf.kernels.decode import RawTokens
from turboquant_hf.kernels.encode import reference as encode_reference
from turboquant_hf.kernels.schedule import Schedule
from turboquant_hf.kernels.statistics import due, reference
from turboquant_hf.quantizers import QUANTIZERS


@pytest.fixture
def kernel(device):
    from turboquant_hf.kernels.statistics import triton

    return triton


def moved(values, device):
    """A copy of the tensors in nested tuples, lists and dicts on a device."""
    if isinstance(values, torch.Tensor):
        return values.clone().to(device)
    if isinstance(values, dict):
        return {name: moved(value, device) for name, value in values.items()}
    return [moved(value, device) for value in values] if isinstance(values, (tuple, list)) else values


@pytest.mark.parametrize("shape", [(2, 2, 3, 32, 40), (1, 3, 9, 24, 64), (1, 1, 1, 128, 80)], ids=str)
@pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
def test_tile_energy(kernel, device, shape, center):
    x = (torch.randn(shape) + 5 * torch.randn(shape[-1])).half()
    weight = (torch.rand(shape[0], *shape[2:4]) > 0.2).float()
    found = kernel.tile_energy(x.to(device), weight.to(device), center).cpu()
    torch.testing.assert_close(found, reference.tile_energy(x, weight, center), rtol=2e-4, atol=0.0)


@pytest.mark.parametrize(
    ("tokens", "position", "starts"), [(1, 7, [3, 0]), (300, 0, [0, 290]), (20, 5, [30, 11])], ids=str
)
def test_query_energy(kernel, device, tokens, position, starts):
    query = torch.randn(2, tokens, 6, 40).bfloat16().transpose(1, 2)
    starts = torch.tensor(starts)
    found = kernel.query_energy(query.to(device), 2, starts.to(device), position)
    wanted = reference.query_energy(query, 2, starts, position)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("balance", ["query", "key", "none"])
@pytest.mark.parametrize("sizes", [(20, 20), (40,), (8, 8, 24)], ids=str)
def test_balance_channels(kernel, device, sizes, balance):
    energy, query = torch.rand(3, 2, 40) * 100, torch.rand(3, 2, 40)
    energy[1, :, 3], query[0, 1, 5:9] = 0.0, query[0, 1, 5]
    energy[0, 1, 5:9] = energy[0, 1, 5]
    energy[0, 0], energy[1, 0] = 0.0, 2.0**-80 * energy[1, 0]  # a dead head, and one of tiny numbers
    energy[2, 0] = 0.0
    count = torch.tensor([400.0, 30.0, 0.0])
    for known in (query, None):
        found = kernel.balance_channels(*moved((energy, count, known), device), sizes, balance)
        wanted = reference.balance_channels(energy, count, known, sizes, balance)
        assert torch.equal(found["order"].cpu(), wanted["order"])
        torch.testing.assert_close(found["balance"].cpu(), wanted["balance"], rtol=1e-5, atol=0.0)


def test_an_order_with_nan_is_still_one(kernel, device):
    energy = torch.rand(1, 1, 40)
    energy[..., [3, 17]] = torch.nan
    for module, where in ((reference, "cpu"), (kernel, device)):
        order = module.balance_channels(*moved((energy, torch.ones(1), None), where), (20, 20), "key")["order"]
        assert order.cpu().sort().values.tolist() == [[list(range(40))]]


KEYS = QUANTIZERS["conditioned"](widths=((0.5, 5), (0.5, 3)), codebook="polynomial", scale_format="e3m5")
VALUES = QUANTIZERS["mse"](codebook="polynomial", scale="norm-corrected", scale_format="e4m4", channel_major=True)
TILE, WINDOW, SINKS, MINIMUM, RING, CAPACITY = 16, 16, 2, 40, 64, 5


class Steps:
    """The state of one layer, and a step of it."""

    def __init__(self, encoder, steps, device, dtype, batch, heads, dim):
        self.encoder, self.steps, self.dim, self.heads = encoder, steps, dim, heads
        new = {"dtype": torch.float32, "device": device}
        self.rings = [torch.zeros(batch, heads, RING, dim, dtype=dtype, device=device) for _ in range(2)]
        energy, count = torch.zeros(batch, heads, dim, **new), torch.zeros(batch, heads, **new)
        seen, self.fitted = (torch.zeros(heads, dtype=torch.int32, device=device) for _ in range(2))
        self.sums = due.QuerySums(energy, count, seen)
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)
        order = torch.zeros(batch, heads, dim, dtype=torch.int16, device=device)
        self.states = ({"balance": torch.zeros_like(energy), "order": order}, {"gain": count.clone()})
        self.arrays = [
            {
                name: torch.zeros(batch, heads, CAPACITY, *field.shape, dtype=field.dtype, device=device)
                for name, field in quantizer.layout(dim, TILE, dtype).items()
            }
            for quantizer in (KEYS, VALUES)
        ]

    def step(self, keys, values, query, starts, position):
        tokens = keys.shape[2]
        for ring, new in zip(self.rings, (keys, values), strict=True):
            for i in range(tokens):
                ring[:, :, (position + i) % RING] = new[:, :, i]
        self.counts[1] = position + tokens
        schedule = Schedule(self.counts, self.fitted, starts, TILE, WINDOW, SINKS, CAPACITY)
        sizes = tuple(size for size, _ in KEYS.group_sizes(self.dim))
        rule = due.FitRule(MINIMUM, sizes, center=KEYS.center, balance=KEYS.balance)
        self.steps.observe_due(query, self.sums, schedule)
        self.steps.fit_due(RawTokens(*self.rings), self.sums, schedule, rule, self.states)
        for q, ring, state, out in zip((KEYS, VALUES), self.rings, self.states, self.arrays, strict=True):
            coding = q.coding(state, self.dim, self.heads, ring.device)
            self.encoder.encode_due(ring, coding, schedule, out)
        self.steps.advance_due(schedule)


def run_steps(encoder, steps, device, dtype, bad=None):
    """A left-padded batch, token by token after a short prompt, until the arrays are full: (layer, keys, values).

    bad: (side, token, number): what to put into that key (side 0) or value (1) of sequence 1, head 0.
    """
    generator = torch.Generator().manual_seed(3)
    batch, heads, dim, total = 2, 2, 32, TILE * CAPACITY + 2 * TILE
    channel = torch.rand(dim, generator=generator) + 0.2
    keys = (torch.randn(batch, heads, total, dim, generator=generator) * channel + 2 * channel.flip(0)).to(dtype)
    values = torch.randn(batch, heads, total, dim, generator=generator).to(dtype)
    query = torch.randn(batch, 2 * heads, total, dim, generator=generator).to(dtype)
    if bad is not None:
        side, token, number = bad
        (keys, values)[side][1, 0, token, 3] = number
    starts = torch.tensor([0, 9], device=device)
    layer = Steps(encoder, steps, device, dtype, batch, heads, dim)
    keys, values, query = moved((keys, values, query), device)
    position = 0
    while position < total:
        stop = position + (20 if position == 0 else 1)
        layer.step(*(x[:, :, position:stop] for x in (keys, values, query)), starts, position)
        position = stop
        tiles = max(position - WINDOW, 0) // TILE if position >= MINIMUM else 0
        assert int(layer.counts[0]) == min(tiles, CAPACITY, position - MINIMUM + 1 if tiles else 0)
    return layer, keys, values, query, starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reference_steps_are_fit_and_encode(dtype):
    layer, keys, values, query, starts = run_steps(encode_reference, due, "cpu", dtype)
    whole = MINIMUM // TILE
    weight = (torch.arange(whole * TILE) >= starts[:, None] + SINKS).float().unflatten(1, (whole, TILE))
    energy, count = reference.query_energy(query[:, :, :MINIMUM], 2, starts, 0)
    for index, (quantizer, x) in enumerate(((KEYS, keys), (VALUES, values))):
        first = x[:, :, : whole * TILE].unflatten(2, (whole, TILE))
        state = quantizer.fit(first, weight, (energy / count).sqrt())
        for name, value in state.items():
            torch.testing.assert_close(layer.states[index][name], value, rtol=1e-6, atol=0.0)
        tiles = x[:, :, : CAPACITY * TILE].unflatten(2, (CAPACITY, TILE))
        every = (torch.arange(CAPACITY * TILE) >= starts[:, None] + SINKS).float().unflatten(1, (CAPACITY, TILE))
        packed = quantizer.encode(tiles, layer.states[index], every)
        for name, array in packed.items():
            assert torch.equal(layer.arrays[index][name], array), name


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_steps(kernel, device, dtype):
    from turboquant_hf.kernels.encode import triton as encoder
    from turboquant_hf.kernels.statistics import due_triton

    ours, *_ = run_steps(encoder, due_triton, device, dtype)
    theirs, *_ = run_steps(encode_reference, due, "cpu", dtype)
    for found, wanted in zip(ours.states, theirs.states, strict=True):
        for name, value in found.items():
            torch.testing.assert_close(value.cpu(), wanted[name], rtol=1e-5, atol=0.0)
    assert torch.equal(ours.sums.seen.cpu(), theirs.sums.seen)
    for found, wanted in zip(ours.arrays, theirs.arrays, strict=True):
        for name, array in found.items():
            different = (array.cpu().float() != wanted[name].float()).float().mean()
            assert different <= 2e-3, f"{name}: {different}"


@pytest.mark.parametrize("powers", [(False, True), (True, False)], ids=["values", "keys"])
def test_gains_of_a_step(kernel, device, powers):
    """Heads of any size, one of zeros, and a sequence that is padding so far: it borrows, and nobody's unit is tiny."""
    from turboquant_hf.kernels.statistics import due_triton

    generator = torch.Generator().manual_seed(1)
    batch, heads, dim = 3, 4, 32
    rings = [torch.randn(batch, heads, RING, dim, generator=generator) for _ in range(2)]
    for ring in rings:
        ring *= torch.tensor([1.0, 1e-15, 1e15, 0.0])[:, None, None]
    energy, count = torch.zeros(batch, heads, dim), torch.zeros(batch, heads)
    seen, fitted = (torch.zeros(heads, dtype=torch.int32) for _ in range(2))
    counts = torch.tensor([0, 50], dtype=torch.int32)
    starts = torch.tensor([0, 9, 60])
    arguments = (*rings, energy, count, seen, counts, fitted, starts)
    found = []
    for steps, where in ((due, "cpu"), (due_triton, device)):
        states = tuple({"gain": torch.full((batch, heads), torch.nan, device=where)} for _ in range(2))
        keys, values, energy, count, seen, counts, fitted, starts = moved(arguments, where)
        schedule = Schedule(counts, fitted, starts, TILE, WINDOW, SINKS, CAPACITY)
        sums, rule = due.QuerySums(energy, count, seen), due.FitRule(MINIMUM, (dim,), powers=powers)
        steps.fit_due(RawTokens(keys, values), sums, schedule, rule, states)
        found.append(tuple(state["gain"].cpu() for state in states))
    for ours, theirs, power in zip(*found, powers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
        assert (ours[:, 3] == 1.0).all(), "zeros say nothing"
        size = ours[:, :3] / torch.tensor([1.0, 1e-15, 1e15])
        assert ((0.45 < size) & (size < 1.1)).all()
        assert not power or (ours.frexp().mantissa == 0.5).all()


@pytest.mark.parametrize(
    ("number", "token"),
    [(float("nan"), 30), (float("nan"), MINIMUM + 30), (float("inf"), 30), (float("inf"), MINIMUM + 30)]
    + [(5e5, MINIMUM + 30)],
    ids=["nan-fitted", "nan-later", "inf-fitted", "inf-later", "too-large-later"],
)
@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
def test_a_bad_number_is_seen_in_its_head(kernel, device, number, side, token):
    """A scale of one byte cannot say that a vector is no number or too long: the gain, the balance or the mean does."""
    from turboquant_hf.kernels.encode import triton as encoder
    from turboquant_hf.kernels.statistics import due_triton

    for run in ((encode_reference, due, "cpu"), (encoder, due_triton, device)):
        layer, *_ = run_steps(*run, torch.float32, (side, token, number))
        if side == 1:
            clean = layer.states[1]["gain"].isfinite()
        else:
            assert layer.states[1]["gain"].isfinite().all()
            balance, mean = layer.states[0]["balance"], layer.arrays[0]["mean"]
            clean = balance.isfinite().all(-1) & mean.isfinite().all(-1).all(-1)
        assert clean.tolist() == [[True, True], [False, True]]
