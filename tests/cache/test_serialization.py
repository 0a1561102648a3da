"""Caches on disk: a loaded cache continues exactly, and a bad file is refused and never misread."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config

from tests.support.families import available, build, family_named, prompt
from tests.support.generating import TILES, generate
from tests.support.updates import feed, held, make_config
from turboquant_hf import CacheFileError, CachePreset, TurboQuantCache, files, load_preset, preset_names
from turboquant_hf.cache import serialization
from turboquant_hf.files import text_checksum

SAVED = ["llama", "mistral", "gemma2", "gemma3n", "gemma4", "gpt_oss", "llama4", "deepseek_v3"]
SAVED += ["qwen3_next", "jamba", "lfm2", "falcon_h1"]
PRESETS = ["lossless", "k4v4", "k2v2", "k8v4", "paper-3.5", "nf4", "paper-prod-3", "qjl-3", "int8"]


@pytest.fixture
def saved(tmp_path):
    """(path, cache) of a cache with packed tiles."""
    cache = feed(TurboQuantCache(make_config(), **TILES), 60)
    cache.save(tmp_path / "x.cache")
    return tmp_path / "x.cache", cache


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_as_plain_data(name):
    preset = load_preset(name, layers={0: {"keys": "lossless"}, -1: {"values": {"quantizer": "mse", "bits": 3}}})
    assert CachePreset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(0, torch.bfloat16), (5, torch.float32), (30, torch.bfloat16), (100, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_loaded_cache_holds_the_same(tmp_path, preset, dtype, tokens):
    options = {**TILES, "layers": {1: {"values": {"quantizer": "mse", "bits": 8}}}}
    cache = TurboQuantCache(make_config(), preset, **options)
    cache.note_padding(torch.tensor([[1, 1, 1], [0, 0, 1]]))
    if tokens:
        feed(cache, tokens, dtype=dtype)
    cache.save(tmp_path / "x")
    loaded = TurboQuantCache.load(tmp_path / "x", make_config())
    assert loaded.preset == cache.preset and [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (loaded.tokens, loaded.nbytes) == (cache.tokens, cache.nbytes)
    for twin in (loaded, cache):
        feed(twin, 40, seed=1, dtype=dtype)
        twin.reorder_cache(torch.tensor([1, 0]))
        twin.crop(-33)
        feed(twin, 20, seed=2, dtype=dtype)
    assert cache.packed_layers[0].tiles[0].count >= 2
    assert cache.packed_layers[0].sinks.first == loaded.packed_layers[0].sinks.first == [2, 0]
    for a, b in zip(held(cache), held(loaded), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("preset", ["lossless", "k4v4"])
def test_generation_continues_from_a_file(tmp_path, name, preset):
    """The tokens are those of an unbroken run, also with sliding windows, recurrent states and shared layers."""
    family = family_named(name)
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    model, inputs = build(family), prompt(family)

    whole = generate(model, inputs, TurboQuantCache(model.config, preset, **TILES), new=32)
    cache = TurboQuantCache(model.config, preset, **TILES)
    first = generate(model, inputs, cache, new=16)
    cache.save(tmp_path / "x")
    for _ in range(2):
        loaded = TurboQuantCache.load(tmp_path / "x", model.config)
        assert torch.equal(generate(model, first, loaded, new=16), whole)


def test_statistics_that_wait_for_more_tokens_are_kept(tmp_path, llama):
    """Queries seen before the first encode are in the file."""
    llama.set_attn_implementation("turboquant")
    ids = torch.randint(3, 199, (2, 60))
    options = {**TILES, "min_statistics": 50}
    whole, half = (TurboQuantCache(llama.config, "k4v4", **options) for _ in range(2))
    llama(ids[:, :30], past_key_values=whole)
    llama(ids[:, :30], past_key_values=half)
    half.save(tmp_path / "x")
    half = TurboQuantCache.load(tmp_path / "x", llama.config)
    for cache in (whole, half):
        llama(ids[:, 30:], past_key_values=cache)
    assert whole.packed_layers[0].tiles[0].count
    for a, b in zip(held(whole), held(half), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers=3, this one has 4"),
        ({"head_dim": 32}, "head_dim=16, this one has 32"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=2"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters=.*this one has"),
        ({"vocab_size": 7}, "vocab_size"),
        ({"kind": Gemma2Config}, "model_type='llama', this one has 'gemma2'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_file_of_another_model_is_refused(saved, change, message):
    with pytest.raises(CacheFileError, match=message):
        TurboQuantCache.load(saved[0], make_config(**change))


def test_a_truncated_file_is_refused(saved):
    path, _ = saved
    data = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, 5000, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(CacheFileError):
            TurboQuantCache.load(path, make_config())


def test_a_file_with_a_flipped_byte_is_refused(saved):
    path, _ = saved
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    places = [*range(0, header, 97), *range(header, len(data), max((len(data) - header) // 60, 1)), len(data) - 1]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(CacheFileError):
            TurboQuantCache.load(path, make_config())


def with_header(path, change):
    """A file with the same tensors and with metadata that `change` has edited."""
    with serialization.safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    content = json.loads(header["content"])
    change(header, content, tensors)
    if "content" in header:
        text = json.dumps(content)
        header |= {"content": text, "checksum": text_checksum(text)}
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, *_: header.clear(), "no saved cache"),
        (lambda header, *_: header.update(version="3"), "version='3' is not supported; allowed: '1', '2'"),
        (lambda _, content, __: content["preset"].update(tile=16), "0.tiles.0.codes.*is not"),
        (lambda _, content, __: content["preset"].update(extra=1), "unknown field 'extra'"),
        (lambda _, content, __: content["layers"].pop(), "2 layers, this model 3"),
        (lambda _, content, __: content["layers"][1].update(kind="OtherLayer"), "layer 1 is a OtherLayer"),
        (lambda _, content, __: content["layers"][1]["packed"].update(tiles=3), "tiles.0.*is not"),
        (lambda _, content, __: content["layers"][0]["packed"].update(states=[["balance"], ["gain"]]), "KeyError"),
        (lambda _, __, tensors: tensors.pop("1.tail.0"), "1.tail.0"),
        (lambda _, __, tensors: tensors["2.sinks.1"].add_(1), "2.sinks.1 does not match its checksum"),
    ],
    ids=range(10),
)
def test_a_file_with_other_contents_is_refused(saved, change, message):
    with_header(saved[0], change)
    with pytest.raises(CacheFileError, match=message):
        TurboQuantCache.load(saved[0], make_config())


def test_a_foreign_file_and_a_missing_file_are_named_in_the_error(tmp_path):
    (tmp_path / "text").write_text("not a cache\n" * 100)
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    for name in ("text", "weights"):
        with pytest.raises(CacheFileError, match=name):
            TurboQuantCache.load(tmp_path / name, make_config())
    with pytest.raises(FileNotFoundError):
        TurboQuantCache.load(tmp_path / "nothing", make_config())


def test_bytes_that_decode_to_something_else_are_refused(saved, monkeypatch):
    """A version whose rules for the same bytes differ must not read the file."""
    quantizer = type(saved[1].packed_layers[0].quantizers[0])
    decode = quantizer.decode
    monkeypatch.setattr(quantizer, "decode", lambda *args, **options: 1.1 * decode(*args, **options))
    with pytest.raises(
        CacheFileError, match="layer 0 was written by rules for conditioned that this version does not read"
    ):
        TurboQuantCache.load(saved[0], make_config())


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, cache = saved
    before = path.read_bytes()
    feed(cache, 30, seed=3)

    def full(*args, **options):
        (path.parent / f"{path.name}.{files.os.getpid()}.part").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        cache.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_missing_folder_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        saved[1].save(tmp_path / "nowhere" / "cache")


def test_what_cannot_be_saved_is_named(tmp_path):
    cache = feed(TurboQuantCache(make_config(Gemma2Config, sliding_window=8), **TILES), 20)
    cache.layers[0].hook = lambda x: x
    with pytest.raises(CacheFileError, match="0, a DynamicSlidingWindowLayer, cannot be saved: hook is a function"):
        cache.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_layers_are_loaded_to_the_requested_devices(saved):
    """The device "meta" holds no bytes. The test only looks at where each layer goes."""
    loaded = TurboQuantCache.load(saved[0], make_config(), device="cpu")
    assert {layer.device.type for layer in loaded.packed_layers} == {"cpu"}
    loaded = TurboQuantCache.load(saved[0], make_config(), device={0: "cpu", 2: torch.device("cpu")})
    assert {layer.device.type for layer in loaded.packed_layers} == {"cpu"}


def test_saving_changes_nothing(saved):
    path, cache = saved
    twin = feed(TurboQuantCache(make_config(), **TILES), 60)
    for a, b in zip(held(cache), held(twin), strict=True):
        assert torch.equal(a, b)
