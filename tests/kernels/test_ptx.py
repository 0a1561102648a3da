"""The PTX of the encoder (`encode.viterbi`, `encode.prices`), run line by line in plain Python."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.common.tables import cell_table, pair_table
from turboquant_hf.primitives import trellis_code
from turboquant_hf.primitives.trellis import DEAREST

triton = pytest.importorskip("triton")

from turboquant_hf.kernels.encode import prices, viterbi  # noqa: E402


def float_of(bits: int) -> np.float32:
    return np.float32(struct.unpack("<f", struct.pack("<I", bits % 2**32))[0])


def bits_of(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", np.float32(x)))[0]


def signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def permuted(low: int, high: int, selector: int) -> int:
    """PTX's prmt.b32 in its default mode."""
    octets = struct.pack("<II", low % 2**32, high % 2**32)
    picked = [octets[selector >> 4 * i & 7] for i in range(4)]
    return sum((255 * (byte >> 7) if selector >> 4 * i & 8 else byte) << 8 * i for i, byte in enumerate(picked))


WHOLE = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "min": lambda x, y: min(signed(x), signed(y))}
FLOAT = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "min": np.fmin, "max": np.fmax,  # of a NaN and a number, the number
}  # fmt: skip


def run(text: str, operands: dict[int, int], memory: dict[int, int] | None = None) -> dict[str, int]:
    """All registers after the instructions of `text`. operands: the bits of $0, $1, ... that are read."""
    held = {f"${number}": bits for number, bits in operands.items()}

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return held[name] if name in held else int(name, 0)

    for line in re.split(r";", text.strip().strip("{}")):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(maxsplit=1)
        target, *sources = (part.strip() for part in rest.split(","))
        kind, _, suffix = name.partition(".")
        if kind == "prmt":
            held[target] = permuted(*map(value, sources))
        elif kind in ("mov", "cvt"):
            held[target] = value(sources[0])
        elif kind == "ld":
            held[target] = memory[value(sources[0].strip("[]"))]
        elif kind == "fma":  # the double product is exact, and its sum is rounded once more than PTX rounds it
            x, y, z = (np.float64(float_of(value(source))) for source in sources)
            held[target] = bits_of(x * y + z)
        elif suffix.endswith("f32"):
            held[target] = bits_of(FLOAT[kind](*(float_of(value(source)) for source in sources)))
        else:
            held[target] = WHOLE[kind](*map(value, sources)) % 2 ** (64 if suffix == "s64" else 32)
    return held


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
def test_a_step_takes_the_cheaper_of_two_ways(marked):
    generator = np.random.default_rng(0)
    for _ in range(20):
        away = [0, *generator.integers(-DEAREST, DEAREST + 1, 3).tolist()]
        price = sum((away[s] & 255) << 8 * s for s in (1, 2, 3)) | int(generator.integers(64))
        costs = [(int(cost) << 16) | int(path) for cost, path in generator.integers([-4000, 0], [5000, 2**12], (16, 2))]
        mark = 1 << 13
        found = run(viterbi._step_text(marked), {**{16 + s: c for s, c in enumerate(costs)}, 32: price, 33: mark})
        for state in range(16):
            ways = []
            for oldest in (0, 1):
                bits = state | oldest << 4  # bit i is p_(t-i)
                subset = 2 * (bits & 1 ^ bits >> 1 & 1 ^ bits >> 4) + (bits >> 2 & 1)
                ways.append(costs[8 * oldest + state // 2] + (away[subset] << 16) + (mark if oldest and marked else 0))
            assert signed(found[f"${state}"]) == min(ways)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_prices_are_those_of_the_reference(bits):
    group = CodeGroup(64, trellis_code(bits, 64))
    code = group.codebook
    x = torch.cat(
        [4 * torch.randn(500, generator=torch.Generator().manual_seed(bits)), torch.tensor([torch.nan, 50.0])]
    )
    wanted, lowest = code._branches(x[None])
    cells, near = cell_table((group,), torch.device("cpu")), pair_table((group,), torch.device("cpu"))
    memory = {i: int(cell) for i, cell in enumerate(cells)} | {4096 + 4 * i: int(n) % 2**32 for i, n in enumerate(near)}
    per_grid = bits_of(1 / code.grid)
    others = 0
    for n, value in enumerate(x.tolist()):
        number = run(prices._LOWEST.value, {1: bits_of(value), 2: 0, 3: per_grid}, memory)["$0"]
        levels = memory[4096 + 4 * number]
        given = {1: bits_of(value), 2: number, 3: levels, 4: per_grid, 5: bits_of(code.price)}
        price = run(prices._price_text(), given)["$0"]
        assert price & 255 == number == lowest[0, n]
        away = [0, *(signed(price << 8 * (3 - s)) >> 24 for s in (1, 2, 3))]
        expected = (wanted[0, :, n] - wanted[0, 0, n]).tolist()
        assert all(abs(a - b) <= 1 for a, b in zip(away, expected, strict=True))
        others += away != expected
    assert others < 0.02 * len(x)  # PTX rounds the product and the sum together
