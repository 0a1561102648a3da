"""The CUDA C++ decode kernels against the reference (`test_compiled.py` compiles them where there is no GPU)."""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import attend_parts
from tests.support.cuda_cases import TILE, arguments, float_inputs
from turboquant_hf.kernels.decode import History, Scoring, cuda
from turboquant_hf.kernels.decode.cuda import geometry, kernel, source, support
from turboquant_hf.kernels.decode.reference import decode_attention
from turboquant_hf.primitives import grid, rotation_matrix, trellis_code
from turboquant_hf.quantizers.rotated import RotatedQuantizer

TILE = 128
KEYS = {
    "k4": ((1.0, 4),),
    "k5/3": ((0.5, 5), (0.5, 3)),
    "k5/3/2": ((0.25, 5), (0.25, 3), (0.5, 2)),
    "k4/2/1": ((0.125, 4), (0.625, 2), (0.25, 1)),
    "k8": ((1.0, 8),),
    "mixed": ((0.25, 5), (0.5, 3), (0.25, 2)),  # a group that does not begin at a multiple of its size
    "5/w3": ((0.5, 5), (0.5, "w3")),  # "w": along a trellis, in words
    "5/w3/w2": ((0.25, 5), (0.25, "w3"), (0.5, "w2")),
    "w4/w2": ((0.5, "w4"), (0.5, "w2")),
    "w3/w2": ((0.5, "w3"), (0.5, "w2")),
    "w3/w1": ((0.5, "w3"), (0.5, "w1")),
    "w4/w1/3": ((0.25, "w4"), (0.25, "w1"), (0.5, 3)),
    "w3": ((1.0, "w3"),),
}


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """Switch on the reader of a trellis, which is off until these tests have passed on a GPU."""
    monkeypatch.setattr(support, "WORDS", True)


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
        ("5/w3", "w4", 64), ("5/w3", "w4", 96), ("5/w3", "w4", 128), ("5/w3", "w4", 256), ("5/w3", "w3", 128),
        ("w4/w2", "w3", 64), ("w4/w2", "w3", 96), ("w4/w2", "w3", 128), ("w4/w2", "w3", 256), ("5/w3/w2", "w3", 256),
        ("w3/w1", "w2", 64), ("w3/w1", "w2", 96), ("w3/w1", "w2", 128), ("w3/w1", "w2", 256), ("w3/w2", "w2", 64),
        ("w3/w2", "w3", 128), ("w4/w2", "w2", 128), ("w4/w1/3", "w1", 64), ("w3", "w1", 256),
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
    [("k8", 8, 64), ("k5/3", 4, 128), ("k8", 8, 128), ("k5/3", 4, 256), ("5/w3", "w4", 128), ("5/w3/w2", "w3", 256)],
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


@pytest.mark.parametrize(
    ("widths", "dim", "served"),
    [
        (((0.25, 5), (0.5, 4), (0.25, 3)), 64, False),  # 10 bytes, then words
        (((0.25, 5), (0.5, 4), (0.25, 3)), 128, True),
        (((0.25, 5), (0.75, 8)), 64, False),
        (((0.5, 5), (0.5, 3)), 64, True),
        (((0.25, 5), (0.25, 3), (0.5, 2)), 64, True),
    ],
)
def test_words_are_read_at_multiples_of_four(widths, dim, served):
    groups = groups_of(dim, widths)
    assert all(support.row_fits(group.size, group) for group in groups)
    assert support.begin_at_words(groups) == served


def test_no_words_are_served_before_their_reader_was_tried(monkeypatch):
    monkeypatch.undo()
    assert not support.WORDS


def test_words_that_no_lane_multiplies_are_refused():
    """A table holds the levels of 4 bits of a trellis, and words of keys are for the tokens of words of values."""
    (narrow,), (wide,) = groups_of(64, ((1.0, "w4"),)), groups_of(64, ((1.0, "w5"),))
    assert support.narrow(narrow) and not support.narrow(wide) and support.narrow(groups_of(64, ((1.0, 5),))[0])
    assert support.row_fits(64, narrow)
    assert support.values_fit(groups_of(64, ((1.0, "w1"),))[0])
    assert not support.values_fit(groups_of(64, ((1.0, 1),))[0])
    rows = groups_of(64, ((1.0, 4),))
    assert support.owns_tokens(rows, rows[0]) and support.owns_tokens(rows, narrow)
    assert support.owns_tokens((narrow,), narrow) and not support.owns_tokens((*rows, narrow), rows[0])


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", preset_names())
def test_any_preset_is_served_or_has_a_reason(name, dim, monkeypatch):
    """Here the device is the reason; a query that says it is elsewhere shows what a CUDA device would serve."""
    preset = load_preset(name, min_statistics=0, boundary_layers=0)
    if not isinstance(preset.keys, RotatedQuantizer) or not isinstance(preset.values, RotatedQuantizer):
        pytest.skip("not for the packed kernels")
    served = {16: "", 80: ""}
    served[96] = "k4v4 k4v3 k4v2 k8v4 k4v4-trellis k4v3-trellis k3v3-trellis k3v2-trellis k2v2-trellis k25v25"
    served[64] = served[96] + " k3v3 k3v2"
    served[128] = served[256] = served[64] + " k2v2"
    monkeypatch.setattr(support, "shape_of", lambda *given: None)
    monkeypatch.setattr(kernel, "failure", lambda shape, device: None)
    query = torch.randn(1, 4, 1, dim)
    elsewhere = SimpleNamespace(shape=query.shape, dtype=torch.float16, is_cuda=True, device=None)
    for quantizers in {preset.layer_quantizers(ordinal, 8) for ordinal in range(8)}:
        layer = TurboQuantLayer(preset, *quantizers, lambda: True)
        layer.update(*torch.randn(2, 1, 2, 300, dim))
        layer.commit()
        raw = [RawTokens(*arrays) for arrays in (layer.sinks.arrays, layer.tail.view())]
        history = History(*layer.packed_sides(), *raw, layer.sinks.starts)
        assert cuda.supports(query, history, Scoring(1.0)) == "the query is not on a CUDA device"
        half = replace(history, tail=RawTokens(raw[1].keys.half(), raw[1].values.half()))
        assert (cuda.supports(elsewhere, half, Scoring(1.0)) is None) == (name in served[dim].split())


@pytest.mark.parametrize("limit", [99, 163, 227])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("keys", "values"), [("k5/3", 4), ("k5/3/2", 2), ("k8", 8), ("5/w3/w2", "w3"), ("w3", "w1")])
@pytest.mark.parametrize("option", ["plain", "wide", "sparse"])
def test_blocks_are_whole_teams(option, keys, values, dim, limit):
    keys, (values,) = (support.described(groups_of(dim, x)) for x in (KEYS[keys], ((1.0, values),)))
    shape = source.Shape(dim, keys, values, "e3m5", "e4m4", wide=option == "wide", sparse=option == "sparse")
    warps = source.most_warps(shape, limit * 1024)
    if not warps:  # Triton serves
        assert source.shared_bytes(shape, 2) > limit * 1024
        return
    assert 2 <= warps <= source.max_warps(dim) and warps % shape.team == 0
    assert source.shared_bytes(shape, warps) <= limit * 1024
    assert shape.team == 1 or not shape.wide


@pytest.mark.parametrize(
    ("heads", "tiles", "teams", "splits"),
    [(8, 1024, 4, 16), (8, 256, 6, 16), (64, 128, 4, 2), (6, 6, 4, 6), (8, 0, 4, 1), (1000, 64, 8, 1)],
)
def test_blocks_fill_the_card(heads, tiles, teams, splits):
    """132 multiprocessors: one wave of blocks where there are few heads, and never more blocks than tiles."""
    assert geometry.splits(heads, tiles, teams, 132) == splits


def test_chunks_of_rows_count_as_blocks():
    query = torch.empty(3, 4, 16, 128)
    keys = SimpleNamespace(codes=torch.empty(3, 1, 5, 0))
    assert geometry.grid(query, keys) == (1, 24) and geometry.grid(query[:, :, :1], keys) == (1, 3)
    assert geometry.grid(query[:1].expand(9000, -1, -1, -1), keys)[1] > geometry.MAX_GRID


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_levels_as_bytes(bits):
    """What levels.cuh makes of a code, permutation by permutation: the codebook's step, a constant away."""
    ((_, _, unit, steps),) = support.described((CodeGroup(128, grid(bits, 128)),))
    assert torch.allclose(unit * (torch.tensor(steps) + 0.5), grid(bits, 128).tensor())
    table = source.level_bytes(steps)
    for code, step in enumerate(steps):
        if bits == 8:
            byte = code
        elif bits <= 3:
            byte = table[code]
        else:
            low = code & 15 if bits == 4 or code & 16 else ~code & 15
            # A selector with its top bit set repeats the byte's sign: zeros, that are added, or ones, that are masks.
            byte = table[low] if low < 8 else table[8 + (low & 7)]
            assert byte >> 7 == (bits == 5)
            byte ^= 0 if bits == 4 or code & 16 else 0x7F
        assert byte == step + 0.5 + source.ROW_CENTRE[bits]


def test_a_torch_that_cannot_launch_is_refused(monkeypatch):
    """torch.cuda._compile_kernel alone is not enough: 2.8 and 2.9 have it without what launches its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.available() is None
    monkeypatch.delattr(torch.cuda._utils, "_get_gpu_runtime_library")
    assert "cannot compile and launch" in cuda.available()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "below 8.0" in cuda.available()


def test_what_does_not_compile_is_left_to_others(monkeypatch):
    """A compiler that is missing ends nothing: the call goes to Triton, and the reason is kept."""
    asked = []

    def compile_kernel(shape, device):
        asked.append(shape)
        raise OSError("no NVRTC library")

    keys, (values,) = (support.described(groups_of(128, x)) for x in (KEYS["k5/3"], ((1.0, 4),)))
    shape, device = source.Shape(128, keys, values), torch.device("cuda", 7)
    monkeypatch.setattr(kernel, "load", compile_kernel)
    monkeypatch.setattr(geometry, "warps", lambda shape, device: 7)
    with pytest.warns(UserWarning, match="no NVRTC library.*Triton serves") as warned:
        for _ in range(2):
            assert kernel.failure(shape, device) == "it cannot be compiled (no NVRTC library)"
    assert len(asked) == len(warned) == 1
    monkeypatch.setattr(geometry, "warps", lambda shape, device: 0)
    assert "shared memory" in kernel.failure(shape, torch.device("cuda", 6))


def test_launches_are_what_the_driver_reads(monkeypatch):
    """CUlaunchConfig and CUlaunchAttribute as cuda.h lays them out; one for each caller."""
    seen, given = [], []

    class Driver:
        def cuLaunchKernelEx(self, options, function, arguments, extra):
            options = options._obj
            attribute = options.attributes[0]
            seen.append((*options.grid, *options.block, options.shared, options.stream, options.count))
            assert (attribute.id, attribute.value, extra) == (6, 1, None)
            given.append(arguments._obj.contents.heads)
            return 700 if options.stream == 9 else 0

    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", Driver)
    assert ctypes.sizeof(driver.LaunchAttribute) == 8 + 64 and ctypes.sizeof(driver.LaunchOptions) == 56
    launcher = driver.Launcher(SimpleNamespace(func=None), 256, 1000, True)
    first, second = launcher.options(), launcher.options()
    arguments = ctypes.pointer(Arguments(heads=3))
    launcher((3, 2, 1), arguments, 7, first)
    launcher((4, 2, 1), arguments, 8, second)
    assert seen == [(3, 2, 1, 256, 1, 1, 1000, 7, 1), (4, 2, 1, 256, 1, 1, 1000, 8, 1)]
    assert tuple(first.grid) == (3, 2, 1) and first.stream == 7 and given == [3, 3]
    with pytest.raises(RuntimeError, match="error 700"):
        launcher((4, 2, 1), arguments, 9, first)


def test_every_source_file_is_compiled():
    """The key of a binary on disk is made from the whole text, so it covers every file and the arguments."""
    keys, (values,) = (support.described(groups_of(128, x)) for x in (KEYS["k5/3"], ((1.0, 4),)))
    text = source.source_text(source.Shape(128, keys, values), 8)
    files = [path for path in Path(source.__file__).parent.iterdir() if path.suffix in (".cu", ".cuh")]
    assert sorted(path.name for path in files) == sorted(source.FILES)
    assert all(path.read_text() in text for path in files) and declaration() in text


def test_the_declared_arguments_have_the_names_and_order_of_the_structure():
    declared = re.findall(r"^    .*?(\w+);", declaration(), re.MULTILINE)
    assert declared == [name for name, _ in Arguments._fields_]
    assert f"== {ctypes.sizeof(Arguments)}," in declaration()


@pytest.mark.parametrize(("name", "options"), [("k4v4", {}), ("k4v4", {"keys": {"per_head": True}}), ("k2v2", {})])
def test_a_step_hands_over_what_the_kernel_takes(monkeypatch, name, options):
    """Everything but the launch, on CPU tensors: each field of the argument structure."""
    launches = []

    class Launcher:
        def options(self):
            return None

        def __call__(self, grid, arguments, stream, options):
            launches.append((grid, {name: getattr(arguments.contents, name) for name, _, _ in FIELDS}))

    monkeypatch.setattr(kernel, "load", lambda shape, device: (Launcher(), 8, 4))
    monkeypatch.setattr(geometry, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(workspace, "_WORKSPACES", {})
    preset = load_preset(name, min_statistics=0)
    keys = replace(preset.keys, **options.get("keys", {}))
    layer = TurboQuantLayer(preset, keys, preset.values, lambda: True)
    layer.update(*torch.randn(2, 3, 2, 1000, 64).half())
    layer.commit()
    sides = layer.packed_sides()
    query, raw = torch.randn(3, 8, 1, 64).half(), [RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.view())]
    output = attend_parts(cuda.decode_attention, query, *sides, *raw, layer.sinks.starts)
    ((grid, given),) = launches
    tiles, tail = sides[0].codes.shape[2], raw[1].keys.shape[2]
    assert (tiles, tail) == (6, 232) and grid == (6, 2, 3)
    expected = {
        "query": query, "result": output, "key_codes": sides[0].codes, "value_codes": sides[1].codes,
        "key_scales": sides[0].scale, "value_scales": sides[1].scale, "key_means": sides[0].mean,
        "balance": sides[0].balance, "order": sides[0].order, "sink_keys": raw[0].keys, "tail_values": raw[1].values,
    }  # fmt: skip
    by_signs = name == "k4v4"
    expected["value_turn"] = sides[1].signs if by_signs else sides[1].rotation
    if by_signs:
        expected["key_turn"] = sides[0].signs
    assert {key: given[key] for key in expected} == {key: x.data_ptr() for key, x in expected.items()}
    numbers = {"heads": 2, "all_rows": 4, "queries": 1, "tiles": 6, "tail": 232, "sinks": 4, "ring": 0, "fresh": 0}
    numbers |= {"key_turn_stride": 64 if keys.per_head else 0, "value_turn_stride": 0, "softcap": 0.0}
    numbers |= {"scaling": 0.125, "new_keys": None, "mask": None, "s_aux": None, "counts": None}
    assert {key: given[key] for key in numbers} == numbers
    (words,) = workspace._WORKSPACES.values()
    assert (given["arrivals"], given["work"]) == (words.data_ptr(), words.data_ptr() + 4 * source.ARRIVALS)
    assert not words[: source.ARRIVALS].any()
    with pytest.raises(ValueError, match="allowed are 0 to 64"):
        attend_parts(cuda.decode_attention, query, *sides, *raw, layer.sinks.starts, splits=65)
