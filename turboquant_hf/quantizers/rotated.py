"""The base of `mse`, `outlier` and `conditioned`: a linear map per head, then a codebook and a scale per group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch

from turboquant_hf.kernels.codes import (
    SCALE_FORMATS,
    SCALE_RULES,
    CodeGroup,
    TileCoding,
    fills_words,
    load_scale,
    store_scale,
    tile_bytes,
)
from turboquant_hf.kernels.decode import PackedSide
from turboquant_hf.kernels.dispatch import decode_tiles, encode_tiles, tile_energy, typical_scale
from turboquant_hf.kernels.encode.reference import bad_heads, saturated_heads
from turboquant_hf.kernels.statistics import power_of_two
from turboquant_hf.primitives import (
    grid,
    head_rotations,
    lloyd_max,
    polynomial,
    rotation_matrix,
    trellis_code,
    uniform,
)
from turboquant_hf.primitives.memo import once
from turboquant_hf.quantizers.base import Field, Packed, Quantizer, State, check_bits, check_choice

CODEBOOKS = {
    "lloyd-max": lloyd_max, "grid": grid, "polynomial": polynomial, "uniform": uniform, "trellis": trellis_code,
    "trellis-64": partial(trellis_code, states=64),
}  # fmt: skip
TRELLISES = {name: CODEBOOKS[name](1).word for name in ("trellis", "trellis-64")}
"""Codebooks in words -> values per word. A tile must have a multiple of so many tokens."""
ROTATIONS = ("auto", "hadamard", "qr", "identity")
WIDENINGS = 32
"""How many times the gain of a head may be doubled in one encode."""


@dataclass(frozen=True)
class RotatedQuantizer(Quantizer):
    """Rotates groups of channels, normalises to the sphere, rounds to a codebook, and stores one scale per group.

    Attributes:
        scale: which number is stored beside the codes; see `kernels.encode.reference`.
        scale_format: "fp16", or one byte: "e4m4" or "e3m5" (`kernels.codes.store_scale`).
        codebook: "lloyd-max" for the exact sphere density in the rotated dimension, "grid" or "polynomial" (nearly as
            good, and made for kernels), "uniform", or "trellis": 13 to 30 % less error, in words of 32 values. Groups
            that words do not serve have the "grid" instead: more than `trellis_bits`, fewer than 16 channels, tiles
            that are no multiple of 32 tokens (64 with 64 states), or, where the words do not run along tokens
            (`channel_major`), a number of channels that is no multiple of 16. "trellis-64" has 64 states instead of
            16, to compare. No fast kernel knows it: plain torch encodes and reads it, on GPUs, too.
        trellis_bits: the widest codes along a trellis, 1 to 5. Wider codes have the grid, which is encoded sooner.
        rotation: "auto" (Hadamard with random signs where the order is known, else QR), or one by name.
        rounds: how many sign-and-Hadamard rounds.
        seed: of the rotation; the same for all layers, so that they share one matrix.
        per_head: a rotation of its own for each KV head.
        channel_major: pack along the tokens of a tile, as the value side of the decode kernel wants it.
    """

    marks_infinity: ClassVar[bool] = True
    scale: str = "norm"
    scale_format: str = "fp16"
    codebook: str = "lloyd-max"
    trellis_bits: int = 4
    rotation: str = "auto"
    rounds: int = 1
    seed: int = 0
    per_head: bool = False
    channel_major: bool = False

    @classmethod
    def options_for(cls, role: str) -> dict[str, Any]:
        return {"channel_major": True} if role == "values" else {}

    def __post_init__(self) -> None:
        check_choice(self.name, "scale", self.scale, SCALE_RULES)
        check_choice(self.name, "scale_format", self.scale_format, tuple(SCALE_FORMATS))
        check_choice(self.name, "codebook", self.codebook, tuple(CODEBOOKS))
        check_bits(self.name, "trellis_bits", self.trellis_bits, 1, 5)
        check_choice(self.name, "rotation", self.rotation, ROTATIONS)
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"{self.name}: rounds={self.rounds!r} is not supported; allowed: whole numbers from 1")

    @property
    def centered(self) -> bool:
        """Whether the mean of every tile is stored and only the rest coded."""
        return False

    @abstractmethod
    def group_sizes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        """(channels, bits) of every group; the channels add up to `head_dim`."""

    def groups(self, head_dim: int, tile: int) -> tuple[CodeGroup, ...]:
        """The coded groups of a head of `head_dim` channels, in tiles of `tile` tokens."""
        codebook = "grid" if tile % TRELLISES.get(self.codebook, 1) else self.codebook
        return _code_groups(self.group_sizes(head_dim), codebook, self.trellis_bits, self.channel_major)

    def validate(self, head_dim: int, tile: int) -> None:
        sizes = self.group_sizes(head_dim)
        if any(size < 2 for size, _ in sizes):
            raise ValueError(
                f"{self.name}: head_dim={head_dim} gives groups of {[size for size, _ in sizes]} channels; "
                "allowed: head dims in which every group has at least 2 channels"
            )
        block_rotation(sizes, self.rotation, self.rounds, self.seed, 1 if self.per_head else 0)

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        groups = self.groups(head_dim, tile)
        layout = {
            "codes": Field((tile_bytes(groups, tile, self.channel_major),), torch.uint8),
            "scale": Field((len(groups), tile), torch.float16 if self.scale_format == "fp16" else torch.uint8),
        }
        return {**layout, "mean": Field((head_dim,), torch.float16)} if self.centered else layout

    def shared_nbytes(self, head_dim: int) -> int:
        return head_dim * head_dim * 4

    def rotation_of(self, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        """The block-diagonal rotation, float32 [D, D] ([1, H, D, D] when `per_head`), shared: do not write to it."""
        heads = num_heads if self.per_head else 0
        return _on_device(self.group_sizes(head_dim), self.rotation, self.rounds, self.seed, heads, str(device))

    def dual_of(self, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        """The inverse of the transposed `rotation_of`, which for a rotation is the same; shared: do not write to it."""
        return self.rotation_of(head_dim, num_heads, device)

    def signs_of(self, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor | None:
        """The signs of a rotation that is Sylvester's matrix times signs, as in `PackedSide`; None for any other."""
        heads = num_heads if self.per_head else 0
        return _signs(self.group_sizes(head_dim), self.rotation, self.rounds, self.seed, heads, str(device))

    def transform(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        """[D, D] or [B or 1, H, D, D]: takes a (centred) vector to the rotated domain."""
        return self.rotation_of(head_dim, num_heads, device)

    def inverse(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        """The inverse of `transform`. Its transpose takes a query to the rotated domain."""
        return self.rotation_of(head_dim, num_heads, device).transpose(-1, -2)

    def fit(
        self,
        tiles: torch.Tensor,
        weight: torch.Tensor,
        query_rms: torch.Tensor | None,
        *,
        flag: torch.Tensor | None = None,
    ) -> State:
        gain = typical_scale(tile_energy(tiles, weight), weight.sum(dim=(1, 2)))
        return {"gain": power_of_two(gain) if self.gain_is_power else gain}

    @property
    def gain_is_power(self) -> bool:
        """Whether gains are powers of two. float16 scales are then rounded as they would be without a gain."""
        return self.scale_format == "fp16"

    def encode(self, tiles: torch.Tensor, state: State, weight: torch.Tensor | None = None) -> Packed:
        return self._encode(tiles, state, weight=weight)

    def encode_into(
        self,
        tiles: torch.Tensor,
        state: State,
        weight: torch.Tensor | None,
        out: Packed,
        flag: torch.Tensor | None = None,
    ) -> None:
        self._encode(tiles, state, weight=weight, out=out, flag=flag)

    def _encode(self, tiles: torch.Tensor, state: State, **options: Any) -> Packed:
        """`encode_tiles` with these options."""
        return encode_tiles(tiles, self.coding(state, tiles.shape, tiles.device), **options)

    def make_room(self, tiles: torch.Tensor, state: State, weight: torch.Tensor, new: Packed, old: Packed) -> State:
        """Heads whose one-byte scales saturate get a larger gain, or NaN where no gain helps. Waits for the device."""
        if self.scale_format == "fp16":
            return state
        full = saturated_heads(new["scale"], weight)
        if not full.any():
            return state
        hopeless = full & bad_heads(tiles, weight)
        if "mean" in new:
            hopeless |= new["mean"].isnan().flatten(2).any(dim=-1)
        gain = state["gain"] if "gain" in state else torch.ones_like(full, dtype=torch.float32)
        widened, full = torch.ones_like(gain), full & ~hopeless & ~gain.isnan()
        for _ in range(WIDENINGS):
            if not full.any():
                break
            widened = torch.where(full, 2.0 * widened, widened)
            self.encode_into(tiles, {**state, "gain": gain * widened}, weight, new)
            full = full & saturated_heads(new["scale"], weight)
        factor = widened.to(old["scale"].device)[:, :, None, None, None]
        scale = load_scale(old["scale"], self.scale_format) / factor
        old["scale"].copy_(store_scale(scale, self.scale_format))
        return {**state, "gain": (gain * widened).masked_fill(hopeless | full, torch.nan)}

    def coding(self, state: State, shape: Sequence[int], device: torch.device) -> TileCoding:
        """How the kernels code tiles of shape [B, H, N, T, D] with this state."""
        _, num_heads, _, tile, head_dim = shape
        return TileCoding(
            self.rotation_of(head_dim, num_heads, device),
            self.groups(head_dim, tile),
            scale_rule=self.scale,
            scale_format=self.scale_format,
            channel_major=self.channel_major,
            center=self.centered,
            gain=state.get("gain"),
            order=state.get("order"),
            balance=state.get("balance"),
        )

    def decode(self, packed: Packed, state: State, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        (batch, num_heads, tiles, _, tile), device = packed["scale"].shape, packed["codes"].device
        inverse = self.inverse(state, head_dim, num_heads, device)
        coding = self.coding(state, (batch, num_heads, tiles, tile, head_dim), device)
        return decode_tiles(packed, inverse, coding).to(dtype)

    def packed_side(self, packed: Packed, state: State, head_dim: int) -> PackedSide:
        """The tiles in the form that the decode kernels read."""
        num_heads, device = packed["codes"].shape[1], packed["codes"].device
        return PackedSide(
            codes=packed["codes"],
            scale=packed["scale"],
            groups=self.groups(head_dim, packed["scale"].shape[-1]),
            rotation=self.dual_of(head_dim, num_heads, device),
            order=state.get("order"),
            balance=state.get("balance"),
            mean=packed.get("mean"),
            scale_format=self.scale_format,
            gain=state.get("gain"),
            signs=self.signs_of(head_dim, num_heads, device),
        )


@lru_cache(maxsize=256)
def _code_groups(
    sizes: tuple[tuple[int, int], ...], codebook: str, widest: int, channel_major: bool
) -> tuple[CodeGroup, ...]:
    groups = []
    for size, bits in sizes:
        served = codebook not in TRELLISES or (bits <= widest and size >= 16 and fills_words(size, channel_major))
        groups.append(CodeGroup(size, CODEBOOKS[codebook if served else "grid"](bits, size)))
    return tuple(groups)


@once(maxsize=64)
@torch.inference_mode(False)
def block_rotation(
    sizes: tuple[tuple[int, int], ...], kind: str, rounds: int, seed: int, num_heads: int
) -> torch.Tensor:
    """Block-diagonal rotation on the CPU, [D, D], or [1, num_heads, D, D] when `num_heads` is not 0."""
    blocks = []
    for index, (size, _) in enumerate(sizes):
        options = {"seed": seed + 1000 * index, "kind": kind, "rounds": rounds}
        if num_heads:
            blocks.append(head_rotations(num_heads, size, **options))
        else:
            blocks.append(rotation_matrix(size, **options)[None])
    dim = sum(size for size, _ in sizes)
    matrix = torch.zeros(blocks[0].shape[0], dim, dim, dtype=torch.float32, device="cpu")
    start = 0
    for block in blocks:
        stop = start + block.shape[-1]
        matrix[:, start:stop, start:stop] = block
        start = stop
    return matrix[None] if num_heads else matrix[0]


def reads_packed(keys: Quantizer, values: Quantizer) -> bool:
    """Whether the decode kernels read the packed tiles of these two directly."""
    rotated = isinstance(keys, RotatedQuantizer) and isinstance(values, RotatedQuantizer)
    return rotated and values.channel_major and not keys.channel_major


@once(maxsize=64)
@torch.inference_mode(False)
def _on_device(sizes, kind: str, rounds: int, seed: int, num_heads: int, device: str) -> torch.Tensor:
    return block_rotation(sizes, kind, rounds, seed, num_heads).to(device)


@once(maxsize=64)
@torch.inference_mode(False)
def _signs(sizes, kind: str, rounds: int, seed: int, num_heads: int, device: str) -> torch.Tensor | None:
    if rounds != 1 or kind not in ("auto", "hadamard") or any(size & (size - 1) for size, _ in sizes):
        return None
    matrix = block_rotation(sizes, kind, rounds, seed, num_heads)
    # The first row of Sylvester's matrix is all ones, so the first row of each block has the signs. Blocks lie on the
    # diagonal, so the sum over these rows joins them.
    starts = [sum(size for size, _ in sizes[:index]) for index in range(len(sizes))]
    return matrix[..., starts, :].sum(-2).sign().to(device)
