"""`turboquant-hf profile`: the second moments of a model's queries, keys and values, for caches of this model."""

from __future__ import annotations

import argparse
from pathlib import Path

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.cache.profiles import FILE
from turboquant_hf.evaluation.harness import fidelity, flags
from turboquant_hf.evaluation.harness.models import load_model
from turboquant_hf.evaluation.harness.profiling import make_profile
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.texts import read_text
from turboquant_hf.version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser, output=FILE, what="the file, or the folder that it goes to")
    flags.add_text_arguments(parser)
    parser.add_argument("--context", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="windows, spread over the text (default: %(default)s)")
    parser.add_argument(
        "--share", type=float, help="how far moments are moved towards their diagonals, 0 to 1; default: chosen"
    )
    parser.add_argument("--map-values", action="store_true", help="map values, too, which so far did not lower KL")
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file and say what is in it; 0 when done."""
    asked = Run.of(args)
    if asked.share is not None and not 0.0 <= asked.share <= 1.0:
        raise ValueError(f"share={asked.share:g} is not supported; allowed: from 0 to 1")
    if asked.windows < 2:
        raise ValueError(f"windows={asked.windows} is not supported; allowed: at least 2")
    path = check_target(asked.output)
    name, text = read_text(asked)
    model, tokenizer = load_model(
        asked.model, dtype=asked.dtype, device=asked.device, attn_implementation=ATTENTION_NAME
    )
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = fidelity.cut_windows(tokens, asked.context, asked.windows)
    profile = make_profile(model, windows, share=asked.share, values=asked.map_values)
    profile.about.update(package=__version__, model=asked.model, text=name, dtype=asked.dtype)
    profile.save(path)
    share = profile.about["share"]
    values = "not mapped" if share["values"] is None else f"moved {share['values']:g} of it"
    print(
        f"{path}: {len(profile.layers)} layers from {profile.about['tokens']:,} tokens of {name}; moments of keys "
        f"moved {share['keys']:g} of the way to their diagonals, values {values}"
    )
    return 0


def check_target(path: Path) -> Path:
    """The path of the new file, which is refused before anything is measured where it cannot be written."""
    if path.is_dir():
        path = path / FILE
    if not path.parent.is_dir():
        raise ValueError(f"output={str(path)!r} is not supported; allowed: a file in a folder that is there")
    return path
