"""Error of every quantizer on given vectors beside the theory: MSE, inner-product error, bias."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache
from turboquant_hf.config import load_preset, quantizer_from
from turboquant_hf.evaluation import common
from turboquant_hf.evaluation.models import forward, load_model
from turboquant_hf.evaluation.settings import whole
from turboquant_hf.primitives import distortion, lloyd_max
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.resources import config_path

UPPER_BOUND = 3**0.5 * torch.pi / 2
"""TurboQuant's bound on the relative MSE is this times 4^-bits; no quantizer of b bits is below 4^-b."""
TILE = 128
SINKS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_text_arguments(parser)
    parser.set_defaults(model=None)
    parser.description = (
        "Error of every quantizer beside the theory: on synthetic vectors, on those of --vectors, or on the keys and "
        "values that --model makes of a text (--model packaged: SmolLM2)."
    )
    parser.add_argument(
        "--vectors", type=Path, help="embeddings [rows, channels] in a .npy or .pt file, instead of synthetic ones"
    )
    parser.add_argument(
        "--layers",
        type=whole(0),
        nargs="+",
        default=[0, 10, 20],
        help="layers to capture with --model (default: 0 10 20)",
    )
    parser.add_argument("--tokens", type=whole(1), default=2048, help="vectors a head (%(default)s)")
    parser.add_argument(
        "--head-dim", type=whole(1), default=128, help="channels of the synthetic vectors (%(default)s)"
    )
    parser.add_argument(
        "--quantizers", type=Path, default=config_path("eval", "distortion.yaml"), help="YAML of name-bits: quantizer"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic vectors (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table a source, write metrics.json and distortion.png; 0 when done."""
    common.check_output(args.output)
    with args.quantizers.open() as file:
        quantizers = {name: quantizer_from(data, "keys") for name, data in yaml.safe_load(file).items()}
    sources = read_sources(args)
    results = []
    for source, (queries, vectors) in sources.items():
        rows = measure_all(quantizers, vectors, queries)
        results += [{"source": source, **row} for row in rows]
        print(f"\n{source}: {vectors.shape[0]} heads x {vectors.shape[1]} vectors of {vectors.shape[2]} channels")
        columns = ("quantizer", "bits", "mse", "inner", "bias")
        print(common.format_table([[r[c] for c in columns] for r in rows], columns))
    metrics = {"tool": "distortion", "sources": list(sources), "theory": theory(), "results": results}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    common.write_run(args.output, settings, metrics)
    if args.output is not None:
        plot(results, args.output / "distortion.png")
    return 0


def read_sources(args: argparse.Namespace) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (queries [H, n, D], vectors [H, T, D]), as --model, --vectors or neither of them asks."""
    if args.model is not None:
        model, tokenizer = load_model(
            args.model, dtype=common.resolve_dtype(args), device=args.device, attn_implementation=ATTENTION_NAME
        )
        _, text = common.read_text(args)
        tokens = tokenizer(text[: 16 * args.tokens], return_tensors="pt").input_ids[:, : args.tokens + SINKS]
        captured = capture(model, tokens)
        return {
            name: pair
            for layer in args.layers
            for name, pair in (
                (f"layer {layer} keys", (captured[layer][0], captured[layer][1])),
                (f"layer {layer} values", (_directions(captured[layer][2]), captured[layer][2])),
            )
        }
    if args.vectors is not None:
        x = load_vectors(args.vectors)[: args.tokens]
        return {args.vectors.name: (_directions(x[None]), x[None])}
    return synthetic(args.tokens, args.head_dim, args.seed)


def synthetic(tokens: int, dim: int, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Isotropic vectors, and key-like ones: a shared mean and a few strong channels that queries do not share."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, tokens, dim, generator=generator)
    queries = torch.randn(4, 256, dim, generator=generator)
    strong = torch.ones(dim)
    strong[torch.randperm(dim, generator=generator)[: max(dim // 16, 1)]] = 8.0
    return {
        "isotropic": (queries, x),
        "key-like": (queries, strong * (x + torch.randn(4, 1, dim, generator=generator))),
    }


def load_vectors(path: Path) -> torch.Tensor:
    """Rows of a .npy or .pt file, float32 [rows, channels]."""
    if path.suffix == ".npy":
        import numpy

        x = torch.from_numpy(numpy.load(path))
    elif path.suffix == ".pt":
        x = torch.load(path, weights_only=True)
    else:
        raise ValueError(f"vectors={str(path)!r} is not supported; allowed: .npy and .pt files")
    if not isinstance(x, torch.Tensor) or x.dim() != 2:
        raise ValueError(f"vectors={str(path)!r} is not supported; allowed: one array of [rows, channels]")
    return x.float()


@torch.inference_mode()
def capture(model, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(queries, keys, values) of every compressed layer as attention sees them, [heads, T, D] each, sinks left out.

    The model's attention implementation is "turboquant", which shows its queries to the cache. The queries of a
    group of heads are laid end to end, so that they have as many heads as the keys.
    """
    cache = TurboQuantCache(model.config, load_preset("lossless", recent_window=tokens.shape[1]))
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(cache.packed_layers):
        layer.observe = lambda query, index=index: seen.__setitem__(index, query)
    forward(model, tokens.to(model.device), cache)
    result = []
    for index, layer in enumerate(cache.packed_layers):
        keys, values = (x[0, :, SINKS:].float().cpu() for x in (layer.keys, layer.values))
        queries = seen[index][0].float().cpu().unflatten(0, (len(keys), -1))[:, :, SINKS:].flatten(1, 2)
        result.append((queries, keys, values))
    return result


def measure_all(
    quantizers: Mapping[str, Quantizer], vectors: torch.Tensor, queries: torch.Tensor
) -> list[dict[str, Any]]:
    """One row a quantizer that can serve these vectors."""
    rows = []
    for name, quantizer in quantizers.items():
        try:
            quantizer.validate(vectors.shape[-1], TILE)
        except ValueError:
            continue
        bits = quantizer.bits_per_channel(vectors.shape[-1], TILE)
        rows.append(
            {"quantizer": name, "bits": bits, **errors(vectors, round_trip(quantizer, vectors, queries), queries)}
        )
    return rows


def round_trip(quantizer: Quantizer, vectors: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """vectors [H, T, D] encoded in tiles and decoded; `queries` [H, n, D] give the quantizer its statistics."""
    count = vectors.shape[1]
    short = -count % TILE
    padded = torch.nn.functional.pad(vectors.float(), (0, 0, 0, short)).unflatten(1, (-1, TILE))[None]
    weight = torch.ones(count + short)
    weight[count:] = 0
    weight = weight.unflatten(0, (-1, TILE))[None]
    query_rms = None if queries is None else queries.float().square().mean(dim=1).sqrt()[None]
    state = quantizer.fit(padded, weight, query_rms)
    packed = quantizer.encode(padded, state, weight)
    return quantizer.decode(packed, state, vectors.shape[-1], torch.float32)[0].flatten(1, 2)[:, :count]


def errors(vectors: torch.Tensor, decoded: torch.Tensor, queries: torch.Tensor) -> dict[str, float]:
    """Errors of `decoded` [H, T, D], relative, so that they compare with the theory's for unit vectors.

    mse: |k - k^|^2 / |k|^2. inner: D (q.k - q.k^)^2 / (|q|^2 |k|^2). bias: the slope of q.k^ over q.k, less 1.
    At most 256 queries a head, evenly spaced, stand for all.
    """
    step = max(queries.shape[1] // 256, 1)
    queries = queries[:, ::step].float()
    exact = queries @ vectors.float().transpose(1, 2)
    estimate = queries @ decoded.transpose(1, 2)
    energy = vectors.float().square().sum(-1)
    scale = queries.square().sum(-1).mean(1)[:, None, None] * energy.mean(1)[:, None, None]
    return {
        "mse": ((vectors - decoded).square().sum(-1).sum() / energy.sum()).item(),
        "inner": (vectors.shape[-1] * (estimate - exact).square() / scale).mean().item(),
        "bias": ((estimate * exact).sum() / exact.square().sum()).item() - 1,
    }


def theory(widths: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> dict[str, list[float]]:
    """Relative MSE by width of a code: Lloyd-Max on Gaussian coordinates, and the bounds."""
    return {
        "bits": list(widths),
        "lloyd_max": [distortion(lloyd_max(b)) for b in widths],
        "upper": [UPPER_BOUND * 4.0**-b for b in widths],
        "lower": [4.0**-b for b in widths],
    }


def _directions(vectors: torch.Tensor) -> torch.Tensor:
    """Random queries for vectors that come without."""
    return torch.randn(vectors.shape[0], 256, vectors.shape[2], generator=torch.Generator().manual_seed(1))


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """MSE and inner-product error against real bits, one row of panels a source, a line for each family of names."""
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(row["source"] for row in results))
    figure = Figure(figsize=(12, 4.2 * len(sources)), layout="constrained")
    axes = figure.subplots(len(sources), 2, squeeze=False)
    curves = theory()
    families = list(dict.fromkeys(_family(row["quantizer"]) for row in results))
    for source, pair in zip(sources, axes, strict=True):
        for axis, measure in zip(pair, ("mse", "inner"), strict=True):
            axis.fill_between(curves["bits"], curves["lower"], curves["upper"], color="0.9", label="between the bounds")
            axis.plot(curves["bits"], curves["lloyd_max"], "k--", linewidth=1, label="Lloyd-Max (theory)")
            for index, family in enumerate(families):
                rows = sorted(
                    (r["bits"], r[measure])
                    for r in results
                    if r["source"] == source and _family(r["quantizer"]) == family
                )
                axis.plot(
                    *zip(*rows, strict=True),
                    marker="os^vDPX*"[index % 8],
                    markersize=5,
                    color=f"C{index % 10}",
                    label=family,
                )
            axis.set(yscale="log", xlim=(0.8, 6.2), ylim=(2e-4, 3), xlabel="bits per channel, scales included")
            axis.set_title(f"{source}: {'relative MSE' if measure == 'mse' else 'D x relative inner-product error'}")
            axis.grid(alpha=0.3)
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110)


def _family(name: str) -> str:
    return name.rsplit("-", 1)[0]
