"""The interface of a quantizer: tiles in, named arrays out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar

import torch

from turboquant_hf.checks import shown

OPTION_TYPES = {"bool": (bool, "true, false"), "int": (int, "whole numbers"), "str": (str, "text")}

State = dict[str, torch.Tensor]
Packed = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Field:
    """One array that a quantizer stores per tile and KV head: its shape and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Quantizer(ABC):
    """Encodes tiles of T consecutive tokens per sequence and KV head. The fields of a subclass are its options.

    Shapes: B sequences, H KV heads, N tiles, T tokens per tile, D channels per head. A quantizer holds no tensors. What
    it learns from the first tiles is a `State`, which the caller keeps and which is frozen from then on. The first axis
    of every tensor of a state is B, so that batch operations are the same for all quantizers.
    """

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False
    """Whether `fit` needs many tokens. If so, nothing is encoded before enough tokens have been seen."""

    marks_infinity: ClassVar[bool] = False
    """Whether `encode` handles infinities itself: they count as NaN there, or are kept."""

    @property
    def kind(self) -> Hashable:
        """Equal for quantizers that share their matrices and tables. It keeps no tensor alive."""
        return self

    @classmethod
    def check_options(cls, owner: str, options: dict[str, Any]) -> None:
        """Raise a ValueError that names `owner` for an option of the wrong type. The constructor checks ranges."""
        for option in fields(cls):
            if option.name in options and option.type in OPTION_TYPES:
                value, (kind, allowed) = options[option.name], OPTION_TYPES[option.type]
                if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                    raise ValueError(f"{owner}: {option.name}={shown(value)} is not supported; allowed: {allowed}")

    @classmethod
    def options_for(cls, role: str) -> dict[str, Any]:
        """Options that a preset need not name, because the side ("keys" or "values") implies them."""
        return {}

    def validate(self, head_dim: int, tile: int) -> None:  # noqa: B027  (a hook with an empty default)
        """Raise ValueError where this quantizer cannot serve `head_dim` channels per head or `tile` tokens per tile."""

    @abstractmethod
    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        """The arrays that `encode` returns, per tile and head, for input of `dtype`."""

    def fit(
        self,
        tiles: torch.Tensor,
        weight: torch.Tensor,
        query_rms: torch.Tensor | None,
        *,
        flag: torch.Tensor | None = None,
    ) -> State:
        """What to remember of the first tiles: the state that `encode` and `decode` get.

        Args:
            tiles: [B, H, N, T, D].
            weight: [B, N, T], 1 for a token that counts and 0 for padding and sinks.
            query_rms: [B, H, D] root mean square of the queries that read this head, or None when they are unknown.
            flag: int8 [1]. With it, the host does not wait for the numbers in `tiles`. It is set to 1 where a state of
                other names is needed, which a call without a flag gives.
        """
        return {}

    def empty_state(self, num_heads: int, head_dim: int, tile: int, device: torch.device | str = "cpu") -> State:
        """The state of empty tiles of one sequence: the shapes that `fit` gives, with harmless values."""
        tiles = torch.zeros(1, num_heads, 1, tile, head_dim, dtype=torch.float32, device=device)
        flag = torch.zeros(1, dtype=torch.int8, device=device)
        return self.fit(tiles, torch.ones(1, 1, tile, dtype=torch.float32, device=device), None, flag=flag)

    @abstractmethod
    def encode(self, tiles: torch.Tensor, state: State, weight: torch.Tensor | None = None) -> Packed:
        """Code tiles [B, H, N, T, D] -> arrays [B, H, N, *field.shape], as `layout` says."""

    def encode_into(
        self,
        tiles: torch.Tensor,
        state: State,
        weight: torch.Tensor | None,
        out: Packed,
        flag: torch.Tensor | None = None,
    ) -> None:
        """`encode` into the arrays `out`, views [B, H, N, ...] of storage, without a copy where possible.

        flag: int8 [1], set to 1 if numbers that are stored are not finite or do not fit. Call `make_room` then. This
            version does not know which tokens count.
        """
        for name, array in self.encode(tiles, state, weight).items():
            out[name].copy_(array)
            if flag is not None and array.is_floating_point():
                flag |= array.isnan().any()

    def make_room(self, tiles: torch.Tensor, state: State, weight: torch.Tensor, new: Packed, old: Packed) -> State:
        """A state with which the scales of these tiles fit: `state` itself if they do.

        Called after a flag of `encode_into` was set, for keys or values, and when tiles are encoded anew. For another
        state than `state`, `new` (the encoded tiles) and `old` (all tiles before them) are rewritten.
        """
        return state

    @abstractmethod
    def decode(self, packed: Packed, state: State, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """The inverse of `encode`, up to its error: [B, H, N, T, D] of `dtype`."""

    def bits_per_channel(self, head_dim: int, tile: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Bits stored per channel of a token, scales and means included."""
        stored = sum(field.nbytes for field in self.layout(head_dim, tile, dtype).values())
        return 8 * stored / (tile * head_dim)

    def shared_nbytes(self, head_dim: int) -> int:
        """Bytes of the matrices, such as rotations, that all layers and caches share."""
        return 0


def check_choice(owner: str, field: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {field}={value!r} is not supported; allowed: {', '.join(map(str, allowed))}")


def check_bits(owner: str, field: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{owner}: {field}={value!r} is not supported; allowed: whole numbers from {low} to {high}")
