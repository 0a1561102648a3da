"""Launches of the kernel of decode.cu: one call, or a decode step whose unchanging arguments are prepared once."""

from __future__ import annotations

import math
import struct

import torch

from turboquant_hf.kernels.decode.cuda import geometry, kernel
from turboquant_hf.kernels.decode.cuda import workspace as workspaces
from turboquant_hf.kernels.decode.cuda.driver import Arguments
from turboquant_hf.kernels.decode.cuda.source import ARRIVALS
from turboquant_hf.kernels.decode.cuda.support import shape_of
from turboquant_hf.kernels.decode.reference import PackedSide, RawTokens
from turboquant_hf.primitives.memo import once_per_tensor


def decode_attention(
    query: torch.Tensor,
    keys: PackedSide,
    values: PackedSide,
    sinks: RawTokens,
    tail: RawTokens,
    starts: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sparse_v_threshold: float = 0.0,
    counts: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    splits: int = 0,
) -> torch.Tensor:
    """`reference.decode_attention` in one launch; `supports` says for which arguments.

    sparse_v_threshold: values of a tile are not read where all its probabilities, relative to the largest that a warp
        has seen of their row (that of the first raw tokens from the start), are below it; 0 reads all; `unread_tiles`.
    workspace: int32, zeros at first and left so where it counts blocks; see `workspace_size`. None: one of this
        module's, which grows and is shared by the calls of a stream. One that is too small is not used.
    splits: how many blocks share a head's tiles, at most 64; 0 chooses by the card.
    """
    step = Step(
        query, keys, values, sinks, tail, starts, scaling=scaling, masked=mask is not None, softcap=softcap,
        s_aux=s_aux, sparse_v_threshold=sparse_v_threshold, counts=counts, workspace=workspace, splits=splits,
    )  # fmt: skip
    return step(query.contiguous(), keys.codes.shape[2], tail.keys.shape[2], mask)


class Step:
    """`decode_attention` with all but the query, the numbers of tokens and the mask in place.

    A decode step is bound by its launches: what stays the same from one to the next is looked up once. The arrays may
    be larger than what is filled; they must stay where they are.
    """

    def __init__(
        self,
        query: torch.Tensor,
        keys: PackedSide,
        values: PackedSide,
        sinks: RawTokens,
        tail: RawTokens,
        starts: torch.Tensor,
        *,
        scaling: float,
        masked: bool = False,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        sparse_v_threshold: float = 0.0,
        counts: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
        splits: int = 0,
    ) -> None:
        batch, _, count, dim = query.shape
        heads, rows = keys.codes.shape[1], geometry.query_rows(query, keys)
        self._shape = shape_of(query, keys, values, masked, softcap, sparse_v_threshold)
        self._device = query.device
        self._kernel, self._warps, self._teams = kernel.load(self._shape, query.device)
        self._splits = splits
        self._grid = geometry.grid(query, keys)
        self._blocks = math.prod(self._grid)  # of each split
        counters = self._blocks * self._shape.rows
        if not 0 <= splits <= geometry.MAX_SPLITS or (splits > 1 and counters >= ARRIVALS):
            raise ValueError(
                f"splits={splits} for {counters} rows: allowed are 0 to {geometry.MAX_SPLITS}, "
                f"0 and 1 from {ARRIVALS} rows on"
            )
        self._given = workspace
        if self._shape.hadamard:
            turns, one = (keys.signs, values.signs), dim
        else:
            turns, one = (_transposed(keys.rotation), values.rotation), dim * dim
        strides = [one if turn.numel() > one else 0 for turn in turns]  # from head to head
        sink_keys, sink_values = sinks.keys.contiguous(), sinks.values.contiguous()
        self._tensors = (
            query, turns[0], keys.order, keys.balance, keys.gain, keys.codes, keys.scale, keys.mean,
            values.codes, values.scale, turns[1], values.gain, sink_keys, sink_values, tail.keys, tail.values,
            None, None, starts, None, None if s_aux is None else s_aux.float(), counts, None, None, None,
        )  # fmt: skip
        integers = (
            heads, rows, count, 0, _capacity(keys.codes), sink_keys.shape[2], 0, tail.keys.stride(1) // dim,
            tail.keys.shape[2] if counts is not None else 0, 0, *strides, 0, _float_bits(scaling),
            _float_bits(softcap or 0.0), _float_bits(math.log2(sparse_v_threshold) if sparse_v_threshold else 0.0),
        )  # fmt: skip
        self._arguments = Arguments([0 if x is None else x.data_ptr() for x in self._tensors], integers)
        self._options = self._kernel.options()
        self._tensors = (None, *self._tensors[1:])  # keep what the pointers mean alive, but not a step's query

    def __call__(
        self,
        query: torch.Tensor,
        tiles: int,
        tail: int,
        mask: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[B, Hq, Q, D] for a contiguous query of the same shape.

        tiles, tail: how many tiles and tokens of the tail are filled (with `counts`, their room).
        new: keys and values [B, H, n, D], contiguous: the tail's newest, which are written to it.
        """
        splits = self._splits or geometry.splits(
            self._blocks, tiles, self._teams, geometry.multiprocessors(self._device)
        )
        result = torch.empty_like(query)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        workspace = self._room(self._blocks * splits, stream)
        pointers, integers = self._arguments.pointers, self._arguments.integers
        pointers[0], pointers[24] = query.data_ptr(), result.data_ptr()
        pointers[22], pointers[23] = workspace.data_ptr() + 4 * ARRIVALS, workspace.data_ptr()
        integers[3], integers[6] = tiles, tail
        if mask is not None:
            pointers[19], integers[12] = mask.data_ptr(), mask.stride(0)
        if new is None:
            integers[9] = 0
        else:
            pointers[16], pointers[17], integers[9] = new[0].data_ptr(), new[1].data_ptr(), new[0].shape[2]
        self._kernel((splits, *self._grid), self._arguments, stream, self._options)
        return result

    def _room(self, blocks: int, stream: int) -> torch.Tensor:
        words = workspaces.workspace_size(blocks, self._shape, self._warps)
        if self._given is not None and self._given.numel() >= words:
            return self._given
        if torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            return workspaces.cleared(words, self._device)
        return workspaces.of_stream(words, self._device, stream)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied cache has other arrays."""

    def __reduce__(self):
        return type(None), ()


@once_per_tensor
def _transposed(rotation: torch.Tensor) -> torch.Tensor:
    """The transpose of a shared rotation."""
    return rotation.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _capacity(codes: torch.Tensor) -> int:
    """Tiles a head has room for: `codes` may be the filled part of a larger array."""
    return codes.stride(1) // codes.shape[-1] if codes.shape[2] else 0


def _float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]
