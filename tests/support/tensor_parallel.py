"""One process of a tensor-parallel run, started by torchrun: `tensor_parallel.py MODEL OUTPUT`.

The processes share the model's KV heads. Each generates with DynamicCache, with `lossless` and with the default preset,
and writes the tokens, the number of KV heads in a layer's cache, and the attention's name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import turboquant_hf  # noqa: F401  (registers the cache)
from turboquant_hf import TurboQuantCache

TILES = {"tile": 16, "recent_window": 8, "sinks": 4, "min_statistics": 16}
PROMPT, NEW = 45, 24


def main(folder: str, output: str) -> None:
    rank = int(os.environ["RANK"])
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    device = model.device
    ids = torch.randint(3, 199, (2, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    ids[1, :19] = mask[1, :19] = 0  # as `inputs_of` has them

    def generate(**options):
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "attention_mask": mask, **options}
        return model.generate(ids, **options).tolist()

    found = {"dynamic": generate()}
    for name in ("lossless", "k4v4"):
        for attention in ("keep", "auto"):
            config = {"preset": name, "attention": attention, **TILES}
            found[f"{name}-{attention}"] = generate(cache_implementation="turboquant", cache_config=config)
    cache = TurboQuantCache(model.config, "k4v4", **TILES)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    found |= {"heads": cache.packed_layers[0].num_heads, "tiles": cache.packed_layers[0].tiles[0].count}
    found["attention"] = model.config._attn_implementation
    found["device"] = str(device)
    Path(output, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a process that ends first may end the other
        torch.distributed.destroy_process_group()
