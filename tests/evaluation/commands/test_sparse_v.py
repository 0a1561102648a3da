"""`sparse-v`: everything but the GPU's kernels, and the timed layer on a GPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from turboquant_hf import cli
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.benchmark.data import Source, packed_layer
from turboquant_hf.evaluation.commands import sparse_v


def test_a_cpu_is_refused(capsys):
    assert cli.main(["sparse-v", "--device", "cpu"]) == 2
    assert "allowed: cuda" in capsys.readouterr().err


def test_distances():
    exact = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
    found = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]).log()
    row = sparse_v.distances(found, exact, found)
    kl = (exact.exp() * (exact - found)).sum(-1).mean().item()
    assert row == pytest.approx({"kl": kl, "kl_added": 0.0, "top1": 0.5})


def test_a_model_reads_on_from_the_same_cache_for_every_threshold(tiny_folder, monkeypatch):
    """On a CPU all values are read: thresholds change nothing, and the count of tiles is the denominator."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="turboquant")
    monkeypatch.setattr(sparse_v.dispatch, "unread_tiles", lambda: 12)
    tokens = torch.randint(0, 256, (1, 600 + 5), generator=torch.Generator().manual_seed(0))
    rows = sparse_v.measure_model(model, tokens, 600, load_preset("k4v4"), [1e-3, 1e-2])
    assert [row["threshold"] for row in rows] == [0.0, 1e-3, 1e-2]
    # Two layers of one KV head hold three tiles each, five times asked.
    assert [row["unread"] for row in rows] == [12 / (5 * 2 * 3)] * 3
    assert all(row["kl_added"] == 0.0 and row["kl"] == rows[0]["kl"] > 0 for row in rows)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_tiles_is_made_unlikely(share):
    source = Source(1, 2, 2, 64, torch.float32, torch.device("cpu"))
    layer = packed_layer(load_preset("k4v4"), source, 1000)
    query = source.queries(1)
    sparse_v.make_unlikely(layer, query, share)
    keys, rows = layer.packed_sides()[0], query.reshape(1, 2, 2, 64)
    scores = keys.rotate_query(rows) @ keys.rotated(channel_major=False).mT
    scores += (rows @ keys.mean.float().mT).repeat_interleave(128, dim=-1)
    best = (scores / 8).unflatten(-1, (-1, 128)).amax(dim=(2, 4))
    assert (best < -50).sum(dim=-1).tolist() == [[round(share * 6)] * 2]


@pytest.mark.gpu
def test_the_timed_layer():
    rows = sparse_v.measure_layer(load_preset("k4v4"), 8192, 1e-5, torch.device("cuda"))
    assert [round(row["unread"], 1) for row in rows] == [0.0, 0.0, 0.5, 0.8, 1.0]
    assert all(row["error"] < 8e-3 and row["us"] > 0 for row in rows)
