"""`turboquant-hf ablate`: each part of a preset on and off, by KL against the uncompressed model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from turboquant_hf.config import CachePreset, load_preset
from turboquant_hf.evaluation.harness import fidelity, flags
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.presets.named import MEASURED_ALONE
from turboquant_hf.evaluation.report.pareto import pareto_front
from turboquant_hf.quantizers.profile import Profile
from turboquant_hf.resources import config_path

GIVEN = "given"
"""What a row says that is measured with the profile of --profile."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    parser.add_argument(
        "--variants", type=Path, default=config_path("eval", "ablate.yaml"), help="YAML: section -> name -> change"
    )
    parser.add_argument(
        "--section", action="append", metavar="NAME", help="only sections whose names begin with this; may be repeated"
    )
    parser.add_argument("--profile", metavar="FILE", help="profile of the model, for the rows that want one")
    flags.add_window_arguments(parser, context=768, windows=1)
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks, print one table, draw ablate.png. Returns 0."""
    asked = Run.of(args)
    variants = read_variants(Path(asked.variants), asked.section, asked.profile)
    # Rows of different sections are often the same preset under two names. The effect of `min_statistics` shows only
    # if the text comes chunk by chunk.
    rows = [(replace(preset, name=""), section.startswith("statistics")) for section, _, preset in variants]
    unique = list(dict.fromkeys(rows))

    def summarize(baseline: float, measured: list[dict[str, Any]]) -> dict[str, Any]:
        by_preset = dict(zip(unique, measured, strict=True))
        results = []
        for (section, name, _), row in zip(variants, rows, strict=True):
            found = by_preset[row]
            named = {"preset": f"{section}: {name}", "section": section, "variant": name}
            results.append({**found, **named, "bits": 16 / found["compression_ratio"]})
        return {"baseline": {"perplexity": baseline}, "results": results}

    def finish(metrics: dict[str, Any], output: Path) -> None:
        print(fidelity.table(metrics))
        plot(metrics["results"], output / "ablate.png")

    presets, gradual = zip(*unique, strict=True)
    fidelity.run_fidelity(asked, presets, summarize, finish, gradual=gradual)
    return 0


def read_variants(
    path: Path, sections: Sequence[str] | None = None, profile: str | None = None
) -> list[tuple[str, str, CachePreset]]:
    """(section, name, preset) of every requested row. Rows that want a profile are left out if there is none.

    Raises:
        ValueError: for a section that is not in the file, or a row without a base or with an unknown field.
    """
    given = None if profile is None else Profile.load(profile)
    with path.open() as file:
        data = yaml.safe_load(file)
    chosen = [s for s in data if not sections or any(s.startswith(wanted) for wanted in sections)]
    if not chosen:
        raise ValueError(f"section={sections!r} is not supported; allowed: {', '.join(map(repr, data))}")
    rows = [(s, name, change) for s in chosen for name, change in data[s].items()]
    served = [row for row in rows if given is not None or row[2].get("profile") != GIVEN]
    return [(s, name, variant(change, given)) for s, name, change in served]


def variant(change: Mapping[str, Any], profile: Profile | None = None) -> CachePreset:
    """The base preset, changed. Only its sinks stay raw, and attention over the first 256 tokens."""
    change = dict(change)
    change["profile"] = profile if change.get("profile") == GIVEN else change.get("profile")
    if "base" not in change:
        raise ValueError(f"variant {change!r} is not supported; allowed: a mapping with 'base' and fields of a preset")
    preset = load_preset(change.pop("base"), **MEASURED_ALONE)
    for role in ("keys", "values"):
        options = change.get(role)
        if isinstance(options, Mapping) and "quantizer" not in options:
            try:
                change[role] = replace(getattr(preset, role), **options)
            except TypeError as error:
                raise ValueError(f"variant: {role}={options!r} is not supported: {error}") from None
    return preset.with_overrides(**change)


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw KL against the bits per channel of a cache of this context, with raw tokens, and the Pareto front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axis = figure.subplots()
    points = [(row["bits"], row["kl"]) for row in results]
    for index, section in enumerate(dict.fromkeys(row["section"] for row in results)):
        chosen = [p for p, row in zip(points, results, strict=True) if row["section"] == section]
        axis.scatter(
            *zip(*chosen, strict=True),
            s=36,
            marker="os^vDPX*"[index % 8],
            color=f"C{index % 10}",
            label=section,
            alpha=0.8,
        )
    front = pareto_front(points)
    axis.plot(*zip(*(points[i] for i in front), strict=True), color="0.3", linewidth=1, label="Pareto front", zorder=0)
    for i in front:
        section, name = results[i]["section"], results[i]["variant"]
        label = f"{section}: {name}" if name.isdigit() else name
        axis.annotate(label, points[i], textcoords="offset points", xytext=(-7, -9), ha="right", fontsize=8)
    axis.margins(x=0.15, y=0.1)
    axis.set(
        yscale="log",
        xlabel="bits held per channel at this context, raw tokens and rotations included",
        ylabel="KL to the uncompressed model",
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
