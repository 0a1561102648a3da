"""Perplexity, KL divergence and top-1 agreement, read through the real cache.

A window is fed in chunks, to the uncompressed model and to every preset side by side, so that each scored token
attends to packed history. (One pass over a window would never read what it has just stored.) A chunk is stored before
it is attended to: outside the recent window nothing is read raw, not even a token's own neighbours, which in generation
wait raw in the tail until their tile is full. So these figures are what the quantizers cost at their worst;
`--raw-chunk` gives generation's own order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import DynamicCache

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache
from turboquant_hf.config import DEFAULT_PRESET, CachePreset
from turboquant_hf.evaluation import common
from turboquant_hf.evaluation.models import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_text_arguments(parser)
    parser.add_argument("--preset", action="append", metavar="NAME", help="preset name or YAML path; repeatable")
    parser.add_argument("--context", type=int, default=2048, help="tokens a window")
    parser.add_argument("--windows", type=int, default=4, help="how many windows, spread over the text")
    parser.add_argument("--chunk", type=int, default=128, help="tokens fed at a time")
    parser.add_argument("--recent-window", type=int, default=None, help="override the presets' recent window")
    parser.add_argument("--raw-chunk", action="store_true", help="attend to a chunk before it is rounded")
    parser.add_argument("--attention", default=ATTENTION_NAME, help="attention implementation of the model")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write config.yaml and metrics.json; 0 when done."""
    presets = common.resolve_presets(
        args.preset or [DEFAULT_PRESET], recent_window=args.recent_window, encode_first=not args.raw_chunk
    )
    dtype = common.resolve_dtype(args)
    text_name, text = common.read_text(args)
    model, tokenizer = load_model(args.model, dtype=dtype, device=args.device, attn_implementation=args.attention)
    windows = cut_windows(tokenizer(text, return_tensors="pt").input_ids[0], args.context, args.windows)

    baseline, results = measure(model, windows, presets, chunk=args.chunk)
    rows = [["(16 bit)", baseline, 0.0, 1.0, 16.0, 16.0, 1.0]]
    columns = ("preset", "perplexity", "kl", "top1", "key_bits", "value_bits", "compression_ratio")
    rows += [[result[column] for column in columns] for result in results]
    print(common.format_table(rows, ["preset", "perplexity", "KL", "top-1", "K bits", "V bits", "smaller"]))
    settings = {**vars(args), "output": str(args.output), "dtype": dtype}
    metrics = {
        "model": args.model,
        "text": text_name,
        "context": args.context,
        "windows": len(windows),
        "baseline": {"perplexity": baseline},
        "results": results,
    }
    common.write_run(args.output, settings, metrics)
    return 0


def cut_windows(tokens: torch.Tensor, context: int, windows: int) -> list[torch.Tensor]:
    """`windows` windows of `context` tokens [1, context], spread evenly, without overlap.

    Raises:
        ValueError: when the text is too short for one window.
    """
    possible = len(tokens) // context
    if possible < 1:
        raise ValueError(f"context={context} is not supported by a text of {len(tokens)} tokens; allowed: at most that")
    windows = min(windows, possible)
    stride = (len(tokens) - context) // max(windows - 1, 1)
    return [tokens[i * stride : i * stride + context][None] for i in range(windows)]


@dataclass
class _Sums:
    """Running totals of one cache over the scored tokens."""

    nll: float = 0.0
    kl: float = 0.0
    top1: int = 0
    tokens: int = 0
    sizes: dict = field(default_factory=dict)

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """logits, reference: [T, vocabulary] float32 log-probabilities; targets [T]."""
        self.nll -= logits.gather(1, targets[:, None]).double().sum().item()
        self.kl += (reference.exp() * (reference - logits)).sum(dim=1).double().sum().item()
        self.top1 += (logits.argmax(dim=1) == reference.argmax(dim=1)).sum().item()
        self.tokens += len(targets)


def first_scored(presets: Sequence[CachePreset], chunk: int) -> int:
    """The first position from which every preset has packed history, a multiple of `chunk`."""
    packed = max([chunk, *(preset.first_encode for preset in presets)])
    return -(-packed // chunk) * chunk


@torch.inference_mode()
def measure(
    model,
    windows: Sequence[torch.Tensor],
    presets: Sequence[CachePreset],
    *,
    chunk: int = 128,
    cache_class=TurboQuantCache,
) -> tuple[float, list[dict]]:
    """(baseline perplexity, one result a preset) over windows [1, T] of token ids.

    KL is the mean of KL(uncompressed || compressed) per scored token, in nats; top1 the share of tokens whose most
    likely successor is the same. `resident_bytes` is what the cache holds at the end of a window, spare included.

    Raises:
        ValueError: when no token of a window would be scored.
    """
    start = first_scored(presets, chunk)
    if windows[0].shape[1] <= start + 1:
        raise ValueError(
            f"context={windows[0].shape[1]} is not supported with these presets and chunk={chunk}; "
            f"allowed: more than {start + 1}, so that scored tokens attend to packed history"
        )
    base, sums = _Sums(), [_Sums() for _ in presets]
    chunks = -(-windows[0].shape[1] // chunk)
    with tqdm(total=len(windows) * chunks, unit="chunk", desc="perplexity", leave=False) as bar:
        for window in windows:
            tokens = window.to(model.device)
            dense = DynamicCache(config=model.config)
            caches = [cache_class(model.config, preset) for preset in presets]
            for position in range(0, tokens.shape[1], chunk):
                piece = tokens[:, position : position + chunk]
                targets = tokens[0, position + 1 : position + chunk + 1]
                scored = position >= start
                reference = _log_probabilities(model, piece, dense, len(targets))
                if scored:
                    base.add(reference, reference, targets)
                for cache, total in zip(caches, sums, strict=True):
                    logits = _log_probabilities(model, piece, cache, len(targets))
                    if scored:
                        total.add(logits, reference, targets)
                bar.update()
            for cache, total in zip(caches, sums, strict=True):
                key_bits, value_bits = common.average_bits(cache)
                total.sizes = {
                    "key_bits": key_bits,
                    "value_bits": value_bits,
                    "compression_ratio": cache.compression_ratio,
                    "resident_bytes": cache.nbytes + cache.spare_nbytes,
                }
    return _perplexity(base), [
        {
            "preset": preset.name,
            "perplexity": _perplexity(total),
            "kl": total.kl / total.tokens,
            "top1": total.top1 / total.tokens,
            **total.sizes,
        }
        for preset, total in zip(presets, sums, strict=True)
    ]


def _log_probabilities(model, piece: torch.Tensor, cache, count: int) -> torch.Tensor:
    logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0, :count]
    return logits.float().log_softmax(dim=-1)


def _perplexity(total: _Sums) -> float:
    return float(torch.tensor(total.nll / total.tokens, dtype=torch.float64).exp())
