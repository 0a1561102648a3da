"""Random operations on a layer and on plain tensors: both are equal, bit for bit, in every state."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.tagged import Lossless, Tagged
from turboquant_hf.cache import TurboQuantLayer, serialization
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.config import CachePreset

HEADS = 2
MAX_BATCH = 6
LENGTHS = st.sampled_from([0, 1, 1, 1, 2, 7, 8, 9, 16, 25, 64, 130])


class LayerMachine(RuleBasedStateMachine):
    """`keys` and `values` are the model: dense [B, H, T, D]; `starts` is where each sequence's real tokens begin."""

    @initialize(
        tile=st.sampled_from([8, 16]),
        window=st.sampled_from([0, 5, 128]),
        sinks=st.sampled_from([0, 4, 10]),
        minimum=st.sampled_from([0, 40]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        quantizer=st.sampled_from([Tagged, Lossless]),
        starts=st.lists(st.sampled_from([0, 0, 3, 12, 20]), min_size=1, max_size=3),
        handles=st.booleans(),
        offload=st.booleans(),
        seed=st.integers(0, 99),
    )
    def start(self, tile, window, sinks, minimum, dtype, quantizer, starts, handles, offload, seed):
        self.preset = CachePreset(
            keys=quantizer(), values=quantizer(), tile=tile, recent_window=window, sinks=sinks, min_statistics=minimum
        )
        self.dims, self.dtype = (6, 10), dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.handles = handles
        self.offload = offload
        self.layer = self.new_layer()
        self.clear(starts)
        self.layer.note_padding(starts)

    def new_layer(self):
        offloader = Offloader() if self.offload else None
        layer = TurboQuantLayer(self.preset, self.preset.keys, self.preset.values, lambda: self.handles, offloader)
        if self.offload:  # a second layer that also uses the staging buffers
            other = TurboQuantLayer(self.preset, self.preset.keys, self.preset.values, lambda: False, offloader)
            other.update(*(torch.ones(1, HEADS, 200, dim, dtype=self.dtype) for dim in self.dims))
            self.neighbour = other
        return layer

    def clear(self, starts):
        self.starts = list(starts)
        self.dense = [torch.empty(len(starts), HEADS, 0, dim, dtype=self.dtype) for dim in self.dims]
        self.attended = True

    @property
    def length(self):
        return self.dense[0].shape[2]

    @property
    def batch(self):
        return len(self.starts)

    def draw(self, tokens, batch=None):
        shape = (batch or self.batch, HEADS, tokens)
        return [torch.randn(*shape, dim, generator=self.generator).to(self.dtype) for dim in self.dims]

    def check(self, got, index):
        assert got.shape == self.dense[index].shape and got.dtype == self.dtype
        for row, begin in enumerate(self.starts):
            assert torch.equal(got[row, :, begin:], self.dense[index][row, :, begin:]), f"sequence {row}"

    @rule(tokens=LENGTHS, attend=st.booleans())
    def update(self, tokens, attend):
        new = self.draw(tokens)
        self.dense = [torch.cat(pair, dim=2) for pair in zip(self.dense, new, strict=True)]
        got = self.layer.update(*(x.clone() for x in new))
        if self.handles:
            assert [tuple(x.shape) for x in got] == [tuple(x.shape) for x in self.dense]
            got = [x.dense() for x in got]
        for index in (0, 1):
            self.check(got[index], index)
        if self.handles and attend and tokens:
            self.layer.observe(torch.randn(self.batch, 2 * HEADS, tokens, self.dims[0], generator=self.generator))
            self.layer.commit()
            for index in (0, 1):
                self.check(got[index], index)

    @rule()
    def commit(self):
        self.layer.commit()

    @rule()
    def switch_attention(self):
        self.handles = not self.handles

    @precondition(lambda self: self.length)
    @rule(data=st.data(), absolute=st.booleans())
    def crop(self, data, absolute):
        keep = data.draw(st.integers(1, self.length))
        if not absolute and data.draw(st.booleans()):
            keep = max(self.length - data.draw(st.integers(0, 5)), 1)
        self.layer.crop(keep if absolute else keep - self.length)
        self.dense = [x[:, :, :keep] for x in self.dense]

    @rule()
    def crop_nothing(self):
        self.layer.crop(0)

    @precondition(lambda self: self.length)
    @rule(more=st.integers(0, 3))
    def crop_everything(self, more):
        self.layer.crop(-self.length - more)
        self.clear([0] * self.batch)

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data):
        order = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        self.layer.reorder_cache(torch.tensor(order))
        self.pick(order)

    @precondition(lambda self: self.length)
    @rule(data=st.data(), as_list=st.booleans())
    def select(self, data, as_list):
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=self.batch, unique=True))
        self.layer.batch_select_indices(rows if as_list else torch.tensor(rows))
        self.pick(rows)

    @precondition(lambda self: 2 * self.batch <= MAX_BATCH)
    @rule()
    def repeat(self):
        self.layer.batch_repeat_interleave(2)
        self.pick([row for row in range(self.batch) for _ in (0, 1)])

    def pick(self, rows):
        self.dense = [x[rows] for x in self.dense]
        self.starts = [self.starts[row] for row in rows]

    @rule(starts=st.lists(st.sampled_from([0, 2, 17]), min_size=1, max_size=3))
    def reset(self, starts):
        self.layer.reset()
        self.clear(starts)
        self.layer.note_padding(starts)

    @precondition(lambda self: self.offload)
    @rule()
    def neighbour_attends(self):
        other = self.layer.offloader.layers[-1]
        assert other is not self.layer
        got = other.update(*(torch.ones(1, HEADS, 1, dim, dtype=self.dtype) for dim in self.dims))
        assert all(bool((x == 1).all()) for x in got)

    @rule()
    def save_and_load(self):
        """Save to a file and load into a new layer."""
        tensors = {}
        described = serialization._describe_packed(self.layer, "0.", tensors)
        described, self.layer = json.loads(json.dumps(described)), self.new_layer()
        serialization._fill_packed(self.layer, described, "0.", lambda name: tensors[name].clone(), None)

    @rule(change=st.sampled_from(["batch", "heads", "dim", "dtype", "device", "rank"]))
    def a_wrong_block_is_named(self, change):
        keys, values = self.draw(3)
        if not self.layer.is_initialized:
            return
        if change == "batch":
            keys, values = (torch.cat([x, x]) for x in (keys, values))
        elif change == "heads":
            keys, values = keys[:, :1], values[:, :1]
        elif change == "dim":
            values = values[..., :-1]
        elif change == "dtype":
            keys = keys.double()
        elif change == "device":
            keys, values = keys.to("meta"), values.to("meta")
        else:
            keys = keys[0]
        with pytest.raises(ValueError, match="does not continue this layer"):
            self.layer.update(keys, values)

    @rule()
    def deepcopy(self):
        old, self.layer = self.layer, copy.deepcopy(self.layer)
        if self.length:
            old.update(*self.draw(40))
            old.crop(-(self.length // 2) or -1)
            old.update(*self.draw(40))

    @rule()
    def offload_and_back(self):
        self.layer.offload()
        self.layer.prefetch()

    @invariant()
    def length_and_mask_sizes(self):
        if not hasattr(self, "layer"):
            return
        assert self.layer.get_seq_length() == self.length
        for query in (1, 5):
            assert self.layer.get_mask_sizes(query) == (self.length + query, 0)

    @invariant()
    def holds_what_was_stored(self):
        if not hasattr(self, "layer") or not self.layer.is_initialized:
            return
        for index, got in enumerate((self.layer.keys, self.layer.values)):
            self.check(got, index)

    @invariant()
    def packs_what_is_old_enough(self):
        if not hasattr(self, "layer") or not self.layer.is_initialized:
            return
        layer, preset = self.layer, self.preset
        assert layer.tiles[0].count == layer.tiles[1].count
        assert layer.nbytes > 0 and layer.spare_nbytes >= 0
        if not self.handles and layer.encoder.fitted:
            layer.commit()
            assert layer.tail.count < preset.recent_window + preset.tile


TestLayerMachine = pytest.mark.filterwarnings("error")(LayerMachine.TestCase)
TestLayerMachine.settings = settings(max_examples=120, stateful_step_count=25)
