"""The CUDA C++ decode kernels against the reference (`test_compiled.py` compiles them where there is no GPU)."""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import attend_parts
from tests.support.cuda_cases import TILE, arguments, float_inputs
from turboquant_hf.kernels.decode import History, Scoring, cuda
from turboquant_hf.kernels.decode.cuda import geometry, kernel, source, support
from turboquant_hf.kernels.decode.reference import decode_attention


def check(given, **options):
    """One call against the reference in float32."""
    query, splits = given[0], options.pop("splits", 0)
    assert (reason := cuda.supports(query, History(*given[1:]), Scoring(1.0))) is None, reason
    output = attend_parts(cuda.decode_attention, *given, splits=splits, **options)
    exact = attend_parts(decode_attention, *float_inputs(given), **options)
    error = (output.float() - exact).norm() / exact.norm()
    assert error < (3e-3 if query.dtype == torch.bfloat16 else 1.5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(4, 1), (2, 3), (8, 1), (1, 5), (16, 1), (4, 16)], ids=str)
@pytest.mark.parametrize("extra", ["plain", "padded", "masked", "softcap"])
@pytest.mark.parametrize(
    ("keys", "values", "dim"),
    [
        ("k5/3", 4, 128), ("k5/3/2", 3, 128), ("k8", 8, 128), ("k4/2/1", 2, 128), ("k5/3", 2, 64), ("k5/3/2", 5, 64),
        ("k5/3", 4, 96), ("k8", 3, 96), ("k4", 4, 256), ("k4/2/1", 2, 256),
        ("w5/w3", "w4", 64), ("w5/w3", "w4", 96), ("w5/w3", "w4", 128), ("w5/w3", "w4", 256), ("w5/w3", "w3", 128),
        ("w4/w2", "w3", 64), ("w4/w2", "w3", 96), ("w4/w2", "w3", 128), ("w4/w2", "w3", 256), ("5/w3/w2", "w3", 128),
        ("5/w3/w2", "w3", 64), ("5/w3/w2 d96", "w3", 96), ("w4/w2 quarter", "w2", 64), ("w4/w2 quarter d96", "w2", 96),
        ("w4/w2 quarter", "w2", 128), ("w4/w2 quarter", "w2", 256), ("w4/w3/w2/w1", "w3", 64),
        ("w3/w1", "w2", 64), ("w3/w1", "w2", 96), ("w3/w1", "w2", 128), ("w3/w2", "w3", 128), ("w4/w1/3", "w1", 64),
        ("w3", "w1", 256), ("w5/w3/w2", "w3", 64), ("w5/w3", "w5", 64), ("w5/w3", "w5", 128), ("5/w3", "w4", 128),
        ("k5/3", "w2", 64), ("k8", "w4", 128),
    ],
)  # fmt: skip
def test_cuda_decode_attention(keys, values, dim, extra, rows, dtype):
    given = arguments(keys, values, dim, rows, dtype)
    options = {"scaling": 0.05}
    if extra == "padded":
        given[-1][1] = 300
    if extra == "masked":
        options["mask"] = torch.rand(2, 9 * TILE + 77, device="cuda") > 0.3
    if extra == "softcap":
        options |= {"softcap": 5.0, "s_aux": torch.randn(given[0].shape[1], device="cuda")}
    check(given, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [(4, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
@pytest.mark.parametrize(("keys", "kind"), [("k5/3", "qr"), ("k5/3", "hadamard"), ("mixed", "hadamard")])
def test_rotations_as_matrices_and_as_signs(keys, kind, per_head, dim, rows):
    given = arguments(keys, 4, dim, rows, torch.float16, kind=kind, per_head=per_head)
    by_signs = (keys, kind) == ("k5/3", "hadamard")
    assert support.shape_of(*given[:3], Scoring(1.0)).hadamard == by_signs
    check(given, scaling=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_queries_of_any_size_meet_the_mean(dim, exponent):
    given = arguments("k5/3", 4, dim, (4, 1), torch.bfloat16)
    given[0].mul_(2.0**exponent)
    check(given, scaling=0.05 * 2.0**-exponent)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [(4, 1), (8, 1)], ids=str)
def test_sums_survive_tiles_that_are_masked_out(rows, dim):
    """Sums are kept in units of a tile's largest probability, and a tile that is masked out has none."""
    given = arguments("k5/3", 4, dim, rows, torch.float16, tiles=60)
    given[2].scale.fill_(250)  # 1.6
    mask = torch.zeros(2, 60 * TILE + 77, dtype=torch.bool, device="cuda")
    mask[:, : 24 * TILE] = True
    check(given, scaling=0.001, mask=mask, splits=1)


@pytest.mark.gpu
def test_softcap_is_exact_where_scores_are_large():
    """A cap of 50, as in Gemma 2, on scores of that size."""
    check(arguments("k5/3", 4, 128, (4, 1), torch.float16), scaling=0.5, softcap=50.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("keys", "values", "dim"),
    [("k8", 8, 64), ("k5/3", 4, 128), ("k8", 8, 128), ("k5/3", 4, 256), ("w5/w3", "w4", 128), ("5/w3/w2", "w3", 256)],
)
@pytest.mark.parametrize("rows", [(4, 1), (8, 1)], ids=str)
def test_blocks_of_cards_with_less_shared_memory(keys, values, dim, rows, monkeypatch):
    """99 KB, as with compute capability 8.6, 8.9 and 12.0. Some shapes then have only two warps per block."""
    monkeypatch.setattr(geometry, "warps", lambda shape, device: source.most_warps(shape, 99 * 1024))
    kernel.load.cache_clear()
    try:
        check(arguments(keys, values, dim, rows, torch.float16), scaling=0.05)
    finally:
        kernel.load.cache_clear()


@pytest.mark.gpu
def test_more_splits_than_the_merge_can_add_up_are_refused():
    with pytest.raises(ValueError, match="allowed are 0 to 64"):
        check(arguments("k5/3", 4, 128, (4, 1), torch.float16), scaling=0.05, splits=65)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2, 9, 33, 64])
@pytest.mark.parametrize("sizes", [(1, 1, 0), (3, 130, 4), (70, 33, 128)], ids=str)
def test_any_number_of_blocks_shares_a_head(sizes, splits):
    """Fewer tiles than blocks, a tail longer than all warps of a block read at once, and no sinks."""
    tiles, tail, sinks = sizes
    given = arguments("k5/3", 4, 128, (4, 1), torch.float16, tiles=tiles, tail=tail, sinks=sinks)
    check(given, scaling=0.05, splits=splits)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("rows", [(1, 1), (4, 1), (8, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("extra", ["plain", "padded", "masked", "softcap", "counts"])
def test_sparse_v_reads_no_values_of_unlikely_tiles(dim, rows, extra):
    """Every third tile has keys far from the queries, and NaN scales for its values, which must not be read."""
    tail = 100 if extra == "counts" else 77
    given = arguments("k5/3", 4, dim, rows, torch.float16, tiles=30, tail=tail, formats=("e3m5", "fp16"))
    query, keys, values, _, _, starts = given
    one = query[:, :: rows[0], :1].clone()
    query[:] = one.repeat_interleave(rows[0], dim=1)
    keys.mean[:, :, ::3] = (-one * (20 / (0.05 * one.float().square().sum(-1, True)))).half()
    values.scale[:, :, ::3] = torch.nan
    options = {"scaling": 0.05, "sparse_v_threshold": 1e-3}
    if extra == "padded":
        starts[1] = 300
    if extra == "masked":
        options["mask"] = torch.rand(2, 30 * TILE + 77, device="cuda") > 0.3
    if extra == "softcap":
        options |= {"softcap": 30.0, "s_aux": torch.randn(query.shape[1], device="cuda")}
    if extra == "counts":  # three tiles are spare, and the tail is a ring that has wrapped
        options["counts"] = torch.tensor([27, 27 * TILE + 77], dtype=torch.int32, device="cuda")
    cuda.unread_tiles()
    output = attend_parts(cuda.decode_attention, *given, **options)
    chunks = -(-rows[0] * rows[1] // (8 if rows[0] * rows[1] > 4 else 4))
    hidden = 2 if extra == "padded" else 0  # tile 1, before the start of the second sequence's two heads
    unlikely = 9 if extra == "counts" else 10
    assert cuda.unread_tiles() == (2 * 2 * unlikely + hidden) * chunks and cuda.unread_tiles() == 0
    values.scale[:, :, ::3] = 1.0  # the reference multiplies them by zero
    exact = attend_parts(decode_attention, *float_inputs(given), **options)
    assert (output.float() - exact).norm() < 1.5e-3 * exact.norm()
    del options["sparse_v_threshold"]
    check(given, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(4, 1), (8, 1)], ids=str)
@pytest.mark.parametrize(("keys", "values"), [("k5/3", 4), ("5/w3/w2", "w3")])
def test_sparse_v_changes_little(keys, values, rows):
    """Leaving out unlikely tiles among random ones hardly changes the result, least of all with the threshold 1e-30."""
    given = arguments(keys, values, 128, rows, torch.float16, tiles=70)
    given[0][:] = given[0][:, :: rows[0]].repeat_interleave(rows[0], dim=1)
    given[1].mean.mul_(20)
    cuda.unread_tiles()
    for scaling, threshold in ((0.5, 1e-30), (0.05, 1e-5)):
        check(given, scaling=scaling, sparse_v_threshold=threshold)
        assert 0 < cuda.unread_tiles() < 4 * 70


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_nan_gain_makes_the_results_of_its_head_nan(which):
    """A NaN gain marks a head that was not finite. All of its results are NaN, and no other head's."""
    query, *sides, sink, raw, starts = arguments("k5/3", 4, 128, (4, 1), torch.float16)
    sides[which == "values"].gain[1, 0] = torch.nan
    output = attend_parts(cuda.decode_attention, query, *sides, sink, raw, starts, scaling=0.05).view(2, 2, 4, 128)
    assert output[1, 0].isnan().all()
    output[1, 0] = 0
    assert output.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_nan_scale_makes_the_results_of_its_head_nan(which):
    """Two-byte scales have no gain: the NaN scale of one token is the mark."""
    query, *sides, sink, raw, starts = arguments("k8", 8, 128, (4, 1), torch.float16, formats=("fp16", "fp16"))
    sides[which == "values"].scale[1, 0, 5, 0, 77] = torch.nan
    output = attend_parts(cuda.decode_attention, query, *sides, sink, raw, starts, scaling=0.05).view(2, 2, 4, 128)
    assert output[1, 0].isnan().all()
    output[1, 0] = 0
    assert output.isfinite().all()
