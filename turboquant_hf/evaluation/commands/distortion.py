"""`turboquant-hf distortion`: MSE, inner-product error and bias of every quantizer on given vectors, beside theory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.evaluation.harness import flags
from turboquant_hf.evaluation.harness.folder import check_output, write_run
from turboquant_hf.evaluation.harness.models import load_model
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.harness.texts import read_text
from turboquant_hf.evaluation.harness.vectors import (
    SINKS,
    TILE,
    capture,
    directions,
    errors,
    load_vectors,
    round_trip,
    synthetic,
)
from turboquant_hf.primitives import distortion, lloyd_max
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.quantizers.data import quantizer_from
from turboquant_hf.resources import config_path

UPPER_BOUND = 3**0.5 * torch.pi / 2
"""TurboQuant's bound on the relative MSE is this factor times 4^-bits. No quantizer of b bits is below 4^-b."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    parser.set_defaults(model=None)
    parser.description = (
        "Error of every quantizer beside the theory: on synthetic vectors, on those of --vectors, or on the keys and "
        "values that --model makes of a text (--model packaged: SmolLM2)."
    )
    parser.add_argument(
        "--vectors", type=Path, help="embeddings [rows, channels] in a .npy or .pt file, instead of synthetic vectors"
    )
    parser.add_argument(
        "--layers",
        type=flags.whole(0),
        nargs="+",
        default=[0, 10, 20],
        help="layers to capture with --model (default: 0 10 20)",
    )
    parser.add_argument("--tokens", type=flags.whole(1), default=2048, help="vectors per head (%(default)s)")
    parser.add_argument(
        "--head-dim", type=flags.whole(1), default=128, help="channels of the synthetic vectors (%(default)s)"
    )
    parser.add_argument(
        "--quantizers",
        type=Path,
        default=config_path("eval", "distortion.yaml"),
        help="YAML file of name-bits: quantizer",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic vectors (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table per source, write metrics.json and distortion.png. Returns 0."""
    asked = Run.of(args)
    check_output(asked)
    with asked.quantizers.open() as file:
        quantizers = {name: quantizer_from(data, "keys") for name, data in yaml.safe_load(file).items()}
    sources = read_sources(asked)
    results = []
    for source, (queries, vectors) in sources.items():
        rows = measure_all(quantizers, vectors, queries)
        results += [{"source": source, **row} for row in rows]
        print(f"\n{source}: {vectors.shape[0]} heads x {vectors.shape[1]} vectors of {vectors.shape[2]} channels")
        columns = ("quantizer", "bits", "mse", "inner", "bias")
        print(format_table([[r[c] for c in columns] for r in rows], columns))
    metrics = {"sources": list(sources), "theory": theory(), "results": results}
    write_run(asked, metrics)
    if asked.output is not None:
        plot(results, asked.output / "distortion.png")
    return 0


def read_sources(asked: Run) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{name: (queries [H, n, D], vectors [H, T, D])}, from --model, from --vectors, or synthetic."""
    if asked.model is not None:
        model, tokenizer = load_model(
            asked.model, dtype=asked.dtype, device=asked.device, attn_implementation=ATTENTION_NAME
        )
        _, text = read_text(asked)
        tokens = tokenizer(text[: 16 * asked.tokens], return_tensors="pt").input_ids[:, : asked.tokens + SINKS]
        captured = capture(model, tokens)
        return {
            name: pair
            for layer in asked.layers
            for name, pair in (
                (f"layer {layer} keys", (captured[layer][0], captured[layer][1])),
                (f"layer {layer} values", (directions(captured[layer][2]), captured[layer][2])),
            )
        }
    if asked.vectors is not None:
        x = load_vectors(asked.vectors)[: asked.tokens]
        return {asked.vectors.name: (directions(x[None]), x[None])}
    return synthetic(asked.tokens, asked.head_dim, asked.seed)


def measure_all(
    quantizers: Mapping[str, Quantizer], vectors: torch.Tensor, queries: torch.Tensor
) -> list[dict[str, Any]]:
    """One row per quantizer that can serve these vectors."""
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


def theory(widths: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> dict[str, list[float]]:
    """Relative MSE by code width: Lloyd-Max on Gaussian coordinates, and the bounds."""
    return {
        "bits": list(widths),
        "lloyd_max": [distortion(lloyd_max(b)) for b in widths],
        "upper": [UPPER_BOUND * 4.0**-b for b in widths],
        "lower": [4.0**-b for b in widths],
    }


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw MSE and inner-product error against real bits: a row of panels per source, a line per family of names."""
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
