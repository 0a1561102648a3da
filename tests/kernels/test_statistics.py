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


def test_an_order_with_nan_is_still_a_permutation(kernel, device):
    energy = torch.rand(1, 1, 40)
    energy[..., [3, 17]] = torch.nan
    for module, where in ((reference, "cpu"), (kernel, device)):
        order = module.balance_channels(*moved((energy, torch.ones(1), None), where), (20, 20), "key")["order"]
        assert order.cpu().sort().values.tolist() == [[list(range(40))]]
