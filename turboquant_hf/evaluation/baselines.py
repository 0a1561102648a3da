"""Published methods and other libraries' caches in the harness of `perplexity`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from transformers import DynamicCache, QuantizedCache

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache
from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation import common, perplexity
from turboquant_hf.evaluation.models import load_model
from turboquant_hf.evaluation.presets import bits_per_channel
from turboquant_hf.primitives import pack, packed_size, unpack
from turboquant_hf.quantizers import Field, Quantizer
from turboquant_hf.resources import config_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_text_arguments(parser)
    parser.add_argument(
        "--settings", type=Path, default=config_path("eval", "baselines.yaml"), help="YAML of what is measured"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens a window")
    parser.add_argument("--windows", type=int, default=1, help="how many windows, spread over the text")
    parser.add_argument("--chunk", type=int, default=128, help="tokens fed at a time")
    parser.add_argument(
        "--recent-window", type=int, default=0, help="raw recent tokens of every method beside the fed chunk"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write config.yaml and metrics.json; 0 when done."""
    with args.settings.open() as file:
        settings = yaml.safe_load(file)
    model, tokenizer = load_model(
        args.model, dtype=common.resolve_dtype(args), device=args.device, attn_implementation=ATTENTION_NAME
    )
    text_name, text = common.read_text(args)
    windows = perplexity.cut_windows(tokenizer(text, return_tensors="pt").input_ids[0], args.context, args.windows)
    options = {"recent_window": args.recent_window}
    presets = common.resolve_presets(settings.get("presets", ()), **options)
    for name, data in settings.get("non_uniform", {}).items():
        presets.append(non_uniform_preset(name, **data, **options))
    notes = []
    for name, data in settings.get("quantized_cache", {}).items():
        try:
            foreign = ForeignPreset(name=name, min_statistics=0, **options, options=tuple(data.items()))
            make_cache(model.config, foreign)
            presets.append(foreign)
        except (ImportError, ValueError) as error:
            notes.append(f"{name} is left out: {str(error).splitlines()[0]}")
    baseline, results = perplexity.measure(model, windows, presets, chunk=args.chunk, cache_class=make_cache)
    columns = ("preset", "perplexity", "kl", "top1", "key_bits", "value_bits", "compression_ratio")
    print(common.format_table([[r[c] for c in columns] for r in results], columns))

    pruned, setting = [], settings.get("pruned", {"presses": []})
    for press in setting["presses"]:
        try:
            pruned += measure_pruned(model, windows[0], **{**setting, "presses": [press]}, chunk=args.chunk, **options)
        except ImportError as error:
            notes.append(f"{press} is left out: {error}")
        except RuntimeError as error:  # layers of different lengths share one mask
            notes.append(f"{press} does not compose with prefill in chunks: {error}")
    if pruned:
        print("\n" + common.format_table([list(row.values()) for row in pruned], list(pruned[0])))
    for note in notes:
        print(note)
    metrics = {
        "tool": "baselines", "model": args.model, "text": text_name, "context": args.context, "windows": len(windows),
        "findings": notes, "baseline": {"perplexity": baseline}, "results": results, "pruned": pruned,
    }  # fmt: skip
    common.write_run(args.output, {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, metrics)
    return 0


def make_cache(config, preset: CachePreset):
    """The cache of a preset of either kind."""
    if isinstance(preset, ForeignPreset):
        return MeasuredQuantizedCache(config=config, **dict(preset.options))
    return TurboQuantCache(config, preset)


@dataclass(frozen=True)
class ForeignPreset(CachePreset):
    """Stands for a QuantizedCache with these options; of the preset's own fields only the sizes are read."""

    options: tuple[tuple[str, Any], ...] = ()


class MeasuredQuantizedCache(QuantizedCache):
    """transformers' QuantizedCache, with the bytes of its real tensors where `perplexity.measure` looks for them."""

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.itemsize for layer in self.layers for x in _tensors(layer))

    spare_nbytes = 0

    @property
    def compression_ratio(self) -> float:
        shapes = [self._dense(layer) for layer in self.layers]
        return 2 * sum(shapes) / self.nbytes

    @property
    def packed_layers(self) -> list[_PackedView]:
        return [_PackedView(layer) for layer in self.layers]

    @staticmethod
    def _dense(layer) -> int:
        packed = layer._dequantize(layer._quantized_keys).numel() + layer._dequantize(layer._quantized_values).numel()
        return packed + layer.keys.numel() + layer.values.numel()


class _PackedView:
    """What `common.average_bits` reads of a layer: each side reports its bytes over its elements."""

    def __init__(self, layer) -> None:
        self.preset, self.dtype, self.head_dims = CachePreset(), layer.dtype, (0, 0)
        self.quantizers = [_StoredBits(layer, x) for x in (layer._quantized_keys, layer._quantized_values)]


class _StoredBits:
    def __init__(self, layer, packed) -> None:
        stored = sum(x.numel() * x.itemsize for x in _inner_tensors(packed))
        self.bits = 8 * stored / layer._dequantize(packed).numel()

    def bits_per_channel(self, *_) -> float:
        return self.bits


def _tensors(layer) -> Iterator[torch.Tensor]:
    for stored in (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values):
        yield from _inner_tensors(stored)


def _inner_tensors(stored) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor subclass (quanto) or a (tensor, metadata) pair (HQQ)."""
    if isinstance(stored, tuple):
        yield stored[0]
        yield from (x for x in stored[1].values() if isinstance(x, torch.Tensor))
    elif hasattr(stored, "__tensor_flatten__") and type(stored) is not torch.Tensor:
        for name in stored.__tensor_flatten__()[0]:
            yield from _inner_tensors(getattr(stored, name))
    else:
        yield stored


@dataclass(frozen=True)
class NonUniform(Quantizer):
    """KVQuant's ingredients (arXiv 2401.18079): levels fitted to the data, per-channel keys, sparse outliers.

    Differs from KVQuant in that keys are post-RoPE, levels are fitted to the first tiles of each sequence instead of
    to a calibration set weighted by Fisher information, and outliers are the same number in every tile.

    Attributes:
        bits: width of a code.
        outliers: share of a tile's numbers that are kept in fp16, with their 16-bit places.
        axis: "channel" (keys: a channel's tokens in the tile share a scale and a shift) or "token" (values).
    """

    name: ClassVar[str] = "non-uniform"
    needs_statistics: ClassVar[bool] = True
    bits: int = 4
    outliers: float = 0.01
    axis: str = "channel"

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        rows, length = (head_dim, tile) if self.axis == "channel" else (tile, head_dim)
        count = self._count(head_dim, tile)
        return {
            "codes": Field((rows, packed_size(length, self.bits)), torch.uint8),
            "scale": Field((rows,), torch.float16),
            "shift": Field((rows,), torch.float16),
            "places": Field((count,), torch.int16),
            "outliers": Field((count,), torch.float16),
        }

    def fit(self, tiles: torch.Tensor, weight: torch.Tensor, query_rms: torch.Tensor | None) -> dict[str, torch.Tensor]:
        unit, *_ = self._normalised(self._rows(tiles))
        return {"levels": lloyd_levels(unit.flatten(1), 2**self.bits)}

    def encode(self, tiles: torch.Tensor, state: dict, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        unit, scale, shift, places, outliers = self._normalised(self._rows(tiles))
        middle = (state["levels"][:, 1:] + state["levels"][:, :-1]) / 2
        codes = torch.stack(
            [torch.bucketize(x, m) for x, m in zip(unit.contiguous(), middle.contiguous(), strict=True)]
        )
        # Flat places of a tile fit 16 bits; those above 32,767 are stored as negative numbers.
        places = torch.where(places > 32767, places - 65536, places).to(torch.int16)
        return {
            "codes": pack(codes.to(torch.uint8), self.bits), "scale": scale, "shift": shift, "places": places,
            "outliers": outliers,
        }  # fmt: skip

    def decode(self, packed: dict, state: dict, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        rows = packed["scale"].shape[-1]
        length = head_dim if self.axis == "token" else packed["codes"].shape[-1] * 8 // self.bits
        codes = unpack(packed["codes"], self.bits, length).long()
        levels = torch.stack([table[code] for table, code in zip(state["levels"], codes, strict=True)])
        x = levels * packed["scale"].float().unsqueeze(-1) + packed["shift"].float().unsqueeze(-1)
        x = x.flatten(-2).scatter(-1, packed["places"].long() % 65536, packed["outliers"].float())
        x = x.unflatten(-1, (rows, length))
        return (x.transpose(-1, -2) if self.axis == "channel" else x).to(dtype)

    def _rows(self, tiles: torch.Tensor) -> torch.Tensor:
        return (tiles.transpose(-1, -2) if self.axis == "channel" else tiles).float()

    def _count(self, head_dim: int, tile: int) -> int:
        return max(round(self.outliers * head_dim * tile), 1)

    def _normalised(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows [..., R, L] in [-1, 1] without their outliers; the stored scale, shift, places and outliers."""
        centre = rows.median(dim=-1, keepdim=True).values
        spread = (rows - centre).abs().mean(dim=-1, keepdim=True).clamp(min=1e-9)
        count = self._count(*rows.shape[-2:])
        places = ((rows - centre) / spread).abs().flatten(-2).topk(count, dim=-1).indices
        outliers = rows.flatten(-2).gather(-1, places).to(torch.float16)
        # An outlier's own place takes the row's middle, so that it does not widen the range.
        inner = (
            rows.flatten(-2).scatter(-1, places, centre.expand_as(rows).flatten(-2).gather(-1, places)).view_as(rows)
        )
        low, high = inner.aminmax(dim=-1)
        shift, scale = ((low + high) / 2).to(torch.float16), ((high - low) / 2).clamp(min=1e-6).to(torch.float16)
        unit = (inner - shift.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        return unit, scale, shift, places, outliers


def lloyd_levels(x: torch.Tensor, count: int, rounds: int = 20) -> torch.Tensor:
    """Lloyd's levels of each row of x [B, n], increasing: float32 [B, count]. At most 65,536 numbers a row are used."""
    x = x[:, :: max(x.shape[1] // 65536, 1)]
    levels = torch.quantile(x, (torch.arange(count, device=x.device) + 0.5) / count, dim=1).T.contiguous()
    for _ in range(rounds):
        nearest = torch.stack([torch.bucketize(row, (c[1:] + c[:-1]) / 2) for row, c in zip(x, levels, strict=True)])
        total = torch.zeros_like(levels).scatter_add(1, nearest, x)
        size = torch.zeros_like(levels).scatter_add(1, nearest, torch.ones_like(x))
        levels = torch.where(size > 0, total / size.clamp(min=1), levels)
    return levels.sort(dim=1).values


def non_uniform_preset(name: str, *, bits: int, outliers: float, **options) -> CachePreset:
    """KVQuant's arrangement: keys by channel, values by token, one sink token in 16 bits."""
    keys, values = (NonUniform(bits=bits, outliers=outliers, axis=axis) for axis in ("channel", "token"))
    return CachePreset(name=name, keys=keys, values=values, sinks=1, **options)


@torch.inference_mode()
def measure_pruned(
    model,
    window: torch.Tensor,
    *,
    presses: Sequence[str],
    compression_ratio: float,
    presets: Sequence[str],
    chunk: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Prune the first half of a window with kvpress, load what is left into each preset, score the second half.

    `bits` are real bits per channel of the tokens that there were, pruned ones included.

    kvpress 0.5.5 asks for transformers below 5.3 and reads a `cache_position` that later versions no longer pass, and
    it replaces a layer's `keys` and `values`, which a packed layer does not allow. So it prunes a DynamicCache, with
    that argument handed in, and the survivors are packed afterwards.
    """  # fmt: skip
    import kvpress

    tokens = window.to(model.device)
    half = tokens.shape[1] // (2 * chunk) * chunk

    def prefill(press=None) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        inputs = {"input_ids": tokens[:, :half], "past_key_values": cache, "use_cache": True}
        if press is None:
            model(**inputs)
        else:
            with press(model):
                model(**inputs, cache_position=torch.arange(half, device=tokens.device))
        return cache

    reference = _score(model, tokens, prefill(), half, chunk)
    rows = []
    for press in presses:
        pruned = prefill(getattr(kvpress, press)(compression_ratio=compression_ratio))
        for preset in common.resolve_presets(presets, **options):
            cache = TurboQuantCache(model.config, preset)
            for index, layer in enumerate(pruned.layers):
                cache.update(layer.keys, layer.values, index)
                cache.packed_layers[index].commit()
            found = _score(model, tokens, cache, half, chunk)
            kl = (reference.exp() * (reference - found)).sum(-1).mean().item()
            bits = bits_per_channel(preset, pruned.layers[0].keys.shape[-1], len(cache.packed_layers))
            kept = sum(layer.keys.shape[2] for layer in pruned.layers) / (half * len(pruned.layers))
            rows.append(
                {"pruned by": press, "preset": preset.name, "kl": kl, "kept": kept, "bits": sum(bits) / 2 * kept}
            )
    return rows


def _score(model, tokens: torch.Tensor, cache, start: int, chunk: int) -> torch.Tensor:
    """Log-probabilities after each token from `start` on; positions are those of the whole text."""
    parts = []
    for position in range(start, tokens.shape[1], chunk):
        piece = tokens[:, position : position + chunk]
        positions = torch.arange(position, position + piece.shape[1], device=tokens.device)[None]
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True, position_ids=positions).logits[0]
        parts.append(logits.float().log_softmax(-1))
    return torch.cat(parts)
