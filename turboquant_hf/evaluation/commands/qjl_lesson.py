"""`turboquant-hf qjl-lesson`: why the default has no QJL. Compares `prod` with `mse` at equal bits.

The sketch of `prod` makes each inner product unbiased and noisy. Softmax tolerates a bias that shrinks all scores
alike, because that is only a slightly higher temperature. Softmax amplifies noise. The estimator without bias but with
more variance therefore loses.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import CachePreset, load_preset
from turboquant_hf.evaluation.harness import fidelity, flags
from turboquant_hf.evaluation.harness.flags import whole
from turboquant_hf.evaluation.harness.folder import check_output, write_run
from turboquant_hf.evaluation.harness.models import load_model
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.harness.texts import read_text
from turboquant_hf.evaluation.harness.vectors import errors, round_trip
from turboquant_hf.quantizers.data import quantizer_from

METHODS: dict[str, dict[str, Any]] = {
    "mse": {"quantizer": "mse"},
    "mse, unbiased": {"quantizer": "mse", "scale": "unbiased"},
    "prod": {"quantizer": "prod"},
    "prod, orthogonal": {"quantizer": "prod", "sketch": "orthogonal"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    parser.add_argument("--bits", type=whole(2), nargs="+", default=[2, 3, 4], help="widths to compare, from 2 (2 3 4)")
    parser.add_argument("--head-dim", type=whole(1), default=128, help="channels of the random vectors (%(default)s)")
    parser.add_argument("--context", type=whole(1), default=768, help="tokens per window (%(default)s)")
    parser.add_argument(
        "--windows",
        type=whole(0),
        default=1,
        help="windows of text; 0 leaves the model out (%(default)s)",
    )
    parser.add_argument("--chunk", type=whole(1), default=128, help="tokens fed at a time (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print tables and findings, write metrics.json, findings.md and qjl_lesson.png. Returns 0."""
    asked = Run.of(args)
    check_output(asked)
    vectors = vector_errors(asked.bits, asked.head_dim)
    sizes = sketch_sizes(asked.head_dim)
    hamming = hamming_errors(asked.head_dim)
    softmax = softmax_errors(asked.bits, asked.head_dim)
    results = model_errors(asked) if asked.windows else []
    for title, rows in (
        ("one inner product, Gaussian keys and queries", vectors),
        ("sketch sizes behind a 3-bit codebook", sizes),
        ("1-bit estimators of cos(q, k)", hamming),
        ("softmax over 1,024 keys", softmax),
        ("model", results),
    ):
        if rows:
            print(f"\n{title}\n{format_table([list(row.values()) for row in rows], list(rows[0]))}")
    found = findings(vectors, sizes, hamming, softmax, results)
    print("\n" + "\n".join(f"- {line}" for line in found))
    metrics = {
        "findings": found, "vectors": vectors, "sketch_sizes": sizes,
        "hamming": hamming, "softmax": softmax, "results": results,
    }  # fmt: skip
    if results:
        metrics = {"model": asked.model, "recent_windows": {row["preset"]: 0 for row in results}, **metrics}
    write_run(asked, metrics)
    if asked.output is not None:
        (asked.output / "findings.md").write_text("".join(f"- {line}\n" for line in found))
        plot(metrics, asked.output / "qjl_lesson.png")
    return 0


def gaussian(heads: int, count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(heads, count, dim, generator=torch.Generator().manual_seed(seed))


def vector_errors(widths: Sequence[int], dim: int, tokens: int = 4096) -> list[dict[str, Any]]:
    """Bias and variance of q.k^ at equal code widths. The variance is D x that of unit vectors."""
    keys, queries = gaussian(1, tokens, dim, 0), gaussian(1, 256, dim, 1)
    rows = []
    for name, options in METHODS.items():
        for width in widths:
            quantizer = quantizer_from({**options, "bits": width}, "keys")
            found = errors(keys, round_trip(quantizer, keys), queries)
            # The error without its slope, because the slope is only a change of temperature.
            variance = max(found["inner"] - found["bias"] ** 2, 0.0)
            rows.append(
                {"method": name, "bits": width, "bias": found["bias"], "variance": variance, "error": found["inner"]}
            )
    return rows


def sketch_sizes(dim: int, tokens: int = 4096) -> list[dict[str, Any]]:
    """3-bit codes and a sketch of more or fewer rows, beside `mse` at 3, 4 and 5 bits."""
    keys, queries = gaussian(1, tokens, dim, 0), gaussian(1, 256, dim, 1)
    options = {f"mse {b}": {"quantizer": "mse", "bits": b} for b in (3, 4, 5)}
    for kind in ("gaussian", "orthogonal"):
        for share in (0.5, 1, 2, 4):
            size = int(share * dim)
            options[f"{kind}, {size} rows"] = {"quantizer": "prod", "bits": 4, "sketch": kind, "sketch_size": size}
    rows = []
    for name, data in options.items():
        quantizer = quantizer_from(data, "keys")
        found = errors(keys, round_trip(quantizer, keys), queries)
        rows.append(
            {
                "method": name,
                "real bits": quantizer.bits_per_channel(dim, 128),
                "error": found["inner"],
                "bias": found["bias"],
            }
        )
    return rows


def hamming_errors(dim: int, pairs: int = 512, sketches: int = 8) -> list[dict[str, Any]]:
    """The asymmetric estimate <S q, sign(S k)> against cos(pi x share of differing signs), both of D Gaussian rows."""
    rows = []
    for cosine in (0.0, 0.25, 0.5, 0.75, 0.9, 0.99):
        query, other = (torch.nn.functional.normalize(gaussian(1, pairs, dim, seed)[0], dim=-1) for seed in (2, 3))
        other = torch.nn.functional.normalize(other - (other * query).sum(-1, keepdim=True) * query, dim=-1)
        key = cosine * query + math.sqrt(1 - cosine**2) * other
        asymmetric, symmetric = [], []
        for seed in range(sketches):
            sketch = gaussian(1, dim, dim, 10 + seed)[0]
            signs = (key @ sketch.T).sign()
            asymmetric.append(math.sqrt(math.pi / 2) / dim * ((query @ sketch.T) * signs).sum(-1))
            symmetric.append(torch.cos(math.pi * ((query @ sketch.T).sign() != signs).float().mean(-1)))
        for name, estimate in (("asymmetric", torch.cat(asymmetric)), ("symmetric", torch.cat(symmetric))):
            # Softmax compares the scores of keys, so the spread of the estimate is what changes it.
            rows.append(
                {
                    "estimator": name,
                    "cosine": cosine,
                    "bias": estimate.mean().item() - cosine,
                    "std": estimate.std().item(),
                }
            )
    return rows


def softmax_errors(widths: Sequence[int], dim: int, tokens: int = 1024) -> list[dict[str, Any]]:
    """Mean total variation between softmax over exact and estimated scores, by the spread of the scores."""
    keys, queries = gaussian(1, tokens, dim, 0), gaussian(1, 256, dim, 1)
    exact = (queries @ keys.transpose(1, 2)) / math.sqrt(dim)
    rows = []
    for name, options in METHODS.items():
        for width in widths:
            decoded = round_trip(quantizer_from({**options, "bits": width}, "keys"), keys)
            scores = (queries @ decoded.transpose(1, 2)) / math.sqrt(dim)
            row = {"method": name, "bits": width}
            for spread in (1, 2, 4, 8):
                difference = (spread * scores).softmax(-1) - (spread * exact).softmax(-1)
                row[f"spread {spread}"] = difference.abs().sum(-1).mean().item() / 2
            rows.append(row)
    return rows


def model_errors(asked: Run) -> list[dict[str, Any]]:
    """KL and perplexity with only the keys quantized, and those of both turbo4 presets as they were shipped."""
    options = {"sinks": 0, "recent_window": 0, "min_statistics": 0, "encode_first": True}
    presets = [
        CachePreset(name=f"{name} {width} (keys)", keys={**data, "bits": width}, values="lossless", **options)
        for name, data in METHODS.items()
        for width in asked.bits
    ]
    presets += [load_preset(name, **options) for name in ("old-turbo4", "turbo4")]
    model, tokenizer = load_model(
        asked.model, dtype=asked.dtype, device=asked.device, attn_implementation=ATTENTION_NAME
    )
    _, text = read_text(asked)
    windows = fidelity.cut_windows(tokenizer(text, return_tensors="pt").input_ids[0], asked.context, asked.windows)
    baseline, results = fidelity.measure(model, windows, presets, chunk=asked.chunk)
    columns = ("preset", "perplexity", "kl", "top1", "key_bits", "value_bits")
    return [{**{c: row[c] for c in columns}, "baseline": baseline} for row in results]


PHRASES = {
    "mse": "mse", "mse, unbiased": "mse with the unbiased scale", "prod": "prod",
    "prod, orthogonal": "prod with an orthogonal sketch",
}  # fmt: skip
"""The names of the methods in a sentence."""


def _listed(values: Mapping[str, str]) -> str:
    """Figures by method as the middle of a sentence: "1 for mse, 2 for prod and 3 for ..."."""
    *first, last = (f"{figure} for {PHRASES[name]}" for name, figure in values.items())
    return f"{', '.join(first)} and {last}" if first else last


def findings(vectors, sizes, hamming, softmax, results) -> list[str]:
    """The figures in sentences, which are worded to be true for any figures."""
    width = max(row["bits"] for row in vectors)
    error = {row["method"]: row for row in vectors if row["bits"] == width}
    spread = {row["method"]: row for row in softmax if row["bits"] == width}
    errors_by_method = {name: f"{row['error']:.4f}" for name, row in error.items()}
    biases = {name: f"{row['bias']:+.4f}" for name, row in error.items()}
    found = [
        f"At {width} bits, the error of an inner product, times D, is "
        f"{_listed(errors_by_method)}. The bias is {_listed(biases)}.",
        "Unbiased inner products do not need QJL: the stored scale makes them unbiased, costs no bit and has "
        f"{error['prod']['variance'] / error['mse, unbiased']['variance']:.1f} times less variance than prod.",
    ]
    best = min((row for row in sizes if "rows" in row["method"]), key=lambda row: row["error"])
    four = next(row for row in sizes if row["method"] == "mse 4")
    five = next(row for row in sizes if row["method"] == "mse 5")
    found.append(
        f"The best sketch behind a 3-bit codebook ({best['method']}) has an error of {best['error']:.4f} at "
        f"{best['real bits']:.2f} real bits. mse has {four['error']:.4f} at {four['real bits']:.2f} bits and "
        f"{five['error']:.4f} at {five['real bits']:.2f}."
    )
    at = {(row["estimator"], row["cosine"]): row for row in hamming}
    found.append(
        "At cosine 0, where most keys are, the symmetric Hamming estimator has a standard deviation of "
        f"{at['symmetric', 0.0]['std']:.3f} and the asymmetric one {at['asymmetric', 0.0]['std']:.3f}. At cosine 0.9 "
        f"these are {at['symmetric', 0.9]['std']:.3f} (bias {at['symmetric', 0.9]['bias']:+.4f}) and "
        f"{at['asymmetric', 0.9]['std']:.3f} (bias {at['asymmetric', 0.9]['bias']:+.4f})."
    )
    moved = [
        f"for scores with a standard deviation of {s} it is "
        + _listed({name: f"{100 * row[f'spread {s}']:.1f} %" for name, row in spread.items()})
        for s in (1, 4)
    ]
    found.append(f"Attention weight that moves in a softmax at {width} bits: {'; '.join(moved)}.")
    kl = {row["preset"]: row["kl"] for row in results}
    for bits in sorted({row["bits"] for row in vectors}) if kl else ():
        own = {name: kl[f"{name} {bits} (keys)"] for name in METHODS}
        shown = {name: f"{value:.4f} ({value / own['mse']:.1f}x)" for name, value in own.items() if name != "mse"}
        found.append(f"Model with {bits}-bit keys only: KL is {own['mse']:.4f} for mse, {_listed(shown)}.")
    if kl:
        old, new = kl["old-turbo4"], kl["turbo4"]
        found.append(
            f"Model with keys and values: KL is {old:.4f} for old-turbo4, which has QJL, and {new:.4f} for turbo4, "
            f"which has not: {old / new:.1f} times less."
        )
    return found


def plot(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw the error by width, the two 1-bit estimators, softmax, and the model's KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (error, hamming), (softmax, model) = figure.subplots(2, 2)
    for index, method in enumerate(METHODS):
        style = {"marker": "os^v"[index], "color": f"C{index}", "label": method}
        rows = [row for row in metrics["vectors"] if row["method"] == method]
        error.plot([row["bits"] for row in rows], [row["error"] for row in rows], **style)
        row = [row for row in metrics["softmax"] if row["method"] == method][-1]
        softmax.plot([1, 2, 4, 8], [row[f"spread {s}"] for s in (1, 2, 4, 8)], **style)
        kl = {r["preset"]: r["kl"] for r in metrics["results"]}
        if kl:
            model.plot([r["bits"] for r in rows], [kl[f"{method} {r['bits']} (keys)"] for r in rows], **style)
    widths = sorted({row["bits"] for row in metrics["vectors"]})
    for axis in (error, model):
        axis.set(yscale="log", xlabel="bits of codes (sketch included)", xticks=widths)
    error.set(title="one inner product", ylabel="D x relative squared error")
    model.set(title="model, keys only", ylabel="KL to the uncompressed model")
    top = metrics["softmax"][-1]["bits"]
    softmax.set(xscale="log", xticks=[1, 2, 4, 8], xticklabels=[1, 2, 4, 8], xlabel="standard deviation of the scores")
    softmax.set(title=f"softmax at {top} bits", ylabel="attention weight moved (total variation)")
    softmax.minorticks_off()
    for index, name in enumerate(("asymmetric", "symmetric")):
        rows = [row for row in metrics["hamming"] if row["estimator"] == name]
        hamming.errorbar(
            [row["cosine"] + 0.01 * index for row in rows], [row["bias"] for row in rows], [row["std"] for row in rows],
            fmt="o^"[index], capsize=3, label=f"{name}: bias and standard deviation",
        )  # fmt: skip
    hamming.axhline(0, color="0.6", linewidth=0.8)
    hamming.set(title="1-bit estimators, D Gaussian rows", xlabel="cosine of q and k", ylabel="estimate - cosine")
    for axis in (error, hamming, softmax, model):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
