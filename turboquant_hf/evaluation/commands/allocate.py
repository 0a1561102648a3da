"""`turboquant-hf allocate`: chooses widths layer by layer under a budget, by each layer's effect on the answers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation.harness import fidelity, flags
from turboquant_hf.evaluation.harness.models import load_config
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.presets.allocation import (
    ROLES,
    Costs,
    allocated_preset,
    choose_widths,
    flat_cost,
    flat_rivals,
    preset_data,
    price_list,
)
from turboquant_hf.evaluation.presets.memory import bits_per_channel
from turboquant_hf.evaluation.presets.named import MEASURED_ALONE
from turboquant_hf.evaluation.presets.widths import KEY_WIDTHS, key_quantizer, value_quantizer
from turboquant_hf.quantizers.layers import LayerOverride


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    parser.add_argument(
        "--budget",
        type=float,
        default=3.0,
        help="bits of codes per channel, mean of keys and values: the best flat preset with these bits sets the bytes "
        "to spend (default: %(default)s)",
    )
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        choices=sorted(KEY_WIDTHS),
        default=[2, 3, 4],
        help="widths to choose from (default: 2 3 4)",
    )
    parser.add_argument(
        "--probe",
        type=int,
        nargs="+",
        choices=sorted(KEY_WIDTHS),
        default=[2],
        help="widths at which each layer is measured alone (default: 2)",
    )
    parser.add_argument("--context", type=int, default=768, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=1, help="windows to choose by, from the first half of the text (%(default)s)"
    )
    parser.add_argument("--check-context", type=int, default=768, help="tokens per window of the check (%(default)s)")
    parser.add_argument(
        "--check-windows", type=int, default=6, help="windows of the check, from the second half (%(default)s)"
    )
    parser.add_argument("--chunk", type=int, default=128, help="tokens fed at a time (default: %(default)s)")
    parser.add_argument(
        "--write", type=Path, default=None, metavar="FILE", help="the preset; default: preset.yaml in --output"
    )
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, choose and check; write the preset and metrics.json. Returns 0."""
    asked = Run.of(args)
    if not min(asked.widths) <= asked.budget <= max(asked.widths):
        raise ValueError(
            f"budget={asked.budget} is not supported; allowed: from {min(asked.widths)} to {max(asked.widths)}"
        )
    config = load_config(asked.model)
    layers = len(TurboQuantCache(config).packed_layers)
    costs = sensitivity(asked, layers)
    choice, rivals = choose(costs, asked, layers, _head_dim(config))
    preset = allocated_preset(choice, name=f"allocated-{asked.budget:g}")
    target = asked.write or (asked.output / "preset.yaml" if asked.output else None)

    def summarize(baseline: float, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "findings": [verdict(results)], "baseline": {"perplexity": baseline},
            "results": results, "widths": {role: [choice[role, layer] for layer in range(layers)] for role in ROLES},
            "sensitivity": [{"role": r, "layer": n, "width": w, "kl": kl} for (r, n, w), kl in costs.items()],
        }  # fmt: skip

    def finish(metrics: dict[str, Any], _) -> None:
        print(fidelity.table(metrics))
        print(found := metrics["findings"][0])
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"# {found}\n" + yaml.safe_dump(preset_data(preset), sort_keys=False))
            print(f"Wrote {target}")

    candidates = [replace(p, **MEASURED_ALONE) for p in (preset, *rivals)]
    fidelity.run_fidelity(
        asked, candidates, summarize, finish,
        cut=lambda tokens: fidelity.cut_windows(_half(tokens, 1), asked.check_context, asked.check_windows),
    )  # fmt: skip
    return 0


def sensitivity(asked: Run, layers: int) -> Costs:
    """KL of each side of each layer alone at each width, all else lossless. This is a run in the folder `sensitivity`.

    Only the `probe` widths are measured layer by layer. Another width gets the KL of the nearest probed width, times
    the ratio of the KL of all layers together at the two widths. This saves most of the work.
    """
    part = asked.part("sensitivity", tool="allocate, sensitivity")
    widths = sorted({*asked.widths, *asked.probe})
    everywhere = [(role, width) for role in ROLES for width in widths]
    alone = [(role, layer, width) for role in ROLES for layer in range(layers) for width in asked.probe]
    presets = [_one_side(role, width) for role, width in everywhere]
    presets += [_one_side(role, width, layer) for role, layer, width in alone]

    def summarize(_, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"kl": {row["preset"]: row["kl"] for row in results}}

    metrics = fidelity.run_fidelity(
        part, presets, summarize, lambda *_: None,
        cut=lambda tokens: fidelity.cut_windows(_half(tokens, 0), asked.context, asked.windows),
    )  # fmt: skip
    kl = [metrics["kl"][preset.name] for preset in presets]
    total = dict(zip(everywhere, kl[: len(everywhere)], strict=True))
    probed = dict(zip(alone, kl[len(everywhere) :], strict=True))
    costs = {}
    for role in ROLES:
        for layer in range(layers):
            for width in asked.widths:
                near = min(asked.probe, key=lambda p: abs(p - width))
                costs[role, layer, width] = probed[role, layer, near] * total[role, width] / total[role, near]
    return costs


def choose(
    costs: Costs, asked: Run, layers: int, head_dim: int
) -> tuple[dict[tuple[str, int], int], list[CachePreset]]:
    """({(role, layer): width}, the flat presets of the budget). The bytes of the strongest flat preset are spent."""
    rivals = flat_rivals(asked.widths, asked.budget)
    # Flat presets of equal code widths differ in the bytes of their scales. The strongest of them sets the budget.
    rival = min(rivals, key=lambda preset: flat_cost(costs, preset, asked.widths, layers))
    bits = sum(bits_per_channel(rival, head_dim, layers)) / 2
    return choose_widths(costs, price_list(asked.widths, head_dim), layers, bits), rivals


def verdict(results: Sequence[Mapping[str, Any]]) -> str:
    """A sentence that compares the allocated preset (first) with the best of its flat rivals, window by window."""
    ours, rival = results[0], min(results[1:], key=lambda row: row["kl"])
    outcome = "beats" if ours["kl"] < rival["kl"] else "does not beat"
    bits = [(row["key_bits"] + row["value_bits"]) / 2 for row in (ours, rival)]
    ratios = [a / b for a, b in zip(ours["kl_by_window"], rival["kl_by_window"], strict=True)]
    return (
        f"{ours['preset']} {outcome} {rival['preset']}, the best flat preset of its size, on other text: KL "
        f"{ours['kl']:.4f} at {bits[0]:.3f} real bits per channel against {rival['kl']:.4f} at {bits[1]:.3f}. It is "
        f"better in {sum(ratio < 1 for ratio in ratios)} of {len(ratios)} windows, where its KL is "
        f"{min(ratios):.2f} to {max(ratios):.2f} times that of {rival['preset']}."
    )


def _half(tokens: torch.Tensor, index: int) -> torch.Tensor:
    middle = len(tokens) // 2
    return tokens[middle:] if index else tokens[:middle]


def _head_dim(config) -> int:
    config = config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _one_side(role: str, width: int, layer: int | None = None) -> CachePreset:
    """A preset that rounds only the keys or the values of one layer, or of all layers."""
    quantizer = key_quantizer(width) if role == "keys" else value_quantizer(width)
    name = f"{role} {width}" if layer is None else f"{role} {width}, layer {layer}"
    lossless = CachePreset(name=name, keys="lossless", values="lossless", **MEASURED_ALONE)
    if layer is None:
        return lossless.with_overrides(**{role: quantizer})
    return lossless.with_overrides(layers=((layer, LayerOverride(**{role: quantizer})),))
