"""Errors beside the theory, sources, captured keys."""

import json

import pytest
import torch
import yaml

from turboquant_hf import cli
from turboquant_hf.evaluation.commands.distortion import theory
from turboquant_hf.evaluation.harness import vectors
from turboquant_hf.primitives import distortion as exact
from turboquant_hf.primitives import lloyd_max
from turboquant_hf.quantizers import QUANTIZERS


@pytest.mark.parametrize("bits", [1, 2, 3, 4], ids="{}bit".format)
def test_errors_of_mse_are_the_theorys(bits):
    queries, x = vectors.synthetic(512, 128)["isotropic"]
    found = vectors.errors(x, vectors.round_trip(QUANTIZERS["mse"](bits=bits), x), queries)
    theory = exact(lloyd_max(bits, 128), 128)
    assert found["mse"] == pytest.approx(theory, rel=0.03)
    assert found["inner"] == pytest.approx(theory, rel=0.06)
    assert found["bias"] == pytest.approx(-theory, rel=0.1, abs=1e-3)


def test_unbiased_scale_has_no_bias():
    queries, x = vectors.synthetic(512, 128)["isotropic"]
    found = vectors.errors(x, vectors.round_trip(QUANTIZERS["mse"](bits=2, scale="unbiased"), x), queries)
    assert abs(found["bias"]) < 0.01


def test_theory_lies_between_its_bounds():
    curves = theory()
    for low, middle, high in zip(curves["lower"], curves["lloyd_max"], curves["upper"], strict=True):
        assert low < middle < high


@pytest.mark.parametrize("count", [5, 128, 131])
def test_round_trip_takes_any_number_of_vectors(count):
    x = torch.randn(2, count, 64, generator=torch.Generator().manual_seed(0))
    decoded = vectors.round_trip(QUANTIZERS["conditioned"](), x)
    assert decoded.shape == x.shape
    assert (decoded - x).square().sum() < 0.05 * x.square().sum()


def test_capture_returns_what_attention_sees(llama):
    tokens = torch.arange(3, 43)[None]
    dense = llama(tokens, use_cache=True).past_key_values
    llama.set_attn_implementation("turboquant")
    captured = vectors.capture(llama, tokens)
    assert len(captured) == len(dense.layers)
    for (queries, keys, values), layer in zip(captured, dense.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[0, :, vectors.SINKS :])
        torch.testing.assert_close(values, layer.values[0, :, vectors.SINKS :])
        assert queries.shape[0] == keys.shape[0] and queries.shape[2] == keys.shape[2]


def test_distortion_reads_a_file_and_writes_a_run(tmp_path, capsys):
    torch.save(torch.randn(300, 32, generator=torch.Generator().manual_seed(0)), tmp_path / "rows.pt")
    quantizers = tmp_path / "some.yaml"
    quantizers.write_text("mse-2: {quantizer: mse, bits: 2}\nmse-4: {quantizer: mse, bits: 4}\n")
    out = tmp_path / "run"
    arguments = ["--vectors", str(tmp_path / "rows.pt"), "--quantizers", str(quantizers), "--output", str(out)]
    assert cli.main(["distortion", *arguments]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    rows = metrics["results"]
    assert metrics["tool"] == yaml.safe_load((out / "config.yaml").read_text())["tool"] == "distortion"
    assert [row["quantizer"] for row in rows] == ["mse-2", "mse-4"] and rows[0]["mse"] > 8 * rows[1]["mse"]
    assert (out / "distortion.png").stat().st_size > 10_000 and (out / "config.yaml").is_file()


def test_distortion_names_the_files_it_reads(tmp_path, capsys):
    assert cli.main(["distortion", "--vectors", str(tmp_path / "rows.csv")]) == 2
    assert "allowed: .npy and .pt files" in capsys.readouterr().err
