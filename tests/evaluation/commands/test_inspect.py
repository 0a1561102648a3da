"""`turboquant-hf inspect`: folders, a bare config.json, GGUF files; tables and JSON."""

from __future__ import annotations

import json

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, T5Config

from tests.support.families import available, build, family_named
from turboquant_hf import TurboQuantCache, preset_names
from turboquant_hf.cli import main

CONFIG = LlamaConfig(
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_size=256, vocab_size=999,
    intermediate_size=300, max_position_embeddings=4096, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    return tmp_path


def told(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_of_a_folder_and_of_a_bare_file(folder, capsys):
    options = ("--json", "--preset", "k4v4", "k3v3", "--tokens", 3000, "--batch", 2, "--memory", "100MiB")
    data = json.loads(told(capsys, folder, *options))
    assert data == {**json.loads(told(capsys, folder / "config.json", *options)), "model": str(folder)}
    for name in ("k4v4", "k3v3"):
        estimate = TurboQuantCache.estimate(CONFIG, 3000, name, batch=2)
        row = data["presets"][name]
        assert {**json.loads(json.dumps(estimate.to_dict())), "longest_context": row["longest_context"]} == row
        assert row["longest_context"] > data["dense"]["longest_context"] > 0
    parameters = sum(x.numel() for x in LlamaForCausalLM(CONFIG).parameters())
    assert data["parameters"] == parameters and data["weights_nbytes"] == 2 * parameters
    assert data["cache_memory_nbytes"] == 100 * 2**20 - 2 * parameters
    longest = data["presets"]["k3v3"]["longest_context"]
    fits = [TurboQuantCache.estimate(CONFIG, n, "k3v3", 2).resident_nbytes for n in (longest, longest + 1)]
    assert fits[0] <= data["cache_memory_nbytes"] < fits[1]


def test_the_page_says_what_is_packed_and_why_the_rest_is_not(tmp_path, capsys):
    config = Gemma3TextConfig(num_hidden_layers=6, vocab_size=999, sliding_window=128, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    page = told(capsys, tmp_path, "--tokens", 2000, "--preset", "k4v4", "--memory", "2GiB", "--weights", "1GB")
    assert "sliding window of 128" in page and "left as they are: at most the window" in page
    assert "The cache behind a prompt of 2,000 tokens" in page and "Weights: 953.67 MiB (as given)" in page
    assert "only until the first token of the answer" in page and "longest context" in page
    pieces = told(capsys, tmp_path, "--tokens", 2000, "--preset", "k4v4", "--prefill-chunk", 100, "--weights", "no")
    assert "Weights" not in pieces and "longest context" not in pieces


def test_every_shipped_preset_is_a_row_and_one_that_cannot_serve_says_why(folder, capsys):
    LlamaConfig(**{**CONFIG.to_diff_dict(), "head_dim": 68}).save_pretrained(folder)
    data = json.loads(told(capsys, folder, "--json", "--tokens", 500, "--weights", "no"))
    assert "k4v4" in data["presets"] and {*data["presets"], *data["refused"]} == {*preset_names()}
    assert all("head_dim=68" in reason for reason in data["refused"].values()) and data["refused"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "24GX"], "'24GX' is not supported"),
        (["--weights", "maybe"], "'maybe' is not supported"),
        (["--tokens", "0"], "whole numbers from 1"),
        (["--preset", "k4v5"], "k4v5"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, words):
    try:
        status = main(["inspect", str(folder), *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2 and words in capsys.readouterr().err


def test_a_gguf_file_is_read_by_its_metadata(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(4096)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(300)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(999)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = json.loads(told(capsys, path, "--json", "--preset", "k4v4", "--tokens", 3000, "--dtype", "bfloat16"))
    assert data["model_type"] == "llama" and data["max_position_embeddings"] == 4096
    assert data["presets"]["k4v4"]["resident_nbytes"] == TurboQuantCache.estimate(CONFIG, 3000).resident_nbytes


def test_an_encoder_decoder_says_what_its_cross_attention_keeps(tmp_path, capsys):
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 99}
    T5Config(**sizes, dtype="bfloat16").save_pretrained(tmp_path)
    page = " ".join(told(capsys, tmp_path, "--tokens", 500, "--preset", "k4v4").split())
    assert "t5, 3 layers, bfloat16" in page and " 3 full attention 2 32 packed " in page
    assert f"Cross-attention keeps {3 * 2 * 2 * 32 * 2} B per token of the encoder" in page


def test_sparse_attention_is_listed_and_grows(tmp_path, capsys):
    family = family_named("deepseek_v32")
    if not available(family):
        pytest.skip("this transformers has no deepseek_v32")
    build(family).config.save_pretrained(tmp_path)
    page = " ".join(told(capsys, tmp_path, "--tokens", 500, "--preset", "k4v4", "--weights", "no").split())
    assert " 2 indexed 1 16/8 left as they are: sparse attention" in page
    assert page.count(" 1.00x 160") == 2, "bytes per token, in 16 bit and here"
