from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_hf.primitives import pack, pack_words, packed_size, planes, unpack, unpack_words

PLANES = {
    1: ((1, 0),),
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    7: ((4, 0), (2, 4), (1, 6)),
    8: ((8, 0),),
}


def pack_slowly(codes: list[int], bits: int) -> list[int]:
    """The layout, one field at a time."""
    n8 = -(-len(codes) // 8) * 8
    codes = codes + [0] * (n8 - len(codes))
    out = []
    for width, shift in PLANES[bits]:
        size = n8 * width // 8
        plane = [0] * size
        for j in range(size):
            for f in range(8 // width):
                plane[j] |= (codes[j + f * size] >> shift) % 2**width << f * width
        out += plane
    return out


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@pytest.mark.parametrize("bits", PLANES)
def test_planes(bits):
    assert planes(bits) == PLANES[bits]


@given(codes_and_bits())
def test_pack_follows_the_layout(case):
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == pack_slowly(codes, bits)
    assert len(packed) == packed_size(len(codes), bits) == -(-len(codes) // 8) * bits


@given(codes_and_bits())
def test_unpack_inverts_pack(case):
    codes, bits = case
    unpacked = unpack(torch.tensor(pack_slowly(codes, bits), dtype=torch.uint8), bits, len(codes))
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == codes


@pytest.mark.parametrize("shape", [(16,), (3, 5), (2, 3, 128), (2, 0, 8), (0, 4, 9), (4, 0)], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_keeps_leading_axes(bits, shape):
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], packed_size(shape[-1], bits))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


def test_pack_takes_strided_codes():
    codes = torch.randint(8, (24, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pack(codes.T, 3), pack(codes.T.contiguous(), 3))
    wide = torch.cat([pack(codes.T, 3)] * 2, dim=-1)
    assert torch.equal(unpack(wide[:, 9:], 3, 24), codes.T)


def test_pack_drops_higher_bits():
    assert torch.equal(
        pack(torch.full((8,), 255, dtype=torch.uint8), 3), pack(torch.full((8,), 7, dtype=torch.uint8), 3)
    )


def pack_word_slowly(codes: list[int], bits: int) -> list[int]:
    """The layout of a trellis's word, one field at a time."""
    words = []
    for width, shift in (*(PLANES[bits - 1] if bits > 1 else ()), (1, bits - 1)):
        plane = [0] * width
        for i, code in enumerate(codes):
            plane[i % width] |= (code >> shift) % 2**width << i // width * width
        words += plane
    return [word >> 8 * byte & 255 for word in words for byte in range(4)]


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=32, max_size=32))
def test_words_follow_the_layout(bits, codes):
    codes = torch.tensor(codes, dtype=torch.uint8) & (2**bits - 1)
    packed = pack_words(codes, bits)
    assert packed.tolist() == pack_word_slowly(codes.tolist(), bits)
    assert torch.equal(unpack_words(packed, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_may_be_strided(bits):
    codes = torch.randint(2**bits, (32, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_words(codes.T, bits)
    assert torch.equal(packed, pack_words(codes.T.contiguous(), bits))
    assert torch.equal(unpack_words(packed.T.contiguous().T, bits), codes.T)
    assert unpack_words(pack_words(codes.T.view(2, 3, 32)[:0], bits), bits).shape == (0, 3, 32)


BYTES = torch.zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: pack(BYTES.int(), 4), "codes.dtype=torch.int32", id="pack-dtype"),
        pytest.param(lambda: pack(BYTES[0], 4), "codes.ndim=0", id="pack-scalar"),
        pytest.param(lambda: pack(BYTES, 0), "bits=0", id="pack-0-bits"),
        pytest.param(lambda: pack(BYTES, 9), "bits=9", id="pack-9-bits"),
        pytest.param(lambda: unpack(BYTES.bool(), 4, 16), "packed.dtype=torch.bool", id="unpack-dtype"),
        pytest.param(lambda: unpack(BYTES, 4, 17), r"packed.shape\[-1\]=8: must be 12", id="unpack-size"),
        pytest.param(lambda: unpack(BYTES, 9, 8), "bits=9", id="unpack-9-bits"),
        pytest.param(lambda: unpack(BYTES, 4, -1), "n=-1", id="unpack-negative"),
        pytest.param(lambda: pack_words(BYTES, 4), r"codes.shape\[-1\]=8: must be 32", id="pack_words-size"),
        pytest.param(lambda: pack_words(BYTES.new_zeros(32), 9), "bits=9", id="pack_words-9-bits"),
        pytest.param(lambda: unpack_words(BYTES, 3), r"packed.shape\[-1\]=8: must be 12", id="unpack_words-size"),
        pytest.param(lambda: packed_size(-1, 4), "n=-1", id="packed_size-negative"),
        pytest.param(lambda: planes(12), "bits=12", id="planes-12-bits"),
    ],
)
def test_packing_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
