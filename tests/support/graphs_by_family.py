"""Finds out which model families decode by recorded steps, and why the others do not.

`python -m tests.support.graphs_by_family`, on a GPU, prints the table of docs/graphs.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tests.support.families import FAMILIES, Family, available, build, prompt
from tests.support.generating import LOGITS, generate, turboquant
from turboquant_hf.cache import messages
from turboquant_hf.generation import recorders

NEW = 40


@dataclass
class Watch:
    """What happened to decode steps within `watched`."""

    replays: int = 0
    recordings: int = 0
    reasons: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched(device: str) -> Iterator[Watch]:
    """Count recordings and replays, and note why steps ran without graphs. On a CPU, steps are repeated."""
    watch, kept = Watch(), dict(recorders.RECORDERS)
    base = recorders.RECORDERS.get(device, recorders.Repeat)

    class Counting(base):
        def __init__(self, call, *args):
            super().__init__(call, *args)
            watch.recordings += 1
            replay = self.replay

            def counted():
                watch.replays += 1
                return replay()

            self.replay = counted

    recorders.RECORDERS[device] = Counting
    logger, original = messages.logger, messages.logger.warning_once

    def noted(text: str) -> None:
        if "without CUDA graphs: " in text:
            watch.reasons.append(text.rsplit("graphs: ", 1)[-1].removesuffix("."))

    logger.warning_once = noted
    try:
        yield watch
    finally:
        recorders.RECORDERS.clear()
        recorders.RECORDERS.update(kept)
        logger.warning_once = original


@dataclass
class Row:
    """One family: whether its steps were replayed, the reason if not, and the comparison with DynamicCache."""

    name: str
    replayed: bool
    reason: str
    same_tokens: bool
    error: float


@torch.no_grad()
def examine(family: Family, device: str, static: bool = False, length: int = 41) -> Row:
    """Generate with the lossless preset and recorded steps, beside DynamicCache with the same attention.

    error: the largest difference of a logit, relative to the root mean square of its step.
    """
    model = build(family).to(device)
    inputs = {name: x.to(device) for name, x in prompt(family, length=length).items()}
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, :7] = 0
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    if softcap and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # early versions of SDPA drop the soft-cap
    expected = generate(model, inputs, new=NEW, **LOGITS)
    if softcap:
        model.set_attn_implementation("sdpa")
    with watched(device) as watch:
        got = generate(model, inputs, new=NEW, **LOGITS, **turboquant(static=static))
    error = 0.0
    for a, b in zip(got.logits, expected.logits, strict=True):
        error = max(error, float((a - b).abs().max() / b.square().mean().sqrt()))
    same = torch.equal(got.sequences, expected.sequences)
    return Row(family.name, watch.replays >= NEW // 2, "; ".join(dict.fromkeys(watch.reasons)), same, error)


def main() -> None:
    print("| family | decode steps | why |\n|---|---|---|")
    for family in FAMILIES:
        if family.packed and not family.refused and available(family):
            row = examine(family, "cuda")
            note = row.reason if row.same_tokens else f"{row.reason} (TOKENS DIFFER, error {row.error:.1e})"
            print(f"| {row.name} | {'graph' if row.replayed else 'eager'} | {note} |", flush=True)


if __name__ == "__main__":
    main()
