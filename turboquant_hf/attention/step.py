"""One decode step of a `TurboQuantLayer` as a single launch, with everything looked up in the step before."""

from __future__ import annotations

import os
from operator import is_

import torch

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.kernels.dispatch import VARIABLE, on_device, prepared_decode


class PreparedStep:
    """The kernel call of a layer's next steps, for as long as its arrays and the model's options stay what they are.

    The call also writes the newest token to the tail, where `TailBuffer.postpone` left that open.
    """

    def __init__(self, layer: TurboQuantLayer, query: torch.Tensor, masked: bool, options: dict, call) -> None:
        self._call, self._held, self._masked = call, _held(layer), masked
        self._shape, self._dtype, self._device = query.shape, query.dtype, query.device
        self._tokens = tuple(torch.Size((*x.shape[:2], 1, x.shape[3])) for x in layer.tail.arrays)
        self._scaling, self._softcap, self._s_aux = options["scaling"], options["softcap"], options["s_aux"]
        self._sparse = layer.preset.sparse_v_threshold
        self._backend = os.environ.get(VARIABLE)

    @classmethod
    def of(
        cls, layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None, options: dict
    ) -> PreparedStep | None:
        """For a query [B, Hq, 1, D] that `packed_attention` serves; None where only the general way does."""
        if layer.offloader is not None:
            return None
        raw = RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.arrays)
        history = History(*layer.packed_sides(spare=True), *raw, layer.sinks.starts)
        scoring = Scoring(**options, sparse_v_threshold=layer.preset.sparse_v_threshold)
        call = prepared_decode(query, history, scoring, masked=mask is not None)
        return None if call is None else cls(layer, query, mask is not None, options, call)

    def takes(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these are one more token [B, H, 1, D] of each sequence, as the layer stores them."""
        return (
            keys.shape == self._tokens[0]
            and values.shape == self._tokens[1]
            and keys.dtype == values.dtype == self._dtype
            and keys.device == values.device == self._device
            and not (keys.requires_grad or values.requires_grad)
        )

    def fits(self, layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None, options: dict) -> bool:
        """Whether the call still means this layer, query, mask and options."""
        # Asked in every layer of every step: nothing here loops in Python.
        return (
            query.shape == self._shape
            and query.dtype == self._dtype
            and query.device == self._device
            and (mask is not None) == self._masked
            and options["s_aux"] is self._s_aux
            and options["scaling"] == self._scaling
            and options["softcap"] == self._softcap
            and layer.preset.sparse_v_threshold == self._sparse
            and all(map(is_, self._held, _held(layer)))
            and os.environ.get(VARIABLE) == self._backend
        )

    def __call__(self, layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, 1, Hq, D]."""
        _, new = layer.tail.hand_over()
        if new is not None:
            new = tuple(x.contiguous() for x in new)
        with on_device(query.device):
            output = self._call(query.contiguous(), layer.tiles[0].count, layer.tail.count, mask, new)
        return output.transpose(1, 2)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied cache has other arrays."""

    def __reduce__(self):
        return type(None), ()


def _held(layer: TurboQuantLayer) -> tuple:
    """What the call points to. The tail is asked for without having anything written."""
    keys, values = (store.arrays for store in layer.tiles)
    return (
        keys["codes"], keys["scale"], keys.get("mean"), values["codes"], values["scale"], layer.tail._arrays,
        layer.sinks.arrays, layer.sinks.starts, layer.states,
    )  # fmt: skip
