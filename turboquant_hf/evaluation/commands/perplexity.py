"""`turboquant-hf perplexity`: presets beside the uncompressed model on a text.

By default, a chunk is encoded before attention reads it. Outside the recent window, nothing is then read raw. In
generation, the newest tokens stay raw in the tail until their tile is full. The figures therefore show the quantizers
at their worst. `--raw-chunk` gives the order of generation.

`--repeat` puts a run of one token, or of a few tokens, into the text. Its statistics must not spoil what follows.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import DEFAULT_PRESET
from turboquant_hf.evaluation.harness import fidelity, flags
from turboquant_hf.evaluation.harness.models import load_tokenizer
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.presets.named import resolve_presets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    flags.add_preset_argument(parser, [DEFAULT_PRESET])
    flags.add_profile_argument(parser)
    flags.add_window_arguments(parser, context=2048, windows=4)
    parser.add_argument(
        "--recent-window", type=int, default=None, metavar="TOKENS", help="override the presets' recent window"
    )
    parser.add_argument("--raw-chunk", action="store_true", help="attend to a chunk before it is encoded")
    parser.add_argument("--repeat", metavar="TEXT", help="put a run of copies of TEXT's tokens into every window")
    parser.add_argument("--repeat-tokens", type=flags.whole(1), default=384, help="tokens of the run (%(default)s)")
    parser.add_argument(
        "--repeat-at",
        type=flags.whole(0),
        default=0,
        help="tokens before the run; only later tokens count (%(default)s)",
    )
    parser.add_argument("--attention", default=ATTENTION_NAME, help="attention implementation of the model")
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print a table. Returns 0."""
    asked = Run.of(args)
    options = {"recent_window": asked.recent_window, "encode_first": not asked.raw_chunk}
    presets = resolve_presets(asked.preset, asked.profile, **options)

    def summarize(baseline: float, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"baseline": {"perplexity": baseline}, "results": results}

    def finish(metrics: dict[str, Any], _) -> None:
        print(fidelity.table(metrics))

    if asked.repeat is None:
        fidelity.run_fidelity(asked, presets, summarize, finish)
        return 0

    def cut(tokens: torch.Tensor) -> list[torch.Tensor]:
        run = load_tokenizer(asked.model)(asked.repeat, add_special_tokens=False, return_tensors="pt").input_ids
        windows = fidelity.cut_windows(tokens, asked.context, asked.windows)
        return [with_repeats(window, run, asked.repeat_tokens, asked.repeat_at) for window in windows]

    scored = asked.repeat_at + asked.repeat_tokens
    fidelity.run_fidelity(asked, presets, summarize, finish, cut=cut, scored=scored)
    return 0


def with_repeats(window: torch.Tensor, run: torch.Tensor, tokens: int, at: int) -> torch.Tensor:
    """Window [1, T] with `tokens` tokens, copies of run [1, n], put in at position `at`; it stays T tokens long."""
    if run.shape[1] == 0:
        raise ValueError("repeat='' is not supported; allowed: text of at least one token")
    copies = run.repeat(1, -(-tokens // run.shape[1]))[:, :tokens]
    return torch.cat([window[:, :at], copies, window[:, at:]], dim=1)[:, : window.shape[1]]
