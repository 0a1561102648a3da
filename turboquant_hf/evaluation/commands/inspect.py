"""`turboquant-hf inspect`: a cache's memory from the model's configuration, and the longest context in a memory."""

from __future__ import annotations

import argparse
import copy
import json
import re
import textwrap
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from turboquant_hf.cache.estimate import LayerMemory, MemoryPlan, longest_context
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.commands.presets import own_first
from turboquant_hf.evaluation.harness.flags import DTYPES, whole
from turboquant_hf.evaluation.harness.models import load_config
from turboquant_hf.evaluation.harness.tables import format_table

UNITS = {
    "": 1,
    "B": 1,
    **{f"{x}{kind}B": base**n for kind, base in (("", 1000), ("i", 1024)) for n, x in enumerate("KMGT", 1)},
}
ALLOWED = "a number of bytes, or one with KiB, MiB, GiB, TiB, KB, MB, GB or TB"
BUILDERS = ("CausalLM", "ImageTextToText", "Seq2SeqLM", "SpeechSeq2Seq", "")
"""Kinds of Auto classes. The first that knows a configuration builds its model."""
REASONS = {
    "packed": "packed",
    "packed + recurrent": "packed; the recurrent state is left as it is: it does not grow",
    "sliding window": "left as they are: at most the window",
    "recurrent": "left as they are: a state that does not grow",
    "sliding window + recurrent": "left as they are: at most the window, and a state that does not grow",
    "indexed": "left as they are: sparse attention chooses tokens by keys of its own, and reads dense ones",
    "raw": "left as they are: a kind of layer that this package does not know",
    "none": "keep nothing of their own",
}
"""What happens to each kind of layer, and why."""


def memory_size(text: str) -> int:
    """Bytes of "24GiB", "80GB" or "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    by_name = {name.lower(): value for name, value in UNITS.items()}
    if match is None or match[2].lower() not in by_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; allowed: {ALLOWED}")
    return int(float(match[1]) * by_name[match[2].lower()])


def weights_size(text: str) -> str | int:
    """ "yes", "no" or a size."""
    return text if text in ("yes", "no") else memory_size(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="hub id, folder, GGUF file, a config.json, or 'packaged' (SmolLM2-135M)")
    parser.add_argument(
        "--tokens", type=whole(1), help="tokens of every sequence (default: the longest context of the model)"
    )
    parser.add_argument("--batch", type=whole(1), default=1, help="sequences (%(default)s)")
    parser.add_argument(
        "--preset", action="extend", nargs="+", metavar="NAME", help="preset names or YAML paths; default: all shipped"
    )
    parser.add_argument("--memory", type=memory_size, metavar="SIZE", help=f"such as 24GiB: {ALLOWED}")
    parser.add_argument(
        "--weights",
        type=weights_size,
        default="yes",
        metavar="yes|no|SIZE",
        help="part of --memory for the weights: yes (in the model's dtype, the default), no, or a size",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: the configuration's)")
    parser.add_argument(
        "--prefill-chunk", type=whole(1), metavar="TOKENS", help="prompt tokens read at a time (default: all at once)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the tables or JSON. Returns 0."""
    found = inspect_model(args)
    print(json.dumps(found["json"], indent=2) if args.json else _page(found, args))
    return 0


def inspect_model(args: argparse.Namespace) -> dict[str, Any]:
    """The content of what `run` prints: `MemoryEstimate`s, and plain data under "json"."""
    config = load_config(args.model)
    plan = MemoryPlan(config, getattr(torch, args.dtype) if args.dtype else None)
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = args.tokens or longest or 32_768
    weights = parameters = None
    if args.weights != "no":
        parameters = count_parameters(config)
        weights = parameters * plan.dtype.itemsize if args.weights == "yes" else args.weights
    room = None if args.memory is None else args.memory - (weights or 0)

    presets = {name: load_preset(name) for name in args.preset or own_first()}
    rows, refused = {}, {}
    for name, preset in presets.items():
        try:
            rows[name] = plan.estimate(tokens, preset, args.batch, chunk=args.prefill_chunk)
        except ValueError as error:
            refused[name] = str(error)
    if not rows:
        raise ValueError("; ".join(refused.values()))
    first = next(iter(rows))
    contexts = {}
    if room is not None:

        def held(tokens: int, name: str, what: str = "resident_nbytes") -> int:
            return getattr(plan.cache_behind(tokens, presets[name], args.batch, chunk=args.prefill_chunk), what)

        contexts = {name: longest_context(room, partial(held, name=name)) for name in rows}
        contexts["16 bit"] = longest_context(room, partial(held, name=first, what="dense_nbytes"))
    data = {
        "model": str(args.model),
        "model_type": config.model_type,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "max_position_embeddings": longest,
        "tokens": tokens,
        "batch": args.batch,
        "parameters": parameters,
        "weights_nbytes": weights,
        "memory_nbytes": args.memory,
        "cache_memory_nbytes": room,
        "dense": {"resident_nbytes": rows[first].dense_nbytes, "longest_context": contexts.get("16 bit")},
        "presets": {name: {**row.to_dict(), "longest_context": contexts.get(name)} for name, row in rows.items()},
        "refused": refused,
    }
    return {"json": data, "rows": rows, "contexts": contexts, "config": config}


def count_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of a configuration's model; tied weights count once. Built on the meta device.

    Raises:
        ValueError: transformers has no class for it.
    """
    named = getattr(transformers, (config.architectures or [""])[0] or "", None)
    with torch.device("meta"):
        if named is not None:
            model = named._from_config(copy.deepcopy(config))
        else:
            kinds = (getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel") for kind in BUILDERS)
            kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
            if kind is None:
                raise ValueError(f"transformers builds no {config.model_type!r} model: pass --weights SIZE or no")
            model = kind.from_config(copy.deepcopy(config))
    return sum(x.numel() for x in model.parameters())


def _page(found: dict[str, Any], args: argparse.Namespace) -> str:
    data, rows, contexts = found["json"], found["rows"], found["contexts"]
    first = next(iter(rows.values()))
    head = f"{data['model_type']}, {sum(kind.layers for kind in first.layers)} layers, {data['dtype']}"
    limit = data["max_position_embeddings"]
    if limit:
        head += f", made for up to {limit:,} tokens"
    layers = [
        [
            kind.layers,
            kind.kind.replace("packed", "full attention") + (f" of {kind.window:,}" if kind.window else ""),
            *_heads(kind),
            REASONS[kind.kind],
        ]
        for kind in first.layers
    ]
    lines = [head, "", format_table(layers, ["layers", "kind", "KV heads", "head dim", "in this cache"]), ""]
    what = f"{data['tokens']:,} tokens" + (f", batch {args.batch}" if args.batch > 1 else "")
    header = ["cache", "resident", "in use", "smaller", "bytes per token"] + (["longest context"] if contexts else [])
    table = [["16 bit", _size(first.dense_nbytes), _size(first.dense_nbytes), "1.00x", f"{first.dense_token_nbytes:,}"]]
    table += [
        [
            name,
            _size(row.resident_nbytes),
            _size(row.nbytes),
            f"{row.compression_ratio:.2f}x",
            f"{row.token_nbytes:,.0f}",
        ]
        for name, row in rows.items()
    ]
    if contexts:
        table = [[*row, f"{contexts[row[0]]:,}"] for row in table]
    lines += [f"The cache behind a prompt of {what}:", "", format_table(table, header), ""]
    return "\n".join([*lines, *(textwrap.fill(note, 120) for note in _notes(found, args))])


def _heads(kind: LayerMemory) -> tuple[str, str]:
    keys, values = kind.head_dims
    return str(kind.kv_heads or "-"), "-" if not keys else str(keys) if keys == values else f"{keys}/{values}"


def _notes(found: dict[str, Any], args: argparse.Namespace) -> list[str]:
    data, first = found["json"], next(iter(found["rows"].values()))
    notes = [
        "Resident: with the room allocated ahead; smaller: than 16 bit, by resident bytes. Bytes per token: of one "
        "sequence, in layers that grow."
    ]
    if data["weights_nbytes"] is not None:
        kind = f"{data['parameters']:,} parameters in {data['dtype']}" if args.weights == "yes" else "as given"
        notes.append(f"Weights: {_size(data['weights_nbytes'])} ({kind}).")
    if first.cross_token_nbytes:
        notes.append(
            f"Cross-attention keeps {_size(first.cross_token_nbytes)} per token of the encoder and sequence beside "
            "this, uncompressed."
        )
    if args.memory is not None:
        without = f" less the weights leaves {_size(data['cache_memory_nbytes'])}" if data["weights_nbytes"] else ""
        notes.append(
            f"Longest context: {_size(args.memory)}{without} for the cache, whatever the model is made for. What a "
            "forward pass works in and CUDA graphs are not counted."
        )
    if getattr(found["config"], "quantization_config", None) and args.weights == "yes":
        notes.append("The checkpoint's weights are quantized, and may take less than said: --weights SIZE.")
    if first.released_nbytes:
        notes.append(
            f"Sliding-window layers hold {_size(first.released_nbytes)} of each cache only until the first token of "
            "the answer: transformers keeps a slice of what it read last, and with it all of that. Reading the prompt "
            "in pieces (prefill_chunk_size, here --prefill-chunk) avoids this."
        )
    return notes + [f"{name}: {reason}" for name, reason in data["refused"].items()]


def _size(nbytes: int) -> str:
    for unit, base in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= base:
            return f"{nbytes / base:.2f} {unit}"
    return f"{nbytes} B"
