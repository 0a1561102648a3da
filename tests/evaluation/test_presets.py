"""The table of presets: computed figures beside those of a real cache."""

import pytest
import torch
from transformers import LlamaConfig

from turboquant_hf import TurboQuantCache, cli, load_preset, preset_names
from turboquant_hf.evaluation import common
from turboquant_hf.evaluation.presets import (
    bits_per_channel,
    description,
    expected_compression,
    flat_preset,
    resident_compression,
)

CONFIG = LlamaConfig(num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2, head_dim=64, hidden_size=128)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2", "paper-2.5", "kivi-4", "old-turbo4", "polar-4"])
def test_expected_compression_is_the_caches_own(name):
    cache = TurboQuantCache(CONFIG, name)
    x = torch.randn(1, 2, 700, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in range(6):
        cache.update(x, x, layer)
    assert expected_compression(load_preset(name), 64, 700, 6, 2) == pytest.approx(
        cache.compression_ratio_in_use, rel=1e-3
    )
    assert bits_per_channel(load_preset(name), 64, 6) == pytest.approx(common.average_bits(cache))


def test_presets_lists_every_shipped_preset(capsys):
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"at 512", "at 2k", "at 32k"} <= {cell.strip() for cell in lines[0].split("  ")}
    for name in preset_names():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert len(description(name)) > 15 and line.endswith(description(name))
    assert lines[2].startswith("k2v2 ") and any(line.startswith("k4v4 (default) ") for line in lines)


def test_presets_describes_a_file_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("# Raw keys,\n# for a try.\nkeys: lossless\n# not this\n")
    assert cli.main(["presets", "--preset", str(path), "--tokens", "300", "4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "at 300" in lines[0] and "at 4k" in lines[0] and lines[2].endswith("Raw keys, for a try.")


@pytest.mark.parametrize("name", ["k4v4", "k8v4", "lossless", "paper-mse-2"])
@pytest.mark.parametrize("tokens", [100, 255, 512, 700])
def test_resident_compression_is_a_real_caches(name, tokens):
    """Behind a prompt, the room allocated ahead included; below 1 where the cache takes more than a 16-bit one."""
    cache = TurboQuantCache(CONFIG, name)
    x = torch.randn(1, 2, tokens, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in range(6):
        cache.update(x, x, layer)
    real = cache.dense_nbytes / (cache.nbytes + cache.spare_nbytes)
    assert resident_compression(load_preset(name), 64, tokens, 6, 2) == pytest.approx(real, rel=2e-3)


@pytest.mark.parametrize("flag", ["--tokens", "--head-dim", "--layers", "--kv-heads"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_presets_names_a_number_that_is_none(flag, value, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["presets", flag, value])
    assert exit.value.code == 2
    assert f"argument {flag}: {value!r} is not supported; allowed: whole numbers from 1" in capsys.readouterr().err


def test_presets_marks_a_head_dim_that_a_preset_cannot_serve(capsys):
    assert cli.main(["presets", "--head-dim", "24", "--preset", "polar-4"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:6] == ["polar-4", *"-----"]


@pytest.mark.parametrize("name", ["k2v2", "k3v3", "k4v4", "k8v4"])
def test_flat_preset_is_the_shipped_one(name):
    assert flat_preset(int(name[1]), int(name[3])) == load_preset(name, boundary_layers=0)


def test_flat_preset_names_the_widths_there_are():
    with pytest.raises(ValueError, match="keys: width=5 is not supported; allowed: 2, 3, 4, 8"):
        flat_preset(5, 4)
