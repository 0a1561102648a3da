"""`PreparedStep`: the kernel call of a layer's decode step, prepared once and used for many steps."""

from __future__ import annotations

import os
from operator import is_
from typing import Any

import torch

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.kernels.dispatch import VARIABLE, on_device, prepared_decode


class PreparedStep:
    """The kernel call of a layer's next steps. It is valid as long as the layer's arrays and the options stay the same.

    Args:
        layer, query, mask, options: those of the first step, which `packed_attention` serves; query [B, Hq, 1, D].
    """

    def __init__(self, layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None, options: dict) -> None:
        self._known, self._places = _known(layer, query, mask, options), (options["s_aux"], *layer.places)
        raw = RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.arrays)
        history = History(*layer.packed_sides(spare=True), *raw, layer.sinks.starts)
        scoring = Scoring(**options, sparse_v_threshold=layer.preset.sparse_v_threshold)
        self._call = prepared_decode(query, history, scoring, masked=mask is not None)

    def serves(self, layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None, options: dict) -> bool:
        """Whether there is a prepared call, and it is valid for this layer, query, mask and these options."""
        # Asked in every layer of every step, so nothing here loops in Python.
        places = options["s_aux"], *layer.places
        same = all(map(is_, self._places, places)) and self._known == _known(layer, query, mask, options)
        return same and self._call is not None

    def __call__(self, layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Run the call: query [B, Hq, 1, D] -> [B, 1, Hq, D]."""
        with on_device(query.device):
            output = self._call(query.contiguous(), layer.tiles.keys.count, layer.tail.count, mask)
        return output.transpose(1, 2)

    def __deepcopy__(self, memo: dict) -> None:
        """Return None: a copied cache has other arrays."""

    def __reduce__(self):
        return type(None), ()


def _known(layer: TurboQuantLayer, query: torch.Tensor, mask: torch.Tensor | None, options: dict) -> tuple[Any, ...]:
    """Everything except the arrays that the call depends on."""
    numbers = options["scaling"], options["softcap"], layer.preset.sparse_v_threshold, os.environ.get(VARIABLE)
    return query.shape, query.dtype, query.device, mask is not None, *numbers
