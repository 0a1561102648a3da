"""Statistics: Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from turboquant_hf.kernels.statistics import reference


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
def test_energies(kernel, device, shape):
    x = (torch.randn(shape) + 5 * torch.randn(shape[-1])).half()
    weight = (torch.rand(shape[0], *shape[2:4]) > 0.2).float()
    x[0, 0, -1, :, 3] = 6e4  # a mean that is near the largest half
    for name in ("tile_energy", "centred_energy"):
        found = moved(getattr(kernel, name)(x.to(device), weight.to(device)), "cpu")
        wanted = getattr(reference, name)(x, weight)
        torch.testing.assert_close(found, list(wanted) if isinstance(wanted, tuple) else wanted, rtol=1e-3, atol=0.0)


def test_the_largest_mean_is_infinite_where_float16_does_not_hold_it(kernel, device):
    x = torch.randn(2, 2, 3, 32, 40)
    x[0, 1, 2, :, 5], x[1, 0, 0, 7, 9], x[1, 1, 1, :, 2] = 1e5, torch.nan, -2.0
    weight = torch.ones(2, 3, 32)
    for module, where in ((reference, "cpu"), (kernel, device)):
        largest = module.centred_energy(x.to(where), weight.to(where))[1].cpu()
        assert largest.isinf().nonzero().tolist() == [[0, 1, 5], [1, 0, 9]]
        assert largest[1, 1, 2] == pytest.approx(2.0, abs=1e-3)


def test_typical_scale(kernel, device):
    energy, count = torch.rand(3, 2, 40) * 100, torch.tensor([400.0, 30.0, 0.0])
    energy[0, 1], energy[1, 1, 3], energy[2] = 0.0, torch.inf, 0.0
    found = kernel.typical_scale(energy.to(device), count.to(device)).cpu()
    torch.testing.assert_close(found, reference.typical_scale(energy, count), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    "shape",
    [(2, 2, 3, 32, 40), (1, 3, 19, 128, 64), (1, 2, 9, 16, 128), (1, 2, 2, 32, 96), (1, 2, 2, 32, 256)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_effective_rank(kernel, device, shape, dtype):
    x = torch.randn(shape).to(dtype)
    weight = (torch.rand(shape[0], *shape[2:4]) > 0.2).float()
    x[0, 0, 1:], x[0, 0, 0, :5] = x[0, 0, :1, :1].clone(), torch.randn(5, shape[-1]).to(dtype)
    x.masked_fill_((weight == 0)[:, None, ..., None], torch.nan)
    found = kernel.effective_rank(x.to(device), weight.to(device)).cpu()
    torch.testing.assert_close(found, reference.effective_rank(x, weight), rtol=1e-4, atol=0.0)
    x[:, -1], x[:, 0] = torch.inf, 0.0
    found = kernel.effective_rank(x[:, [0, -1]].to(device), weight.to(device)).cpu()
    assert found.isnan().all() and reference.effective_rank(x[:, [0, -1]], weight).isnan().all()


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


@pytest.mark.parametrize(("tokens", "length", "starts"), [(1, 8, [3, 0]), (16, 40, [30, 11]), (5, 6, [9, 0])], ids=str)
def test_add_queries(kernel, device, tokens, length, starts):
    query = torch.randn(2, tokens, 6, 40).bfloat16().transpose(1, 2)
    arguments = (
        torch.rand(2, 2, 40),
        torch.rand(2, 2),
        torch.tensor([0, length], dtype=torch.int32),
        torch.tensor(starts),
    )
    found, wanted = moved(arguments, device), moved(arguments, "cpu")
    kernel.add_queries(query.to(device), *found)
    reference.add_queries(query, *wanted)
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


@pytest.mark.parametrize(
    ("number", "flagged"),
    [(1.0, False), (3e4, False), (4e4, True), (1e30, True), (1e-5, False), (1e-7, True), (0.0, False)],
)
def test_a_flag_is_set_for_means_beyond_float16(kernel, device, number, flagged):
    x, weight = number * (1.0 + 0.1 * torch.randn(2, 2, 3, 32, 40)), torch.ones(2, 3, 32)
    x[0] = 1.0
    for module, where in ((reference, "cpu"), (kernel, device)):
        energy, largest = module.centred_energy(x.to(where), weight.to(where))
        flag, count = torch.zeros(1, dtype=torch.int8, device=where), torch.full((2,), 96.0, device=where)
        module.balance_channels(energy, count, None, (40,), "key", largest, flag)
        assert flag.item() == flagged == bool(reference.beyond_half(energy, count, largest).any())


def test_an_order_with_nan_is_still_a_permutation(kernel, device):
    energy = torch.rand(1, 1, 40)
    energy[..., [3, 17]] = torch.nan
    for module, where in ((reference, "cpu"), (kernel, device)):
        order = module.balance_channels(*moved((energy, torch.ones(1), None), where), (20, 20), "key")["order"]
        assert order.cpu().sort().values.tolist() == [[list(range(40))]]
