"""`TurboQuantStaticLayer` by itself: tiles, sinks, crops, batch operations, memory."""

from __future__ import annotations

import pytest
import torch

from tests.support.updates import feed_layer, make_static_layer, states
from turboquant_hf.attention import turboquant_attention_forward
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.cache.sides import SIDES


def counts(layer):
    return [layer.tiles[0].count, int(layer.get_seq_length())]


SPLITS = {
    "one-chunk": [150],
    "chunks": [40, 17, 60, 33],
    "steps": [1] * 150,
    "blocks": [16] * 9 + [6],
    "chunk-and-steps": [70, *[1] * 40, 20, *[5] * 4],
    "short-first": [3, 9, 16, 30, *[4] * 23],
}


@pytest.mark.parametrize("split", SPLITS)
def test_any_way_of_feeding_holds_the_same(split):
    keys, values = states(150)
    layer = make_static_layer()
    result = feed_layer(layer, keys, values, SPLITS[split])
    for got, given in zip(result, (keys, values), strict=True):
        assert got.shape[2] == 200 and torch.equal(got[:, :, :150], given) and not got[:, :, 150:].any()
    assert counts(layer) == [(150 - 8) // 8, 150]
    assert int(layer.get_seq_length()) == 150 and layer.get_mask_sizes(1) == (200, 0)


@pytest.mark.parametrize("preset", ["k4v4", "int4", "polar-4"])
def test_steps_and_chunks_encode_alike(preset):
    """After the same first chunk, tokens one by one and tokens at once give the same codes."""
    keys, values = states(120, dim=32)
    results = []
    for steps in ([40, 80], [40, *[1] * 80], [40, *[7] * 11, 3]):
        layer = make_static_layer(preset)
        feed_layer(layer, keys, values, steps)
        results.append((layer.keys, layer.values))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)
    assert (results[0][0][:, :, :120] - keys).abs().max() > 1e-3


def test_sinks_follow_the_padding():
    keys, values = states(60)
    layer = make_static_layer("k2v2", min_statistics=16)
    layer.note_padding([0, 13])
    feed_layer(layer, keys, values, [60])
    dense = layer.keys, layer.values
    for row, start in ((0, 0), (1, 13)):
        assert torch.equal(dense[0][row, :, start : start + 4], keys[row, :, start : start + 4])
        assert not torch.equal(dense[0][row, :, start + 4 : start + 8], keys[row, :, start + 4 : start + 8])


@pytest.mark.parametrize("keep", [149, 140, 130, 129, 128, 100, 96, 50, 3, 0])
def test_crop_and_continue(keep):
    keys, values = states(150)
    more = states(40, seed=1)
    layer = make_static_layer()
    feed_layer(layer, keys, values, [100, *[1] * 50])
    layer.crop(keep - 150)
    assert int(layer.get_seq_length()) == keep
    feed_layer(layer, *more, [1] * 40)
    got = layer.keys[:, :, : keep + 40]
    assert torch.equal(got, torch.cat([keys[:, :, :keep], more[0]], dim=2))
    layer.crop(10)
    assert int(layer.get_seq_length()) == 10


def test_batches_and_reset():
    keys, values = states(90, batch=3)
    layer = make_static_layer("lossless")
    layer.note_padding([0, 5, 9])
    feed_layer(layer, keys, values, [60, *[1] * 30])
    capacity = layer.tiles[0].capacity
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(layer.values[:, :, :90], values[[2, 2, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.values[:, :, :90], values[[2, 2, 2, 2, 0, 0]])
    layer.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(layer.values[:, :, :90], values[[0, 2]]) and layer.tiles[0].capacity == capacity
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None
    feed_layer(layer, keys, values, [60, *[1] * 30])
    assert torch.equal(layer.values[:, :, :90], values)


def test_a_full_layer_says_so():
    layer = make_static_layer(max_len=40)
    feed_layer(layer, *states(40), [30, 10])
    with pytest.raises(ValueError, match="max_cache_len=40 is not enough: 40 tokens are held and 1 more came"):
        layer.update(*states(1))
    with pytest.raises(ValueError, match="does not continue this layer's"):
        layer.update(*states(1, batch=1))


def test_long_padding_does_not_prevent_encoding():
    keys, values = states(150)
    layer = make_static_layer("k4v4")
    layer.note_padding([130, 100])
    feed_layer(layer, keys, values, [1] * 150)
    assert layer.tiles[0].count > 0
    got = layer.keys
    assert torch.equal(got[0, :, 142:150], keys[0, :, 142:]) and got.isfinite().all()


def test_memory_is_what_is_held():
    layer = make_static_layer("k4v4", max_len=4096)
    feed_layer(layer, *states(1000, dim=64), [1000])
    arrays = [x for store in layer.tiles for x in store.arrays.values()]
    arrays += [*layer.tail.arrays, *layer.sinks.arrays, layer.sinks.starts]
    arrays += [x for state in layer.states for x in state.values()]
    assert layer.nbytes + layer.spare_nbytes == sum(x.untyped_storage().nbytes() for x in arrays)
    assert layer.dense_nbytes == 2 * 2 * 2 * 1000 * 128 and layer.nbytes < layer.spare_nbytes


@pytest.mark.parametrize(("side", "bad"), [(0, float("nan")), (1, float("inf"))], ids=["keys-nan", "values-inf"])
@pytest.mark.parametrize("feeding", ["chunk", "steps"])
@pytest.mark.parametrize("name", ["k4v4", "k2v2", "int4"])
@pytest.mark.parametrize("token", [30, 65], ids=["fitted", "later"])
def test_a_bad_number_is_seen_in_its_head(name, token, feeding, bad, side):
    """Whatever way it came, and whether statistics were taken of it or not; other heads stay as they are."""
    layer = make_static_layer(name)
    layer.note_padding([0, 5])
    x = states(80, dim=32)
    x[side][1, 0, token, 7] = bad
    feed_layer(layer, *x, [80] if feeding == "chunk" else [40, *[1] * 40])
    assert counts(layer) == [9, 80]
    dense = layer.dense(SIDES[side])
    assert not dense[1, 0, token].isfinite().all()
    assert dense[0].isfinite().all() and dense[1, 1].isfinite().all()
    if name != "int4":
        query, module = torch.randn(2, 4, 1, 32), torch.nn.Module().eval()
        output, _ = turboquant_attention_forward(module, query, *layer.handles(), None, scaling=0.2)
        assert output[1, 0, :2].isnan().all()
        assert output[0].isfinite().all() and output[1, 0, 2:].isfinite().all()


def test_means_beyond_float16_are_kept(monkeypatch):
    said = []
    monkeypatch.setattr("turboquant_hf.cache.word.logger.warning_once", said.append)
    layer = make_static_layer("k4v4")
    x = states(80, dim=32)
    x[0][1, 0, :, 7] += 1e5
    feed_layer(layer, *x, [80])
    error = (layer.keys[:, :, 8:64] - x[0][:, :, 8:64])[1, 0]
    assert error[:, 7].abs().max() < 1e5 / 1000 and error[:, :7].abs().max() < 1 and not said


@pytest.mark.parametrize("splits", [[40, 40], [40, *[1] * 40]], ids=["chunk", "steps"])
def test_later_tokens_of_another_size_are_read_as_a_growing_layer_does(splits):
    """Values are read well; keys of another size before them lose what is nothing beside the later ones."""
    layer, given = make_static_layer("k4v4"), states(80, dim=64)
    growing = TurboQuantLayer(layer.preset, *layer.quantizers)
    for x in given:
        x[:, 1, 48:] *= 1e4
    for each in (layer, growing):
        feed_layer(each, *given, splits)
    assert counts(layer) == [9, 80]
    assert torch.equal(layer.keys[:, :, :80], growing.keys) and torch.equal(layer.values[:, :, :80], growing.values)
    for index, part in ((0, slice(48, 72)), (1, slice(None, 40)), (1, slice(48, 72))):
        ours, wanted = layer.dense(SIDES[index])[:, :, part], given[index][:, :, part]
        assert ((ours - wanted).norm(dim=(2, 3)) < 0.3 * wanted.norm(dim=(2, 3))).all()
