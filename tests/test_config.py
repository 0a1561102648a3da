"""Presets: reading, refusing with a helpful message, and the quantizers of each layer."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from turboquant_hf import CachePreset, load_preset, preset_names
from turboquant_hf.config import BOUNDARY_VALUES
from turboquant_hf.quantizers import QUANTIZERS

BAD = [
    ({"recent": 3}, ("recent", "3", "recent_window")),
    ({1: 2}, ("unknown field 1", "sinks")),
    ({"tile": 12}, ("tile=12", "multiples of 8")),
    ({"tile": 0}, ("tile=0", "whole numbers from 8")),
    ({"tile": True}, ("tile=True", "whole numbers")),
    ({"sinks": -1}, ("sinks=-1", "whole numbers from 0")),
    ({"recent_window": 1.5}, ("recent_window=1.5", "whole numbers from 0")),
    ({"boundary_layers": "2"}, ("boundary_layers='2'", "whole numbers from 0")),
    ({"min_statistics": None}, ("min_statistics=None", "whole numbers from 0")),
    ({"sparse_v_threshold": 1.0}, ("sparse_v_threshold=1.0", "[0, 1)")),
    ({"sparse_v_threshold": float("nan")}, ("sparse_v_threshold=nan", "[0, 1)")),
    ({"encode_first": "no"}, ("encode_first='no'", "true, false")),
    ({"name": 3}, ("name=3", "text")),
    ({"keys": 4}, ("keys=4", "mapping with 'quantizer'")),
    ({"keys": "huffman"}, ("keys", "'huffman'", "conditioned", "lossless")),
    ({"keys": {"bits": 4}}, ("keys={'bits': 4}", "mapping with 'quantizer'")),
    ({"values": {"quantizer": ["mse"]}}, ("values", "['mse']", "mse")),
    ({"values": {"quantizer": "mse", "width": 4}}, ("values (mse)", "'width'=4", "bits")),
    ({"values": {"quantizer": "mse", "bits": 9}}, ("mse", "bits=9", "from 1 to 8")),
    ({"values": {"quantizer": "mse", "bits": 0}}, ("mse", "bits=0", "from 1 to 8")),
    ({"values": {"quantizer": "mse", "bits": "4"}}, ("mse", "bits='4'", "whole numbers")),
    ({"values": {"quantizer": "mse", "rounds": True}}, ("rounds=True", "whole numbers")),
    ({"values": {"quantizer": "mse", "seed": "x"}}, ("seed='x'", "whole numbers")),
    ({"values": {"quantizer": "mse", "channel_major": 3}}, ("channel_major=3", "true, false")),
    ({"values": {"quantizer": "mse", "rotation": "dct"}}, ("rotation='dct'", "hadamard, qr")),
    ({"keys": {"quantizer": "conditioned", "center": "x"}}, ("center='x'", "true, false")),
    ({"keys": {"quantizer": "conditioned", "widths": 4}}, ("widths=4", "pairs")),
    ({"keys": {"quantizer": "conditioned", "widths": [["a", 3]]}}, ("widths", "'a'", "pairs")),
    ({"keys": {"quantizer": "conditioned", "widths": [[0.5, 4]]}}, ("widths", "add up to 1")),
    ({"keys": {"quantizer": "conditioned", "widths": [[1.0, 12]]}}, ("widths", "12", "from 1 to 8")),
    ({"tile": list(range(99))}, ("tile=<list>", "whole numbers")),
    ({"layers": 3}, ("layers=3", "ordinals")),
    ({"layers": [1, 2]}, ("layers=[1, 2]", "ordinals")),
    ({"layers": {"first": {}}}, ("layers", "'first'", "ordinals")),
    ({"layers": {"::0": {}}}, ("layers", "'::0'", "ordinals", "slices")),
    ({"layers": {0: 3}}, ("layers: 0", "3", "keys and values")),
    ({"layers": {0: {"queries": "mse"}}}, ("layers: 0", "queries", "keys, values")),
    ({"layers": {-1: {"values": {"quantizer": "mse", "bits": 11}}}}, ("mse", "bits=11", "from 1 to 8")),
]


@pytest.mark.parametrize(("data", "parts"), BAD, ids=[str(data) for data, _ in BAD])
def test_bad_entries_name_field_value_and_what_is_allowed(data, parts, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))  # of two overrides of a layer the last one wins
    ways = [lambda: CachePreset.from_dict(data), lambda: CachePreset.from_yaml(path), lambda: load_preset(data)]
    if all(isinstance(name, str) for name in data):
        ways += [lambda: CachePreset().with_overrides(**data), lambda: load_preset("k4v4", **data)]
    for way in ways:
        with pytest.raises(ValueError) as error:
            way()
        for part in parts:
            assert part in str(error.value)


@pytest.mark.parametrize("preset", ["k9v9", "", ".", None, 3, []], ids=repr)
def test_an_unknown_preset_is_named(preset):
    with pytest.raises(ValueError, match="preset=.*allowed"):
        load_preset(preset)


def test_the_nearest_name_is_suggested():
    with pytest.raises(ValueError, match="did you mean 'k4v4'"):
        load_preset("k4_v4")
    with pytest.raises(ValueError, match="did you mean 'boundary_layers'"):
        load_preset("k4v4", boundry_layers=2)
    with pytest.raises(FileNotFoundError, match="mine.yaml"):
        load_preset("mine.yaml")


def test_suggestions_ignore_case():
    for data, name in (({"preset": "K4V4"}, "k4v4"), ({"Keys": "mse"}, "keys"), ({"keys": "MSE"}, "mse")):
        with pytest.raises(ValueError, match=f"did you mean '{name}'"):
            load_preset(data)


@pytest.mark.parametrize("name", ["tile", "sinks", "recent_window", "min_statistics"])
def test_an_unreasonable_size_is_refused_before_it_is_allocated(name):
    with pytest.raises(
        ValueError, match=f"{name}=1000000000 is not supported; allowed: whole numbers from . to 131,072"
    ):
        load_preset("k4v4", **{name: 10**9})


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("k4v4", FileNotFoundError, "path='k4v4': no such file; preset='k4v4' names the shipped preset"),
        ("none.yaml", FileNotFoundError, "path='none.yaml': no such file"),
        (".", ValueError, "because it is a folder; allowed: a YAML file"),
        (None, ValueError, "path=None is not supported; allowed: the path of a YAML file"),
        (4, ValueError, "path=4 is not supported"),
    ],
    ids=str,
)
def test_a_path_that_is_no_preset_file_is_named(path, kind, message):
    with pytest.raises(kind, match=message):
        CachePreset.from_yaml(path)


def test_a_binary_file_is_no_preset(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xd0\xff\x00")
    with pytest.raises(ValueError, match="weights.yaml is not YAML"):
        load_preset(path)


def test_a_label_says_what_differs_from_the_preset_it_names(tmp_path):
    changed = load_preset("k4v4", values={"quantizer": "mse", "bits": 2}, sinks=8)
    assert changed.name == "k4v4" and changed.label == "k4v4 with values=mse(bits=2), sinks=8"
    assert changed.with_overrides(sinks=9).label == "k4v4 with values=mse(bits=2), sinks=9"
    assert CachePreset.from_dict(changed.to_dict()).label == changed.label, "also when it was saved"
    assert load_preset("k4v4", layers={0: {"keys": "lossless"}}).label == "k4v4 with layers={0: keys=lossless}"
    assert load_preset("k4v4", sinks=4).label == "k4v4" and load_preset("k4v4", name="mine", sinks=9).label == "mine"
    path = tmp_path / "mine.yaml"
    path.write_text("keys: lossless\n")
    assert load_preset(path, tile=64).label == "mine with tile=64"


def test_a_mapping_may_start_from_a_preset():
    assert load_preset({"preset": "k3v3", "sinks": 8}) == load_preset("k3v3", sinks=8)
    assert load_preset({"preset": {"preset": "k3v3", "sinks": 8}, "tile": 64}) == load_preset("k3v3", sinks=8, tile=64)


@pytest.mark.parametrize("text", ["", "- a\n- b", "3", "keys: ["], ids=repr)
def test_a_file_that_holds_no_fields_is_named(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="mine.yaml"):
        load_preset(path)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_serves_common_heads(name, head_dim):
    preset = load_preset(name)
    assert preset.name == name
    preset.validate(head_dim)


@pytest.mark.parametrize(
    ("keys", "head_dim", "parts"),
    [
        ({"quantizer": "mse", "rotation": "hadamard"}, 30, ("30", "adamard")),
        ({"quantizer": "conditioned", "rotation": "hadamard"}, 50, ("50", "adamard")),
        ("polar", 20, ("polar", "head_dim=20", "multiples of 16")),
        ({"quantizer": "conditioned", "widths": [[0.1, 8], [0.9, 2]]}, 8, ("conditioned", "head_dim=8", "2 channels")),
    ],
    ids=str,
)
def test_head_dims_that_cannot_be_served_are_named(keys, head_dim, parts):
    for preset in (CachePreset(keys=keys), CachePreset(layers={3: {"keys": keys}})):
        with pytest.raises(ValueError) as error:
            preset.validate(head_dim)
        for part in parts:
            assert part in str(error.value)


@pytest.mark.parametrize("head_dim", [20, 30, 50, 96, 112])
def test_the_automatic_rotation_serves_every_head_dim(head_dim):
    load_preset("k4v4").validate(head_dim)


def test_a_layers_override_beats_the_boundary_rule_and_the_boundary_beats_the_preset():
    layers = {1: {"values": "lossless"}, -1: {"keys": "kivi"}, 3: {"keys": "lossless"}}
    preset = CachePreset(boundary_layers=2, layers=layers)
    pairs = [preset.layer_quantizers(ordinal, 7) for ordinal in range(7)]
    lossless = QUANTIZERS["lossless"]()
    assert [keys for keys, _ in pairs] == [*[preset.keys] * 3, lossless, *[preset.keys] * 2, QUANTIZERS["kivi"]()]
    middle = [preset.values] * 3
    assert [v for _, v in pairs] == [BOUNDARY_VALUES, lossless, *middle, BOUNDARY_VALUES, BOUNDARY_VALUES]


def test_an_ordinal_outside_the_model_changes_nothing():
    preset = CachePreset(layers={9: {"keys": "lossless"}, -9: {"keys": "lossless"}})
    assert all(preset.layer_quantizers(ordinal, 4) == (preset.keys, preset.values) for ordinal in range(4))


@pytest.mark.parametrize(
    ("which", "found"), [("::2", [0, 2, 4]), ("1::3", [1, 4]), ("-2:", [3, 4]), (":", [0, 1, 2, 3, 4]), ("7:", [])]
)
def test_a_slice_names_its_layers_in_models_of_any_depth(which, found):
    preset = CachePreset(layers={which: {"keys": "lossless"}})
    lossless = [preset.layer_quantizers(ordinal, 5)[0] == QUANTIZERS["lossless"]() for ordinal in range(5)]
    assert [ordinal for ordinal, is_it in enumerate(lossless) if is_it] == found
    preset.check_layers(5)
    assert CachePreset.from_dict(preset.to_dict()) == preset


def test_the_last_override_of_a_layer_wins():
    preset = CachePreset(layers={":": {"keys": "kivi"}, 1: {"keys": "lossless"}})
    assert [preset.layer_quantizers(ordinal, 3)[0].name for ordinal in range(3)] == ["kivi", "lossless", "kivi"]


def test_overrides_leave_the_original_as_it_is():
    preset = load_preset("k4v4")
    assert preset.with_overrides(sinks=9).sinks == 9 and preset.sinks != 9
    assert preset.with_overrides(values="lossless").values == QUANTIZERS["lossless"]()
    with pytest.raises(AttributeError):
        preset.sinks = 3


def plain(quantizer):
    """A quantizer as in YAML, with lists instead of tuples."""
    data = {name: [list(x) for x in v] if isinstance(v, tuple) else v for name, v in asdict(quantizer).items()}
    return {"quantizer": quantizer.name, **data}


BITS = st.integers(1, 8)
MSE = st.fixed_dictionaries(
    {"quantizer": st.just("mse"), "bits": BITS},
    optional={
        "scale": st.sampled_from(["norm", "norm-corrected", "mse", "unbiased"]),
        "rotation": st.sampled_from(["auto", "qr", "identity"]),
        "seed": st.integers(0, 9),
        "per_head": st.booleans(),
        "channel_major": st.booleans(),
    },
)
CONDITIONED = st.builds(
    lambda share, high, low, center: {
        "quantizer": "conditioned", "widths": [[share, high], [1 - share, low]], "center": center
    },
    st.sampled_from([0.25, 0.5, 0.75]), BITS, BITS, st.booleans(),
)  # fmt: skip
SIDES = st.one_of(st.sampled_from(["lossless", "mse", "polar", "kivi"]), MSE, CONDITIONED)


@given(
    data=st.fixed_dictionaries(
        {},
        optional={
            "name": st.text("abc-0", min_size=1),
            "keys": SIDES,
            "values": SIDES,
            "tile": st.sampled_from([8, 32, 128, 136]),
            "sinks": st.integers(0, 300),
            "recent_window": st.integers(0, 300),
            "min_statistics": st.integers(0, 300),
            "boundary_layers": st.integers(0, 9),
            "sparse_v_threshold": st.sampled_from([0, 0.0, 1e-4, 0.5]),
            "encode_first": st.booleans(),
            "layers": st.dictionaries(
                st.one_of(st.integers(-9, 9), st.sampled_from(["::2", "1::2", "-3:"])),
                st.fixed_dictionaries({}, optional={"keys": SIDES, "values": SIDES}),
                max_size=3,
            ),
        },
    )
)
def test_presets_survive_yaml(data, tmp_path_factory):
    preset = CachePreset.from_dict(data)
    path = tmp_path_factory.mktemp("presets") / "custom.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))  # of two overrides of a layer the last one wins
    assert CachePreset.from_yaml(path) == preset
    # And once more from what was understood, every default spelled out.
    spelled = {name: getattr(preset, name) for name in preset.__dataclass_fields__}
    for role in ("keys", "values"):
        spelled[role] = plain(spelled[role])
    spelled["layers"] = {
        index: {role: plain(q) for role in ("keys", "values") if (q := getattr(override, role)) is not None}
        for index, override in preset.layers
    }
    path.write_text(yaml.safe_dump(spelled, sort_keys=False))
    assert CachePreset.from_yaml(path) == preset and hash(CachePreset.from_yaml(path)) == hash(preset)
