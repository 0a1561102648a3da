"""`MeasuringLayer`: encodes new tokens before attention reads them, to measure quantizers (`encode_first`)."""

from __future__ import annotations

import torch

from turboquant_hf.cache.encoder import nan_for_inf
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cache.sides import Side


class MeasuringLayer(TurboQuantLayer):
    """A `TurboQuantLayer` that reads only sinks and the recent window raw, once something is encoded.

    Attributes:
        raw: True encodes after attention, as other layers do. `evaluation` sets it while it reads a prompt.
    """

    raw = False

    @property
    def reads_parts(self) -> bool:
        return self.raw

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().append(key_states, value_states)
        if not self.raw and not self._returns_handles():
            self.commit()

    def observe(self, query: torch.Tensor) -> None:
        super().observe(query)
        if not self.raw:
            self.commit()

    def dense(self, side: Side) -> torch.Tensor:
        """All keys or values [B, H, T, D], as if all tokens older than the recent window were encoded.

        The newest of these tokens do not fill a tile yet, so they are encoded on trial. The packed tokens before them
        complete the trial tile, because the mean of only a few tokens would make the error too small.
        """
        dense, tile, stored = super().dense(side), self.preset.tile, self.stored
        count = self.tail.count - self.preset.recent_window
        if self.raw or not stored or count <= 0:
            return dense
        before = -count % tile
        packed = self.decode(side, stored // tile - 1, stored // tile)[:, :, tile - before :]
        tiles = torch.cat([packed, self.tail.view().of(side)[:, :, :count]], dim=2).unflatten(2, (-1, tile))
        quantizer, state, dim = self.quantizers.of(side), self.states.of(side), self.head_dims.of(side)
        codes = quantizer.encode(nan_for_inf(tiles, quantizer), state, self.weight(stored - before, tiles.shape[2]))
        rounded = quantizer.decode(codes, state, dim, self.dtype).flatten(2, 3)[:, :, before:]
        rounded = self.sinks.overlay(rounded.clone(), side, stored, stored + count)
        return torch.cat([dense[:, :, :stored], rounded, dense[:, :, stored + count :]], dim=2)
