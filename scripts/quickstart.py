"""The main job in a few minutes on a CPU: generate with the packed cache beside DynamicCache, then a small table."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = 4
"""Steps of the whole quickstart. The first step, the installation, is in quickstart.sh."""


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """Print what begins and, at the end, how long it took."""
    print(f"\nStep {number} of {STEPS}: {title}", flush=True)
    begin = time.monotonic()
    yield
    print(f"  done in {time.monotonic() - begin:.0f} s", flush=True)


with step(2, "load PyTorch, Transformers and SmolLM2-135M (converted once)"):
    import torch
    from transformers import DynamicCache, set_seed

    from turboquant_hf import TurboQuantCache, load_preset
    from turboquant_hf.evaluation.harness.fidelity import COLUMNS, cut_windows, measure, uncompressed_row
    from turboquant_hf.evaluation.harness.models import load_model
    from turboquant_hf.evaluation.harness.tables import format_table
    from turboquant_hf.evaluation.harness.texts import packaged_text

    MODEL, TOKENIZER = load_model()

PRESETS = ("k8v4", "k4v4", "k3v3", "k2v2", "paper-mse-3")
CONTEXT = 1280


NEXT = """
Next: your own model in three lines (docs/usage.md):
    import turboquant_hf
    model = AutoModelForCausalLM.from_pretrained(...)
    model.generate(**inputs, cache_implementation="turboquant")
What a preset costs on your model and text: turboquant-hf perplexity --model NAME --text FILE --preset k4v4
All presets: turboquant-hf presets (these commands need the environment: source {environment}/bin/activate)"""


def main() -> None:
    set_seed(0)
    text = packaged_text()
    with step(3, "generate 40 tokens with DynamicCache, then with the packed cache"):
        generate(MODEL, TOKENIZER, text[:6000])
    with step(4, f"read one window of {CONTEXT} tokens through {len(PRESETS)} presets"):
        perplexity(MODEL, TOKENIZER, text)
    print(NEXT.format(environment=sys.prefix))


def generate(model, tokenizer, text: str) -> None:
    """Print the greedy answers with DynamicCache and with the default packed cache, and the bytes of both caches."""
    question = [{"role": "user", "content": f"{text}\n\nIn one sentence, what is this text about?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"].shape[1]
    print(f"  A prompt of {prompt} tokens, 40 new ones, float32 on the CPU:")
    dense = DynamicCache(config=model.config)
    # One argument does it: model.generate(**inputs, cache_implementation="turboquant"). A cache of your own can be
    # asked what it holds. The attention name lets it measure the queries and reads the tiles directly on a GPU.
    model.set_attn_implementation("turboquant")
    packed = TurboQuantCache(model.config)
    warnings.filterwarnings("ignore", message=".*past_key_values.*", category=FutureWarning)  # `cache` from 5.24 on
    for name, cache in (("DynamicCache", dense), ("TurboQuantCache", packed)):
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
        print(f"  {name}: {tokenizer.decode(output[0, prompt:], skip_special_tokens=True)!r}")
    held = sum(x.numel() * x.itemsize for layer in dense.layers for x in (layer.keys, layer.values))
    print(f"  DynamicCache holds {held:,} bytes ({held // 2:,} in 16 bit), TurboQuantCache {packed.nbytes:,}")
    print(f"  {packed}")
    print("  (the first 4 and the newest 128 to 255 tokens stay raw, in this model's float32: long contexts gain more)")


def perplexity(model, tokenizer, text: str) -> None:
    """Print the perplexity of one window with every preset, with all tokens packed."""
    print("  Every token is packed before it is read (recent_window=0).", flush=True)
    windows = cut_windows(tokenizer(text, return_tensors="pt", verbose=False).input_ids[0], CONTEXT, 1)
    presets = [load_preset(name, recent_window=0, encode_first=True) for name in PRESETS]
    with torch.inference_mode():
        baseline, results = measure(model, windows, presets)
    uncompressed = uncompressed_row(baseline, str(model.dtype).removeprefix("torch."))
    rows = [dict(zip(COLUMNS, uncompressed, strict=True)), *results]
    shown = [column for column in COLUMNS if column != "compression_ratio"]  # says little of so short a text
    print(format_table([[row[column] for column in shown] for row in rows], [COLUMNS[column] for column in shown]))


if __name__ == "__main__":
    main()
