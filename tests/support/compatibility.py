"""Which model families work in which modes of `generate`, and the page that says so.

`python -m tests.support.compatibility` writes docs/compatibility.md from the lists that tests run. The column of decode
steps is that of docs/graphs.md, which was made on a GPU.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.support import generating
from tests.support.families import FAMILIES, Family, build
from tests.support.generating import turboquant
from turboquant_hf import TurboQuantCache, load_preset
from turboquant_hf.cache.estimate import MemoryPlan

Inputs = dict[str, torch.Tensor]

generate = partial(generating.generate, new=28)


def compare(model: torch.nn.Module, inputs: Inputs, options: dict[str, Any], cache: dict[str, Any]) -> bool:
    """Whether a packed cache gives DynamicCache's tokens with the same options."""
    return torch.equal(generate(model, inputs, **options, **cache), generate(model, inputs, **options))


def preallocated(model, inputs):
    return compare(model, inputs, {}, turboquant(static=True))


def padded(model, inputs):
    inputs["attention_mask"][1, :7] = 0
    return compare(model, inputs, {}, turboquant())


def beams(model, inputs):
    return compare(model, inputs, {"num_beams": 3}, turboquant())


def lookup(model, inputs):
    return compare(model, {name: x[:1] for name, x in inputs.items()}, {"prompt_lookup_num_tokens": 3}, turboquant())


def offload(model, inputs):
    return compare(model, inputs, {}, turboquant(offloading=True))


def files(model, inputs):
    """A prompt's cache, saved and loaded, goes on as the one that was never saved."""
    whole = generate(model, inputs, **turboquant(), return_dict_in_generate=True)
    cache = whole.get("cache", whole.get("past_key_values"))
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder, "cache"))
        loaded = TurboQuantCache.load(Path(folder, "cache"), model.config)
    more = {"input_ids": torch.cat([whole.sequences, inputs["input_ids"][:, :5]], dim=1)}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    expected = generate(model, more, cache=copy.deepcopy(cache))
    return torch.equal(generate(model, more, cache=loaded), expected)


MODES: dict[str, Callable[[torch.nn.Module, Inputs], bool]] = {
    "preallocated": preallocated,
    "padded batch": padded,
    "beams": beams,
    "prompt lookup": lookup,
    "offload": offload,
    "save and load": files,
}
"""Column of the page -> what tests/generation/test_compatibility.py runs for it. It gives DynamicCache's tokens."""
COMPILED = ("llama", "gpt_oss")
"""Families of which tests/generation/test_static.py compiles the forward pass with `fullgraph=True`."""
STATEFUL = (
    "not supported with stateful models",
    "transformers refuses assisted decoding and prompt lookup for models whose recurrent state cannot go back",
)
HALF = (
    "no attribute 'save'",
    "an encoder-decoder has two caches. `cache.self_attention_cache` can be saved; cross-attention is computed again",
)
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    **{(name, "prompt lookup"): STATEFUL for name in ("qwen3_next", "jamba", "bamba", "falcon_h1", "zamba2")},
    **{(name, "save and load"): HALF for name in ("t5", "bart", "whisper")},
    ("whisper", "padded batch"): ("attention_mask", "its input is always one full window of sound"),
}
"""(family, mode) -> what the error says (a pattern), and what the page says of it."""
HYBRID = "a preallocated cache of transformers keeps attention and recurrent state in one layer, which is left as it is"
OWN_MASK = "its own mask is wrong with preallocated caches: transformers' StaticCache gives the same tokens as this one"
AS_STATIC = {
    ("gpt_neo", "preallocated"): OWN_MASK,
    **{(name, "preallocated"): HYBRID for name in ("falcon_h1", "zamba2")},
}
"""(family, mode) that equals transformers' StaticCache, but not DynamicCache or without packing -> why."""
UNUSED = {"mpt": "the model does not use generate's cache"}
KINDS = {"packed": "full attention", "packed + recurrent": "full attention beside a recurrent state"}
"""Packed kinds of layers in an estimate -> their names on the page."""
LEFT = {"none": "that read another layer's", "indexed": "sparse attention", "raw": "of another kind"}
"""The others, where the page has another name for them."""


def families() -> list[Family]:
    """One of each model type, and another where a type packs layers or not by its settings."""
    kept: dict[tuple[str, bool], Family] = {}
    for family in FAMILIES:
        kept.setdefault((family.kind, family.packed is None), family)
    return list(kept.values())


def page(root: Path) -> str:
    """The text of docs/compatibility.md."""
    steps, notes = read_steps(root / "docs" / "graphs.md"), []
    header = ["family", "packed", "left as it is", "growing", *MODES, "decode steps on a GPU"]
    rows = [row(family, steps, notes) for family in families()]
    table = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return TEXT.format(
        table="\n".join(lines),
        notes="\n".join(f"{n}. {note}" for n, note in enumerate(notes, 1)),
        compiled=" and ".join(COMPILED),
    )


def row(family: Family, steps: dict[str, str], notes: list[str]) -> list[str]:
    """The cells of a family; `notes` takes what they refer to by number."""
    kept, left = layers(family)
    if not family.packed:
        return [family.name, "-", UNUSED.get(family.name, left), *["-"] * (1 + len(MODES)), "-"]
    cells = ["yes"]
    for mode in MODES:
        _, why = REFUSED.get((family.name, mode), ("", AS_STATIC.get((family.name, mode), "")))
        if why and why not in notes:
            notes.append(why)
        cells.append(f"no ({notes.index(why) + 1})" if why else "yes")
    return [family.name, kept, left, *cells, steps[family.name.removesuffix("-full")]]


def layers(family: Family) -> tuple[str, str]:
    """Layers that a cache of the tiny model packs, and those that it leaves alone, by kind."""
    plan = MemoryPlan(build(family).config, torch.float32)
    found = plan.estimate(41, load_preset("lossless", **generating.TILES)).layers
    names = {**KINDS, **LEFT}
    told = [(kind.kind in KINDS, f"{kind.layers} {names.get(kind.kind, kind.kind)}") for kind in found]
    if plan.cross:
        told.append((False, f"{len(plan.cross)} cross-attention"))
    sides = (", ".join(text for own, text in told if own is side) or "-" for side in (True, False))
    return tuple(sides)


def read_steps(path: Path) -> dict[str, str]:
    """Family -> "graph" or "eager: why", from the table of docs/graphs.md."""
    rows = re.findall(r"^\| (graph|eager: .*?) \| (.*?) \|$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: what for what, names in rows for name in names.split(", ")}


TEXT = """\
# Compatibility

Which model families work with which ways of generating. `python -m tests.support.compatibility` writes this page from
the lists that the tests run. Each "yes" is a test: a tiny random model of the family gives exactly DynamicCache's
tokens with the `lossless` preset, and several tiles are packed on the way. The versions are transformers 5.24 and torch
2.13.

{table}

{notes}

- **packed, left as it is**: layers of the tiny model, by kind. Where nothing is packed, the model generates as without
  this package, and the log says so.
- **growing** is `cache_implementation="turboquant"`, **preallocated** is `"turboquant_static"`.
- **decode steps on a GPU** are those of [graphs.md](graphs.md#which-models).
- **torch.compile** of the forward pass with `fullgraph=True`, over a preallocated cache: {compiled} are tested.
- Sampling, chunked prefill, assisted decoding with a draft model and further turns are tested with llama alone.
- Not supported with any family: continuous batching, training through the cache, offloading or saving a preallocated
  cache ([what is refused](usage.md#what-is-refused)).
"""


def main() -> None:
    root = Path(__file__).parent.parent.parent
    (root / "docs" / "compatibility.md").write_text(page(root), encoding="utf-8")


if __name__ == "__main__":
    main()
