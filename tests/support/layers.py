"""One packed layer without a model, and the keys and values that tests of it append."""

from __future__ import annotations

from functools import partial

from tests.support import updates
from tests.support.tagged import Lossless
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.cache.measuring import MeasuringLayer
from turboquant_hf.config import CachePreset, load_preset

states = partial(updates.states, batch=1)


def make_layer(keys=None, values=None, handles=False, **options) -> TurboQuantLayer:
    options = {"tile": 8, "recent_window": 8, "sinks": 4, "min_statistics": 0, **options}
    preset = CachePreset(keys=keys or Lossless(), values=values or Lossless(), **options)
    return TurboQuantLayer(preset, preset.keys, preset.values, lambda: handles)


def preset_layer(name, handles=False, offloader=None, **overrides) -> TurboQuantLayer:
    preset = load_preset(name, **{"recent_window": 0, "min_statistics": 0, **overrides})
    kind = MeasuringLayer if preset.encode_first else TurboQuantLayer
    return kind(preset, preset.keys, preset.values, lambda: handles, offloader)
