"""`turboquant-hf sparse-v`: the time saved, and the quality lost, by not reading the values of unlikely tiles.

- A model reads the end of a long text token by token. This gives the quality and the share of unread tiles.
- The saved time is measured on one layer of Llama-3.1-8B's shape, whose keys are changed so that this share of the
  tiles is unlikely.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache, TurboQuantLayer
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, load_preset
from turboquant_hf.evaluation.benchmark.data import Source, packed_layer
from turboquant_hf.evaluation.benchmark.kernels import Inputs, using_backend
from turboquant_hf.evaluation.benchmark.timing import measure, relative_error
from turboquant_hf.evaluation.harness import decoding, fidelity, flags
from turboquant_hf.evaluation.harness.folder import check_output, write_run
from turboquant_hf.evaluation.harness.models import forward, load_model
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.harness.texts import read_text
from turboquant_hf.kernels import dispatch
from turboquant_hf.kernels.decode.cuda import ROWS_PER_BLOCK

THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)
SHARES = (0.0, 0.5, 0.8, 0.95)
LAYER = {"batch": 1, "heads": 8, "group": 4, "dim": 128}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    parser.add_argument("--preset", metavar="NAME", default=DEFAULT_PRESET, help="preset name or YAML path")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=list(THRESHOLDS),
        help="thresholds of the relative probability (%(default)s)",
    )
    parser.add_argument("--context", type=int, default=4096, help="tokens to read at once (%(default)s)")
    parser.add_argument("--steps", type=int, default=128, help="tokens to read one by one behind them (%(default)s)")
    parser.add_argument(
        "--layer-tokens",
        type=flags.whole(0),
        default=131072,
        help="tokens of the timed layer; 0: time none (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print two tables. Returns 0."""
    asked = Run.of(args)
    if not str(asked.device).startswith("cuda"):
        raise ValueError(f"device={asked.device!r} is not supported: models use sparse V on a GPU alone; allowed: cuda")
    if asked.steps < 1:
        raise ValueError(f"steps={asked.steps} is not supported; allowed: at least 1")
    if not all(0 < threshold < 1 for threshold in asked.thresholds):
        raise ValueError(f"thresholds={list(asked.thresholds)} are not supported; allowed: between 0 and 1")
    check_output(asked)
    preset = load_preset(asked.preset)
    model, tokenizer = load_model(
        asked.model, dtype=asked.dtype, device=asked.device, attn_implementation=ATTENTION_NAME
    )
    name, text = read_text(asked)
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : asked.context + asked.steps]
    if tokens.shape[1] < asked.context + asked.steps or asked.context < preset.first_encode:
        raise ValueError(
            f"context={asked.context} is not supported; allowed: from {preset.first_encode}, with the steps at most "
            f"{tokens.shape[1]}, the tokens of this text"
        )
    layer: list[dict[str, Any]] = []
    try:
        with using_backend("cuda"):
            if asked.layer_tokens:
                layer = measure_layer(preset, asked.layer_tokens, min(asked.thresholds), torch.device(asked.device))
            results = measure_model(model, tokens.to(asked.device), asked.context, preset, asked.thresholds)
    except RuntimeError as error:
        if dispatch.VARIABLE not in str(error):
            raise
        raise ValueError(f"preset={preset.name!r}: tiles are counted by the CUDA C++ kernels ({error})") from None
    for rows in filter(None, (results, layer)):
        print(format_table([row.values() for row in rows], rows[0]), end="\n\n")
    about = {"model": asked.model, "text": name, "preset": preset.name, "context": asked.context}
    about["recent_windows"] = {preset.name: preset.recent_window}
    write_run(asked, {**about, "results": results, "layer": layer})
    return 0


@torch.inference_mode()
def measure_model(
    model, tokens: torch.Tensor, context: int, preset: CachePreset, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """A row per threshold, 0 first. Of the tokens [1, T], the first `context` are read at once.

    - `unread`: share of packed tiles whose values were not read, per KV head.
    - `kl`: KL from the uncompressed model, in nats per token.
    - `kl_added`: KL from the same cache with all values read.
    """
    prompt, rest = tokens[:, :context], tokens[:, context:]
    dense = DynamicCache(config=model.config)
    decoding.prefill(model, prompt, dense, chunk=0)
    exact = forward(model, rest, dense).logits[0].float().log_softmax(dim=-1)
    filled = TurboQuantCache(model.config, preset)
    decoding.prefill(model, prompt, filled, chunk=0)
    rows, all_read = [], None
    for threshold in (0.0, *thresholds):
        cache = copy.deepcopy(filled)
        for layer in cache.packed_layers:
            layer.preset = replace(layer.preset, sparse_v_threshold=threshold)
        found, unread = decode(model, rest, cache)
        all_read = found if all_read is None else all_read
        rows.append({"threshold": threshold, "unread": unread} | distances(found, exact, all_read))
    return rows


def decode(model, tokens: torch.Tensor, cache: TurboQuantCache) -> tuple[torch.Tensor, float]:
    """(log-probabilities [T, V] after each of tokens [1, T], share of unread tiles). Tokens are fed one by one."""
    found, tiles = [], 0
    query_heads = model.config.get_text_config().num_attention_heads
    dispatch.unread_tiles()
    for token in tokens.split(1, dim=1):
        found.append(forward(model, token, cache).logits[0, -1].float().log_softmax(dim=-1))
        for layer in cache.packed_layers:
            # Rounded up: a kernel counts a tile once per ROWS_PER_BLOCK rows.
            times = -(-query_heads // layer.num_heads // ROWS_PER_BLOCK)
            tiles += layer.tiles[0].count * layer.num_heads * times
    return torch.stack(found), dispatch.unread_tiles() / tiles


def distances(found: torch.Tensor, exact: torch.Tensor, all_read: torch.Tensor) -> dict[str, float]:
    """KL of log-probabilities [T, V] from two others, and how often the most likely token is that of `exact`."""
    kl, added = (fidelity.divergences(reference, found).double().mean().item() for reference in (exact, all_read))
    same = (found.argmax(dim=-1) == exact.argmax(dim=-1)).double().mean().item()
    return {"kl": kl, "kl_added": added, "top1": same}


@torch.no_grad()
def measure_layer(preset: CachePreset, tokens: int, threshold: float, device: torch.device) -> list[dict[str, Any]]:
    """Microseconds of decode attention with all values read, and by share of unlikely tiles, each with its error."""
    workspace = dispatch.decode_workspace(LAYER["batch"] * LAYER["heads"], LAYER["group"], LAYER["dim"], device)
    source = Source(**LAYER, dtype=torch.bfloat16, device=device)
    layer, query = packed_layer(preset, source, tokens), source.queries(1)
    rows = []
    for sparse, share in ((0.0, 0.0), *((threshold, share) for share in SHARES)):
        made = copy.deepcopy(layer)
        make_unlikely(made, query, share)
        inputs = [replace(one, sparse_v_threshold=sparse) for one in Inputs.rotated(made, query, workspace)]
        counted = replace(inputs[0], workspace=None)
        dispatch.unread_tiles()
        error = relative_error(counted.attend(), counted.exact())
        unread = dispatch.unread_tiles() / (made.tiles[0].count * made.num_heads)
        timing = measure([one.attend for one in inputs], device)
        rows.append({"threshold": sparse, "unread": unread, "us": timing.us, "error": error})
    for row in rows:
        row["times faster"] = rows[0]["us"] / row["us"]
    return rows


def make_unlikely(layer: TurboQuantLayer, query: torch.Tensor, share: float) -> None:
    """Make a random share of every head's tiles unlikely for its queries [1, Hq, 1, D], by moving the tiles' means.

    Raises: ValueError for keys that are stored without a mean per tile.
    """
    if "mean" not in layer.tiles[0].arrays:
        raise ValueError(f"preset={layer.preset.name!r} stores no means to move; allowed: --layer-tokens 0")
    means = layer.tiles[0].arrays["mean"]
    generator = torch.Generator(query.device).manual_seed(0)
    rows = query.float().unflatten(1, (layer.num_heads, -1)).squeeze(3)
    # The shortest vector whose products with all rows of a head are 1.
    direction = torch.linalg.pinv(rows) @ torch.ones(rows.shape[-2], 1, device=query.device)
    scores = 100 * query.shape[-1] ** 0.5
    count = layer.tiles[0].count
    lots = torch.rand(*means.shape[:2], count, 1, generator=generator, device=query.device)
    chosen = lots.argsort(dim=2).argsort(dim=2) < share * count
    means[:, :, :count] -= (scores * direction.mT * chosen).to(means.dtype)
