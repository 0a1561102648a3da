"""What the host does for the CUDA C++ decode kernels, on CPU tensors: what is served, launch geometry, arguments."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.cases import attend_parts
from tests.support.cuda_cases import described, groups_by_share
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import load_preset, preset_names
from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.decode import History, RawTokens, Scoring, cuda
from turboquant_hf.kernels.decode.cuda import driver, geometry, kernel, source, support, workspace
from turboquant_hf.kernels.decode.cuda.arguments import FIELDS, Arguments, declaration
from turboquant_hf.primitives import Trellis, grid, lloyd_max
from turboquant_hf.quantizers.rotated import RotatedQuantizer


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
    groups = groups_by_share(dim, widths)
    assert all(support.row_fits(group.size, group) for group in groups)
    assert support.begin_at_words(groups) == served


def test_words_that_the_kernel_cannot_read_are_refused():
    """Tables hold the levels of codes of up to 5 bits, and words of keys need values in words."""
    (narrow,), wide = groups_by_share(64, ((1.0, "w5"),)), CodeGroup(64, Trellis(tuple(lloyd_max(7).levels), "wide"))
    assert support.narrow(narrow) and not support.narrow(wide) and support.narrow(groups_by_share(64, ((1.0, 5),))[0])
    assert support.row_fits(64, narrow)
    steps = (-19, *range(-15, 15), 18)
    free = Trellis(tuple((step + 0.5) / 16 for step in steps), "no sums", 1 / 16)
    assert not support.row_fits(64, CodeGroup(64, free))
    with pytest.raises(ValueError, match="must be sums"):
        source.level_bytes(4, free.steps)
    assert support.values_fit(groups_by_share(64, ((1.0, "w1"),))[0])
    assert not support.values_fit(groups_by_share(64, ((1.0, 1),))[0])
    rows = groups_by_share(64, ((1.0, 4),))
    assert support.owns_tokens(rows, rows[0]) and support.owns_tokens(rows, narrow)
    assert support.owns_tokens((narrow,), narrow) and not support.owns_tokens((*rows, narrow), rows[0])


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", preset_names())
def test_any_preset_is_served_or_has_a_reason(name, dim, monkeypatch):
    """Here the device is the reason. A query that claims to be on a GPU shows what a GPU would serve."""
    preset = load_preset(name, min_statistics=0, boundary_layers=0)
    if not isinstance(preset.keys, RotatedQuantizer) or not isinstance(preset.values, RotatedQuantizer):
        pytest.skip("not for the packed kernels")
    served = {16: "", 80: ""}
    served[96] = "k4v4 k4v3 k3v3 k3v2 k2v2 k25v25 k8v4 k4v2 k4v4-scalar k4v3-scalar"
    served[64] = served[96] + " k3v3-scalar k3v2-scalar"
    served[128] = served[256] = served[64] + " k2v2-scalar"
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
    keys, values = described(keys, values, dim)
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
    """132 multiprocessors: few heads get one full wave of blocks, and there are never more blocks than tiles."""
    assert geometry.splits(heads, tiles, teams, 132) == splits


def test_chunks_of_rows_count_as_blocks():
    query = torch.empty(3, 4, 16, 128)
    keys = SimpleNamespace(codes=torch.empty(3, 1, 5, 0))
    assert geometry.grid(query, keys) == (1, 24) and geometry.grid(query[:, :, :1], keys) == (1, 3)
    assert geometry.grid(query[:1].expand(9000, -1, -1, -1), keys)[1] > geometry.MAX_GRID


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_permutations_of_bytes_find_the_levels(bits):
    """The permutations of levels.cuh turn a code into the codebook's step plus a constant."""
    ((_, _, unit, steps),) = support.described((CodeGroup(128, grid(bits, 128)),))
    assert torch.allclose(unit * (torch.tensor(steps) + 0.5), grid(bits, 128).tensor())
    table = source.level_bytes(bits, steps)
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


def test_a_torch_that_cannot_launch_kernels_is_refused(monkeypatch):
    """torch 2.8 and 2.9 have torch.cuda._compile_kernel, but cannot launch its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.available() is None
    monkeypatch.delattr(torch.cuda._utils, "_get_gpu_runtime_library")
    assert "cannot compile and launch" in cuda.available()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "below 8.0" in cuda.available()


def test_a_kernel_that_does_not_compile_is_left_to_triton(monkeypatch):
    """Without a compiler, the call goes to Triton. The reason is kept, and the compiler is not asked again."""
    asked = []

    def compile_kernel(shape, device):
        asked.append(shape)
        raise OSError("no NVRTC library")

    keys, values = described("k5/3", 4, 128)
    shape, device = source.Shape(128, keys, values), torch.device("cuda", 7)
    monkeypatch.setattr(kernel, "load", compile_kernel)
    monkeypatch.setattr(geometry, "warps", lambda shape, device: 7)
    with pytest.warns(UserWarning, match="no NVRTC library.*Triton serves") as warned:
        for _ in range(2):
            assert kernel.failure(shape, device) == "it cannot be compiled (no NVRTC library)"
    assert len(asked) == len(warned) == 1
    monkeypatch.setattr(geometry, "warps", lambda shape, device: 0)
    assert "shared memory" in kernel.failure(shape, torch.device("cuda", 6))


def test_launch_options_have_the_layout_that_the_driver_reads(monkeypatch):
    """CUlaunchConfig and CUlaunchAttribute are laid out as in cuda.h, and each caller has its own."""
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
    """The whole text is hashed for the name of a binary on disk, so it must contain every file and the arguments."""
    keys, values = described("k5/3", 4, 128)
    text = source.source_text(source.Shape(128, keys, values), 8)
    files = [path for path in Path(source.__file__).parent.iterdir() if path.suffix in (".cu", ".cuh")]
    assert sorted(path.name for path in files) == sorted(source.FILES)
    assert all(path.read_text() in text for path in files) and declaration() in text


def test_the_declared_arguments_have_the_names_and_order_of_the_structure():
    declared = re.findall(r"^    .*?(\w+);", declaration(), re.MULTILINE)
    assert declared == [name for name, _ in Arguments._fields_]
    assert f"== {ctypes.sizeof(Arguments)}," in declaration()


@pytest.mark.parametrize(
    ("name", "options"), [("k4v4", {}), ("k4v4", {"keys": {"per_head": True}}), ("k2v2-scalar", {})]
)
def test_a_step_fills_every_field_of_the_arguments(monkeypatch, name, options):
    """On CPU tensors, with everything but the launch itself."""
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
