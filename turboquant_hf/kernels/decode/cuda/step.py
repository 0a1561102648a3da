"""Launches of the kernel of decode.cu: single calls, and decode steps whose constant arguments are prepared once."""

from __future__ import annotations

import ctypes
import math

import torch

from turboquant_hf.kernels.decode.cuda import geometry, kernel
from turboquant_hf.kernels.decode.cuda import workspace as workspaces
from turboquant_hf.kernels.decode.cuda.arguments import Arguments
from turboquant_hf.kernels.decode.cuda.source import ARRIVALS
from turboquant_hf.kernels.decode.cuda.support import shape_of
from turboquant_hf.kernels.decode.inputs import History, Scoring
from turboquant_hf.primitives.memo import once_per_tensor


def decode_attention(
    query: torch.Tensor,
    history: History,
    scoring: Scoring,
    *,
    mask: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    splits: int = 0,
) -> torch.Tensor:
    """Equivalent to `reference.decode_attention`, in one launch. `supports` says which arguments it serves.

    Args:
        scoring: with `sparse_v_threshold`, a probability is relative to the largest that a warp has seen in its query
            row, the first raw tokens included.
        workspace: int32, see `workspace_size`. Its counters are zeros before and after the call. None is the stream's
            own workspace, which grows as needed. A workspace that is too small is not used.
        splits: how many blocks share the tiles of a KV head, at most 64; 0 chooses by the card.
    """
    step = Step(query, history, scoring, masked=mask is not None, workspace=workspace, splits=splits)
    return step(query.contiguous(), history.keys.codes.shape[2], history.tail.keys.shape[2], mask)


class Step:
    """A prepared `decode_attention`: all arguments but the query, the mask and the numbers of tokens are in place.

    Launches bound the time of decode steps, so everything that stays the same from step to step is looked up once. The
    arrays may have spare room. They must not move.
    """

    def __init__(
        self,
        query: torch.Tensor,
        history: History,
        scoring: Scoring,
        *,
        masked: bool = False,
        workspace: torch.Tensor | None = None,
        splits: int = 0,
    ) -> None:
        keys, values, sinks, tail = history.keys, history.values, history.sinks, history.tail
        s_aux, sparse = scoring.s_aux, scoring.sparse_v_threshold
        batch, _, count, dim = query.shape
        heads, rows = keys.codes.shape[1], geometry.query_rows(query, keys)
        self._shape = shape_of(query, keys, values, scoring, masked)
        self._device = query.device
        self._kernel, self._warps, self._teams = kernel.load(self._shape, query.device)
        self._splits = splits
        self._grid = geometry.grid(query, keys)
        self._blocks = math.prod(self._grid)  # of each split
        counters = self._blocks * self._shape.rows
        if not 0 <= splits <= geometry.MAX_SPLITS or (splits > 1 and counters >= ARRIVALS):
            raise ValueError(
                f"splits={splits} for {counters} query rows is not supported: allowed are 0 to {geometry.MAX_SPLITS}, "
                f"and only 0 and 1 from {ARRIVALS} rows on"
            )
        self._given = workspace
        if self._shape.hadamard:
            turns, one = (keys.signs, values.signs), dim
        else:
            turns, one = (_transposed(keys.rotation), values.rotation), dim * dim
        strides = [one if turn.numel() > one else 0 for turn in turns]  # from head to head
        sink_keys, sink_values = sinks.keys.contiguous(), sinks.values.contiguous()
        tensors = {
            "key_turn": turns[0], "order": keys.order, "balance": keys.balance, "key_gain": keys.gain,
            "key_codes": keys.codes, "key_scales": keys.scale, "key_means": keys.mean,
            "value_codes": values.codes, "value_scales": values.scale, "value_turn": turns[1],
            "value_gain": values.gain, "sink_keys": sink_keys, "sink_values": sink_values,
            "tail_keys": tail.keys, "tail_values": tail.values, "starts": history.starts,
            "s_aux": None if s_aux is None else s_aux.float(), "counts": history.counts,
        }  # fmt: skip
        self._tensors = tuple(tensors.values())  # keeps alive what the arguments point to
        self._arguments = Arguments(
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
            heads=heads,
            all_rows=rows,
            queries=count,
            capacity=_capacity(keys.codes),
            sinks=sink_keys.shape[2],
            tail_stride=tail.keys.stride(1) // dim,
            ring=tail.keys.shape[2] if history.counts is not None else 0,
            key_turn_stride=strides[0],
            value_turn_stride=strides[1],
            scaling=scoring.scaling,
            softcap=scoring.softcap or 0.0,
            sparse=math.log2(sparse) if sparse else 0.0,
        )
        self._parameter = ctypes.pointer(self._arguments)
        self._options = self._kernel.options()

    def __call__(
        self,
        query: torch.Tensor,
        tiles: int,
        tail: int,
        mask: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[B, Hq, Q, D] for a contiguous query of the same shape.

        tiles, tail: numbers of filled tiles and of tokens in the tail (with `counts`, the room for them).
        new: contiguous keys and values [B, H, n, D], the tail's newest tokens, which the kernel writes to the tail.
        """
        splits = self._splits or geometry.splits(
            self._blocks, tiles, self._teams, geometry.multiprocessors(self._device)
        )
        result = torch.empty_like(query)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        workspace = self._room(self._blocks * splits, stream)
        arguments = self._arguments
        arguments.query, arguments.result = query.data_ptr(), result.data_ptr()
        arguments.arrivals, arguments.work = workspace.data_ptr(), workspace.data_ptr() + 4 * ARRIVALS
        arguments.tiles, arguments.tail = tiles, tail
        if mask is not None:
            arguments.mask, arguments.mask_stride = mask.data_ptr(), mask.stride(0)
        if new is None:
            arguments.fresh = 0
        else:
            arguments.new_keys, arguments.new_values = new[0].data_ptr(), new[1].data_ptr()
            arguments.fresh = new[0].shape[2]
        self._kernel((splits, *self._grid), self._parameter, stream, self._options)
        return result

    def _room(self, blocks: int, stream: int) -> torch.Tensor:
        words = workspaces.workspace_size(blocks, self._shape, self._warps)
        if self._given is not None and self._given.numel() >= words:
            return self._given
        if torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            return workspaces.cleared(words, self._device)
        return workspaces.of_stream(words, self._device, stream)

    def __deepcopy__(self, memo: dict) -> None:
        """None: a copied cache has other arrays, for which this step is of no use."""

    def __reduce__(self):
        return type(None), ()


@once_per_tensor
def _transposed(rotation: torch.Tensor) -> torch.Tensor:
    """The transpose of a shared rotation."""
    return rotation.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _capacity(codes: torch.Tensor) -> int:
    """Tiles a head has room for: `codes` may be the filled part of a larger array."""
    return codes.stride(1) // codes.shape[-1] if codes.shape[2] else 0
