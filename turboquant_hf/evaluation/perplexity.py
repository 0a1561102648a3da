"""`turboquant-hf perplexity`: presets beside the uncompressed model on a text.

A chunk is stored before it is attended to: outside the recent window nothing is read raw, not even a token's own
neighbours, which in generation wait raw in the tail until their tile is full. So these figures are what the
quantizers cost at their worst; `--raw-chunk` gives generation's own order.
"""

from __future__ import annotations

import argparse
from typing import Any

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import DEFAULT_PRESET
from turboquant_hf.evaluation import common, fidelity
from turboquant_hf.evaluation.settings import add_settings, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_text_arguments(parser)
    common.add_preset_argument(parser, [DEFAULT_PRESET])
    parser.add_argument("--context", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=4, help="how many windows, spread over the text (default: %(default)s)"
    )
    parser.add_argument("--chunk", type=int, default=128, help="tokens fed at a time (default: %(default)s)")
    parser.add_argument(
        "--recent-window", type=int, default=None, metavar="TOKENS", help="override the presets' recent window"
    )
    parser.add_argument("--raw-chunk", action="store_true", help="attend to a chunk before it is rounded")
    parser.add_argument("--attention", default=ATTENTION_NAME, help="attention implementation of the model")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print a table; 0 when done."""
    options = settings(args)
    presets = common.resolve_presets(
        options.preset, recent_window=options.recent_window, encode_first=not options.raw_chunk
    )

    def summarize(baseline: float, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"baseline": {"perplexity": baseline}, "results": results}

    def finish(metrics: dict[str, Any], _) -> None:
        print(fidelity.table(metrics))

    fidelity.run_fidelity(options, presets, summarize, finish)
    return 0
