"""Encode level: the time to pack a prompt, beside the time of the decoder layer that makes its keys and values."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import CachePreset, load_preset
from turboquant_hf.evaluation.benchmark.data import Source
from turboquant_hf.evaluation.benchmark.kernels import using_backend
from turboquant_hf.evaluation.benchmark.model import model_config
from turboquant_hf.evaluation.benchmark.rows import Recorder
from turboquant_hf.evaluation.benchmark.settings import Group
from turboquant_hf.evaluation.benchmark.timing import kernel_seconds, measure, relative_error
from turboquant_hf.kernels import dispatch

ERROR_BOUND = 1e-2
"""The largest accepted relative difference from the plain encoder: about one code in a thousand."""
CHECKED_TILES = 16


def run_group(
    group: Group, names: list[str] | None, device: torch.device, bandwidth: float, recorder: Recorder
) -> None:
    """Measure every cell: the decoder layer's prefill, then each preset's encode."""
    for batch, tokens in group.cells:
        common = {
            "level": "encode", "shape": group.shape.name, "dtype": group.dtype, "batch": batch, "tokens": tokens,
        }  # fmt: skip
        prefill = None
        with recorder.guard({**common, "backend": "decoder layer"}):
            prefill = layer_prefill(group, batch, tokens, device)
            recorder.add({**common, "backend": "decoder layer", **prefill})
        for preset in group.presets:
            for name in names or ["auto"]:
                row = {**common, "preset": preset, "backend": name}
                with recorder.guard(row), using_backend(name):
                    row["backend"] = name if names else dispatch.backend(device)
                    made = encode_row(load_preset(preset), group, batch, tokens, device, bandwidth)
                    if made.get("ms") is not None and prefill is not None:
                        made["share_of_prefill"] = made["ms"] / prefill["ms"]
                    recorder.add({**row, **made})


def layer_prefill(group: Group, batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one decoder layer over a prompt without a cache, by SDPA flash."""
    config = model_config(group.shape, layers=1, tokens=tokens)
    with torch.no_grad(), torch.device(device):
        layer = LlamaDecoderLayer(config, 0).to(group.torch_dtype).eval()
        rotary = LlamaRotaryEmbedding(config=config)
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(
            batch, tokens, group.shape.hidden, dtype=group.torch_dtype, device=device, generator=generator
        )
        position_ids = torch.arange(tokens)[None]
        positions = rotary(hidden, position_ids)
        on_cuda = device.type == "cuda"

        def forward() -> torch.Tensor:
            out = layer(hidden, position_embeddings=positions, position_ids=position_ids, attention_mask=None)
            return out[0] if isinstance(out, tuple) else out

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_cuda else nullcontext():
            finite = bool(forward().isfinite().all())
            timing = measure([forward], device, graph=False, least=5, seconds=0.5)
    if not finite:
        return {"ms": None, "reason": "the layer's output is not finite"}
    return {"ms": timing.seconds * 1e3, "spread": timing.spread, "timing": timing.method}


def encode_row(
    preset: CachePreset, group: Group, batch: int, tokens: int, device: torch.device, bandwidth: float
) -> dict[str, Any]:
    """Time of update, observe and commit of a new layer over a whole prompt, as in a prefill.

    `ms` is the time of the device's kernels, because the host is ahead of the device in a prefill. `alone_ms` is the
    time of one call, for which the device waits.
    """
    shape = group.shape
    source = Source(batch, shape.kv_heads, shape.group, shape.head_dim, group.torch_dtype, device)
    keys, values = source.keys_and_values(tokens)
    query = source.queries(tokens)

    def encode() -> TurboQuantLayer:
        layer = TurboQuantLayer(preset, preset.keys, preset.values, returns_handles=lambda: True)
        layer.update(keys, values)
        layer.observe(query)
        layer.commit()
        return layer

    with torch.no_grad():
        layer = encode()
        error = encode_error(layer, keys, values)
        if error > ERROR_BOUND:
            return {"error": error, "ms": None, "reason": f"relative error {error:.1e} above {ERROR_BOUND:.0e}"}
        alone = measure([encode], device, graph=False, seconds=0.3)
        seconds = kernel_seconds(encode, device) or alone.seconds
    read = sum(x.numel() * x.itemsize for x in (keys, values, query))
    moved = read + layer.nbytes
    return {
        "ms": seconds * 1e3, "alone_ms": alone.seconds * 1e3, "spread": alone.spread, "error": error,
        "timing": alone.method if device.type == "cpu" else "sum of kernels",
        "resident_bytes": layer.nbytes, "bytes": moved, "floor_ms": 1e3 * moved / bandwidth,
        "gbps": moved / seconds / 1e9, "copy_share": moved / seconds / bandwidth,
    }  # fmt: skip


def encode_error(layer: TurboQuantLayer, keys: torch.Tensor, values: torch.Tensor) -> float:
    """The larger of the relative differences of keys and of values from the plain encoder with the same states.

    The newest packed tiles are compared, because they hold no sinks.

    Raises:
        ValueError: nothing is packed.
    """
    stored, tile = layer.tiles[0].count, layer.preset.tile
    if stored == 0:
        raise ValueError(f"{keys.shape[2]} tokens are too few for {layer.preset.name} to pack anything")
    first = max(stored - CHECKED_TILES, 0)
    before = os.environ.get(dispatch.VARIABLE, "auto")
    worst = 0.0
    for index, x in enumerate((keys, values)):
        quantizer, state, dim = layer.quantizers[index], layer.states[index], layer.head_dims[index]
        tiles = x[:, :, first * tile : stored * tile].unflatten(2, (-1, tile))
        position = torch.arange(first * tile, stored * tile, device=x.device)
        weight = (position >= layer.preset.sinks).float().expand(len(x), -1).unflatten(1, (-1, tile))
        with using_backend("torch"):
            plain = quantizer.decode(quantizer.encode(tiles, state, weight), state, dim, torch.float32)
        with using_backend(before):
            found = quantizer.decode(layer.tiles[index].view(first, stored), state, dim, torch.float32)
        worst = max(worst, relative_error(found, plain))
    return worst
