"""The harness reads through the cache: rounding costs something, lossless and a constant in the keys do not."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import make_llama
from turboquant_hf import TurboQuantCache, load_preset
from turboquant_hf.cli import main
from turboquant_hf.evaluation.commands.perplexity import with_repeats
from turboquant_hf.evaluation.harness.fidelity import cut_windows, first_scored, measure, measure_window

SMALL = {"tile": 16, "recent_window": 0, "sinks": 2}


@pytest.fixture(scope="module")
def model():
    return make_llama(vocab_size=97, hidden_size=64, intermediate_size=96, initializer_range=0.3)


def windows(count: int = 1, length: int = 160) -> list[torch.Tensor]:
    return list(torch.randint(0, 97, (count, 1, length), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("attention", ["turboquant", "sdpa", "eager"])
def test_lossless_is_the_baseline(model, attention):
    model.set_attn_implementation(attention)
    presets = [load_preset("lossless", encode_first=True, **SMALL)]
    baseline, (result,) = measure(model, windows(), presets, chunk=16)
    assert result["perplexity"] == pytest.approx(baseline, rel=1e-6)
    assert result["kl"] == pytest.approx(0.0, abs=1e-9) and result["top1"] == 1.0


def test_fewer_bits_cost_more_and_encode_first_reads_nothing_raw(model):
    model.set_attn_implementation("turboquant")
    names = ["k8v4", "k4v4", "k2v2"]
    strict = [load_preset(n, encode_first=True, min_statistics=32, boundary_layers=0, **SMALL) for n in names]
    kinder = [load_preset("k2v2", min_statistics=32, **SMALL)]
    _, results = measure(model, windows(3), strict + kinder, chunk=16)
    kl = [result["kl"] for result in results]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert kl[3] < kl[2]
    assert results[1]["key_bits"] > 4 and results[1]["resident_bytes"] > 0


class Shifted(TurboQuantCache):
    """Adds one constant vector to all keys, which softmax ignores."""

    times = 0.0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        direction = torch.randn(key_states.shape[1], 1, key_states.shape[3], generator=torch.Generator().manual_seed(3))
        norm = key_states.norm(dim=-1).mean()
        if layer_idx not in self.__dict__.setdefault("shift", {}):
            self.shift[layer_idx] = self.times * norm * direction / direction.norm(dim=-1, keepdim=True)
        return super().update(key_states + self.shift[layer_idx], value_states, layer_idx, *args, **kwargs)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2"])
def test_constant_in_all_keys_does_not_matter(model, name):
    model.set_attn_implementation("turboquant")
    preset = load_preset(name, encode_first=True, min_statistics=32, **SMALL)
    kl = []
    for times in (0.0, 1.0, 4.0, 16.0):
        shifted = type("Shifted", (Shifted,), {"times": times})
        kl.append(measure(model, windows(4), [preset], chunk=16, cache_class=shifted)[1][0]["kl"])
    assert kl[1:] == pytest.approx([kl[0]] * 3, rel=0.05)


def test_constant_in_all_keys_destroys_uncentred_rounding(model):
    model.set_attn_implementation("turboquant")
    preset = load_preset("paper-mse-4", encode_first=True, tile=16)
    kl = []
    for times in (0.0, 4.0):
        shifted = type("Shifted", (Shifted,), {"times": times})
        kl.append(measure(model, windows(2), [preset], chunk=16, cache_class=shifted)[1][0]["kl"])
    assert kl[1] > 2 * kl[0]


def test_first_scored_position_has_packed_history():
    presets = [load_preset("k4v4", recent_window=128), load_preset("k2v2", recent_window=0)]
    assert first_scored(presets, 128) == 512
    assert first_scored(presets[:1], 100) == 300
    # A profile packs earlier; the same tokens are scored.
    profiled = presets[1].with_overrides(profile="profile.safetensors")
    assert profiled.first_encode == 128 and first_scored([profiled], 128) == 512


def test_windows_are_spread_and_too_short_a_text_is_named():
    pieces = cut_windows(torch.arange(100), 30, 3)
    assert [int(piece[0, 0]) for piece in pieces] == [0, 35, 70]
    with pytest.raises(ValueError, match="context=200"):
        cut_windows(torch.arange(100), 200, 1)


def test_a_run_of_copies_is_put_in():
    window = with_repeats(torch.arange(10)[None], torch.tensor([[70, 71]]), 5, 3)
    assert window.tolist() == [[0, 1, 2, 70, 71, 70, 71, 70, 3, 4]]
    with pytest.raises(ValueError, match="repeat=''"):
        with_repeats(window, torch.empty(1, 0, dtype=torch.int64), 5, 3)


def test_what_is_scored_later_is_a_part_of_the_sums(model):
    model.set_attn_implementation("turboquant")
    preset = load_preset("k4v4", encode_first=True, min_statistics=32, **SMALL)
    whole, half, last = (measure_window(model, windows()[0], [preset], 32, chunk=16, scored=n) for n in (0, 70, 150))
    assert [record["baseline"]["tokens"] for record in (whole, half, last)] == [127, 89, 9]
    kl = [record["presets"][0]["kl"] for record in (whole, half, last)]
    assert kl[0] > kl[1] > kl[2] > 0


@pytest.mark.slow
def test_command_writes_what_it_measured(tmp_path, capsys):
    pytest.importorskip("gguf")
    status = main(f"perplexity --preset k4v4 --context 420 --windows 1 --recent-window 0 --output {tmp_path}".split())
    assert status == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["context"] == 420 and metrics["windows"] == 1
    (result,) = metrics["results"]
    assert result["preset"] == "k4v4" and 0 < result["kl"] < 0.1
    assert (tmp_path / "config.yaml").is_file()


def test_waiting_for_statistics_does_not_improve_the_figures(model):
    """All presets read what precedes the first scored token in one piece. In chunks, a waiting preset keeps it raw."""
    model.set_attn_implementation("turboquant")
    soon, late = (load_preset("k2v2", encode_first=True, min_statistics=n, **SMALL) for n in (32, 96))
    start = first_scored([soon, late], 16)
    assert start == 96

    def kl(*gradual):
        record = measure_window(model, windows()[0], [soon, late], start, chunk=16, gradual=gradual)
        return [row["kl"] for row in record["presets"]]

    together = kl()
    assert together[0] == together[1] > 0
    apart = kl(True, True)
    assert apart[0] != apart[1] and apart[0] != together[0]
