"""Widths layer by layer under a budget, from each layer's own effect on the model's answer."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache
from turboquant_hf.config import CachePreset, LayerOverride, load_preset
from turboquant_hf.evaluation import common, perplexity
from turboquant_hf.evaluation.models import load_model
from turboquant_hf.evaluation.presets import KEY_WIDTHS, bits_per_channel, flat_preset, key_quantizer, value_quantizer
from turboquant_hf.quantizers import Quantizer

ROLES = ("keys", "values")
MEASURED_ALONE = {"recent_window": 0, "encode_first": True, "min_statistics": 256}
"""Nothing but the sinks is read raw once 256 tokens were seen, whatever a preset waits for."""
SAFER = ("k3v3", "k4v4", "k8v4")
"""Presets in the order of what they keep."""

Costs = dict[tuple[str, int, int], float]
"""(role, layer, width) -> KL when only that side of that layer has that width."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_text_arguments(parser)
    parser.add_argument(
        "--budget",
        type=float,
        default=3.0,
        help="bits of codes per channel, mean of keys and values, of the flat preset whose bytes are spent",
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[2, 3, 4], help=f"widths to choose from: {sorted(KEY_WIDTHS)}"
    )
    parser.add_argument(
        "--probe", type=int, nargs="+", default=[2], help="widths at which each layer is measured alone"
    )
    parser.add_argument("--context", type=int, default=640, help="tokens a window")
    parser.add_argument("--windows", type=int, default=1, help="windows to choose by, from the first half of the text")
    parser.add_argument("--check-context", type=int, default=768, help="tokens a window of the check")
    parser.add_argument(
        "--check-windows", type=int, default=3, help="windows that check the choice, from the second half"
    )
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument(
        "--write", type=Path, default=None, metavar="FILE", help="the preset; default: preset.yaml in --output"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, choose, check, write the preset and metrics.json; 0 when done."""
    if not min(args.widths) <= args.budget <= max(args.widths):
        raise ValueError(
            f"budget={args.budget} is not supported; allowed: from {min(args.widths)} to {max(args.widths)}"
        )
    model, tokenizer = load_model(
        args.model, dtype=common.resolve_dtype(args), device=args.device, attn_implementation=ATTENTION_NAME
    )
    text_name, text = common.read_text(args)
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    middle = len(tokens) // 2
    chosen_by = perplexity.cut_windows(tokens[:middle], args.context, args.windows)
    checked_on = perplexity.cut_windows(tokens[middle:], args.check_context, args.check_windows)

    costs = sensitivity(model, chosen_by, widths=args.widths, probe=args.probe, chunk=args.chunk)
    layers = len(TurboQuantCache(model.config).packed_layers)
    rivals = flat_rivals(args.widths, args.budget)
    head_dim = _head_dim(model)
    # Pairs of equal code widths differ in their scales: the bytes to spend are those of the strongest rival.
    rival = min(rivals, key=lambda preset: _flat_cost(costs, preset, args.widths, layers))
    bits = sum(bits_per_channel(rival, head_dim, layers)) / 2
    choice = choose_widths(costs, price_list(args.widths, head_dim), layers, bits)
    preset = allocated_preset(choice, name=f"allocated-{args.budget:g}")
    candidates = [replace(p, **MEASURED_ALONE) for p in (preset, *rivals)]
    baseline, results = perplexity.measure(model, checked_on, candidates, chunk=args.chunk)

    columns = ("preset", "kl", "perplexity", "top1", "key_bits", "value_bits", "compression_ratio")
    print(common.format_table([[r[c] for c in columns] for r in results], columns))
    found = verdict(results)
    print(found)
    target = args.write or (args.output / "preset.yaml" if args.output else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"# {found}\n" + yaml.safe_dump(preset_data(preset), sort_keys=False))
        print(f"Wrote {target}")
    metrics = {
        "tool": "allocate", "model": args.model, "text": text_name, "context": args.check_context,
        "windows": len(checked_on), "findings": [found], "baseline": {"perplexity": baseline}, "results": results,
        "widths": {role: [choice[role, layer] for layer in range(layers)] for role in ROLES},
        "sensitivity": [{"role": r, "layer": n, "width": w, "kl": kl} for (r, n, w), kl in costs.items()],
    }  # fmt: skip
    common.write_run(args.output, {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, metrics)
    return 0


def sensitivity(model, windows, *, widths: Sequence[int], probe: Sequence[int], chunk: int = 128) -> Costs:
    """KL of each side of each layer alone at each width, all else lossless.

    Only the `probe` widths are measured layer by layer. The others follow the nearest probed one by the ratio of what
    all layers together lose at the two widths, which saves most of the work.
    """
    layers = len(TurboQuantCache(model.config).packed_layers)
    everywhere = {(role, width): _one_side(role, width) for role in ROLES for width in {*widths, *probe}}
    alone = {
        (role, layer, width): _one_side(role, width, layer)
        for role in ROLES
        for layer in range(layers)
        for width in probe
    }
    _, results = perplexity.measure(model, windows, [*everywhere.values(), *alone.values()], chunk=chunk)
    kl = [row["kl"] for row in results]
    total = dict(zip(everywhere, kl[: len(everywhere)], strict=True))
    probed = dict(zip(alone, kl[len(everywhere) :], strict=True))
    costs = {}
    for role in ROLES:
        for layer in range(layers):
            for width in widths:
                near = min(probe, key=lambda p: abs(p - width))
                costs[role, layer, width] = probed[role, layer, near] * total[role, width] / total[role, near]
    return costs


def choose_widths(
    costs: Costs, prices: Mapping[tuple[str, int], float], layers: int, budget: float
) -> dict[tuple[str, int], int]:
    """(role, layer) -> width of least summed cost that stays in a budget: a knapsack over all layers and both sides.

    Args:
        costs: as `sensitivity` returns them.
        prices: (role, width) -> real bits per channel.
        layers: KV layers.
        budget: mean of the prices chosen, at most.

    Raises:
        ValueError: where the cheapest widths cost more than the budget.
    """
    slots = [(role, layer) for role in ROLES for layer in range(layers)]
    limit = budget * len(slots) + 1e-6
    best: dict[float, tuple[float, tuple[int, ...]]] = {0.0: (0.0, ())}
    for role, layer in slots:
        step: dict[float, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, chosen) in best.items():
            for width in (width for owner, width in prices if owner == role):
                # Prices are multiples of a power of two, so that equal sums are equal floats.
                price, total = spent + prices[role, width], (cost + costs[role, layer, width], (*chosen, width))
                if price <= limit and total < step.get(price, (float("inf"),)):
                    step[price] = total
        best = step
    if not best:
        least = sum(min(price for (owner, _), price in prices.items() if owner == role) for role in ROLES) / 2
        raise ValueError(f"budget={budget:g} real bits is not supported; allowed: at least {least:g}")
    return dict(zip(slots, min(best.values())[1], strict=True))


def price_list(widths: Sequence[int], head_dim: int) -> dict[tuple[str, int], float]:
    """(role, width) -> real bits per channel of 16-bit input, scales and means included."""
    sides = {("keys", w): key_quantizer(w) for w in widths} | {("values", w): value_quantizer(w) for w in widths}
    tile = CachePreset().tile
    return {side: quantizer.bits_per_channel(head_dim, tile) for side, quantizer in sides.items()}


def allocated_preset(choice: Mapping[tuple[str, int], int], name: str) -> CachePreset:
    """The commonest widths as the preset's own, the others as overrides of their layers."""
    layers = 1 + max(layer for _, layer in choice)
    chosen = {role: [choice[role, layer] for layer in range(layers)] for role in ROLES}
    key_bits, value_bits = (max(sorted(set(side)), key=side.count) for side in chosen.values())
    overrides = []
    for layer, (keys, values) in enumerate(zip(*chosen.values(), strict=True)):
        override = LayerOverride(
            keys=key_quantizer(keys) if keys != key_bits else None,
            values=value_quantizer(values) if values != value_bits else None,
        )
        if override != LayerOverride():
            overrides.append((layer, override))
    return replace(flat_preset(key_bits, value_bits), name=name, layers=tuple(overrides))


def flat_rivals(widths: Sequence[int], budget: float) -> list[CachePreset]:
    """Flat presets whose codes have `budget` bits, mean of keys and values; if there are none, the largest below it."""
    pairs = [(k, v) for k in widths for v in widths if k + v <= 2 * budget + 1e-6]
    most = max(k + v for k, v in pairs)
    return [flat_preset(k, v) for k, v in pairs if k + v == most]


def _flat_cost(costs: Costs, preset: CachePreset, widths: Sequence[int], layers: int) -> float:
    keys = next(w for w in widths if key_quantizer(w) == preset.keys)
    values = next(w for w in widths if value_quantizer(w) == preset.values)
    return sum(costs["keys", layer, keys] + costs["values", layer, values] for layer in range(layers))


def verdict(results: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the allocated preset (first) beside the best of its flat rivals."""
    ours, rival = results[0], min(results[1:], key=lambda row: row["kl"])
    outcome = "beats" if ours["kl"] < rival["kl"] else "does not beat"
    bits = [(row["key_bits"] + row["value_bits"]) / 2 for row in (ours, rival)]
    return (
        f"{ours['preset']} {outcome} the best flat preset of its size on other text: KL {ours['kl']:.4f} at "
        f"{bits[0]:.3f} real bits per channel, {rival['preset']} {rival['kl']:.4f} at {bits[1]:.3f}."
    )


def preset_data(preset: CachePreset) -> dict[str, Any]:
    """Plain data that `CachePreset.from_dict` reads back, defaults of quantizers left out."""
    data: dict[str, Any] = {"name": preset.name}
    data |= {role: _quantizer_data(getattr(preset, role)) for role in ROLES}
    defaults = CachePreset()
    for name in (f.name for f in fields(preset) if f.name not in {"name", "layers", *ROLES}):
        if getattr(preset, name) != getattr(defaults, name):
            data[name] = getattr(preset, name)
    if preset.layers:
        data["layers"] = {
            layer: {role: _quantizer_data(q) for role in ROLES if (q := getattr(override, role)) is not None}
            for layer, override in preset.layers
        }
    return data


def _quantizer_data(quantizer: Quantizer) -> dict[str, Any]:
    options = {}
    for field in fields(quantizer):
        value = getattr(quantizer, field.name)
        if field.init and (field.default is MISSING or value != field.default):
            options[field.name] = (
                [list(x) if isinstance(x, tuple) else x for x in value] if isinstance(value, tuple) else value
            )
    return {"quantizer": quantizer.name, **options}


def _head_dim(model) -> int:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _one_side(role: str, width: int, layer: int | None = None) -> CachePreset:
    quantizer = key_quantizer(width) if role == "keys" else value_quantizer(width)
    lossless = CachePreset(name=f"{role} {width}", keys="lossless", values="lossless", **MEASURED_ALONE)
    if layer is None:
        return lossless.with_overrides(**{role: quantizer})
    return lossless.with_overrides(layers=((layer, LayerOverride(**{role: quantizer})),))


@dataclass(frozen=True)
class Fidelity:
    """What `check_fidelity` found; `safer` names a preset that stays under the limit, where this one does not."""

    preset: str
    kl: float
    top1: float
    safer: str | None = None


def check_fidelity(
    model, tokenizer, preset: str | CachePreset, text: str, *, limit: float = 0.1, context: int = 512, chunk: int = 128
) -> Fidelity:
    """Compare the logits of the compressed and the uncompressed model on the beginning of `text`.

    Nothing but the sinks is read raw, so that the quantizers themselves are judged. Warns when the KL per token is
    above `limit`, naming the first of `SAFER` that keeps it below.

    Raises:
        ValueError: when the text is shorter than `context` tokens.
    """
    windows = perplexity.cut_windows(tokenizer(text, return_tensors="pt").input_ids[0], context, 1)

    def judge(candidate) -> dict[str, Any]:
        return perplexity.measure(model, windows, [load_preset(candidate, **MEASURED_ALONE)], chunk=chunk)[1][0]

    found = judge(preset)
    if found["kl"] <= limit:
        return Fidelity(found["preset"], found["kl"], found["top1"])
    safer = next((name for name in SAFER if name != found["preset"] and judge(name)["kl"] <= limit), None)
    advice = (
        f"{safer} stays below" if safer else f"none of {', '.join(SAFER)} stays below: leave the cache uncompressed"
    )
    message = (
        f"{found['preset']} changes this model's answers: KL {found['kl']:.3g} per token, limit {limit:g}; {advice}"
    )
    warnings.warn(message, stacklevel=2)
    return Fidelity(found["preset"], found["kl"], found["top1"], safer)
