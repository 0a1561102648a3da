"""`turboquant-hf check`: whether a preset keeps this model's answers, and if not, which preset does."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from typing import Any

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, load_preset
from turboquant_hf.evaluation.harness import fidelity, flags
from turboquant_hf.evaluation.harness.folder import check_output, write_run
from turboquant_hf.evaluation.harness.models import load_model
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.texts import read_text
from turboquant_hf.evaluation.presets.named import MEASURED_ALONE, with_profile

SAFER = ("k3v3", "k4v4", "k8v4")
"""Presets by increasing fidelity."""
LIMIT = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    parser.add_argument("--preset", metavar="NAME", default=DEFAULT_PRESET, help="preset name or YAML path")
    flags.add_profile_argument(parser)
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="largest KL per token that is accepted (%(default)s)"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of the text to read (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print a sentence. Returns 0 if the preset stays below the limit, else 1."""
    asked = Run.of(args)
    if not asked.limit >= 0:
        raise ValueError(f"limit={asked.limit:g} is not supported; allowed: 0 and more")
    check_output(asked)
    model, tokenizer = load_model(
        asked.model, dtype=asked.dtype, device=asked.device, attn_implementation=ATTENTION_NAME
    )
    name, text = read_text(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        options = {"limit": asked.limit, "context": asked.context, "profile": asked.profile}
        found = check_fidelity(model, tokenizer, asked.preset, text, **options)
    print(found.sentence)
    figures = {"preset": found.preset, "kl": found.kl, "top1": found.top1, "safer": found.safer}
    about = {"model": asked.model, "text": name, "recent_windows": {found.preset: MEASURED_ALONE["recent_window"]}}
    write_run(asked, {**about, **figures, "findings": [found.sentence]})
    return 0 if found.faithful else 1


@dataclass(frozen=True)
class Fidelity:
    """The result of `check_fidelity`. If the preset is above the limit, `safer` names one that stays below it."""

    preset: str
    kl: float
    top1: float
    limit: float
    safer: str | None = None

    @property
    def faithful(self) -> bool:
        return self.kl <= self.limit

    @property
    def sentence(self) -> str:
        """The result in words."""
        figures = f"KL {self.kl:.3g} per token, limit {self.limit:g}"
        if self.faithful:
            return f"{self.preset} stays close to the uncompressed model: {figures}, top-1 {self.top1:.1%}"
        advice = (
            f"{self.safer} stays below the limit"
            if self.safer
            else f"none of {', '.join(SAFER)} stays below the limit, so leave the cache uncompressed"
        )
        return f"{self.preset} changes this model's answers: {figures}; {advice}"


def check_fidelity(
    model,
    tokenizer,
    preset: str | CachePreset,
    text: str,
    *,
    limit: float = LIMIT,
    context: int = 512,
    chunk: int = 128,
    profile: str | None = None,
) -> Fidelity:
    """Compare the logits of the compressed and the uncompressed model on the beginning of `text`.

    Only the sinks are read raw, so that the quantizers themselves are judged. If the KL per token is above `limit`, a
    warning names the first preset of `SAFER` that stays below it. profile: what --profile says.

    Raises:
        ValueError: when the text is shorter than `context` tokens.
    """
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = fidelity.cut_windows(tokens[:context], context, 1)

    def judge(candidate: str | CachePreset) -> dict[str, Any]:
        alone = with_profile(load_preset(candidate, **MEASURED_ALONE), profile)
        return fidelity.measure(model, windows, [alone], chunk=chunk)[1][0]

    row, safer = judge(preset), None
    if not row["kl"] <= limit:  # NaN included
        safer = next((name for name in SAFER if name != row["preset"] and judge(name)["kl"] <= limit), None)
    found = Fidelity(row["preset"], row["kl"], row["top1"], limit, safer)
    if not found.faithful:
        warnings.warn(found.sentence, stacklevel=2)
    return found
