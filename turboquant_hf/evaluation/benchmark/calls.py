"""One timed call of `model.generate` with given tokens. It reads the clock at some tokens and keeps logits."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from turboquant_hf import restore_attention
from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.benchmark.caches import held_nbytes, resident_nbytes
from turboquant_hf.evaluation.harness.models import cache_parameter

KEPT = 4
"""The number of last steps of a call whose logits are kept."""


@dataclass(frozen=True)
class Variant:
    """One way to ask `generate` for a cache.

    Attributes:
        name: name in the tables.
        options: arguments of generate.
        packed: whether it is a cache of this package. `cache_config` then gets the preset.
        continues: whether the cache of a call can be given to the next call, to be timed in turns.
        compiled: whether generate compiles the model's forward.
        records: whether steps run as recorded graphs, on devices that record.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    continues: bool = True
    compiled: bool = False
    records: bool = False

    def arguments(self, preset: str | None) -> dict[str, Any]:
        """The arguments of generate."""
        if not self.packed:
            return dict(self.options)
        return {**self.options, "cache_config": {**self.options.get("cache_config", {}), "preset": preset}}


_TURBOQUANT = {"cache_implementation": "turboquant"}
VARIANTS = {
    "dynamic": Variant("DynamicCache"),
    "compiled": Variant("StaticCache", {"cache_implementation": "static"}, continues=False, compiled=True),
    "eager": Variant("turboquant graph=False", {**_TURBOQUANT, "cache_config": {"graph": False}}, packed=True),
    "graph": Variant("turboquant", _TURBOQUANT, packed=True, records=True),
    "static": Variant("turboquant_static", {"cache_implementation": "turboquant_static"}, packed=True, continues=False),
}
"""In the order of measuring: a cache against which others are checked comes first."""


@dataclass
class Call:
    """The result of a call.

    Attributes:
        first_s: seconds until the first token is known.
        total_s: seconds of the whole call.
        ms: milliseconds per token, without the first steps, in which graphs are recorded and code is compiled.
        first: logits of the prompt, [B, vocabulary] float32.
        logits: logits of the last `KEPT` steps, oldest first.
        cache: the cache at the end of the call.
        sequences: token ids at the end of the call. The cache does not hold the newest token yet.
        recorded: whether the last step ran over a cache that is fixed for graphs.
        held_bytes: bytes of the cache at the last step, with graphs and room for new tokens.
        peak_bytes: the allocator's peak, minus what it held before the call; 0 on a CPU.
    """

    first_s: float
    total_s: float
    ms: float
    first: torch.Tensor
    logits: list[torch.Tensor]
    cache: Any
    sequences: torch.Tensor
    recorded: bool
    held_bytes: int
    peak_bytes: int


class Watch(LogitsProcessor):
    """Reads the clock, keeps logits, and lets generate choose only the given token, so that all caches get the same.

    Args:
        tokens: the tokens to choose, one per step, [steps] on the model's device.
        warmup: steps before the timed steps.
    """

    def __init__(self, tokens: torch.Tensor, warmup: int) -> None:
        self._tokens, self._turn = tokens, 0
        self._marks = {0, warmup, len(tokens) - 1}
        self.clock: dict[int, float] = {}
        self.first: torch.Tensor | None = None
        self.logits: list[torch.Tensor] = []
        self.cache: Any = None
        self.held_bytes, self.recorded = 0, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        turn, last = self._turn, len(self._tokens) - 1
        self._turn += 1
        if turn in self._marks:
            self.clock[turn] = now(scores.device)
        if turn == 0:
            self.first = scores.float().clone()
        if turn > last - KEPT:
            self.logits.append(scores.float().clone())
        if turn == last:
            self.held_bytes = all_nbytes(self.cache)
            layers = getattr(self.cache, "packed_layers", ())
            self.recorded = any(getattr(layer, "fixed", None) is not None for layer in layers)
        return scores.index_fill(1, self._tokens[turn : turn + 1], torch.inf)


def call(model: Any, ids: torch.Tensor, tokens: torch.Tensor, warmup: int, cache: Any = None, **arguments: Any) -> Call:
    """Generate the given `tokens` [steps] behind `ids` [B, T].

    Args:
        warmup: steps before the timed steps, at most steps - 2.
        cache: the cache of an earlier call, which holds all of `ids` except the newest token; None for a new cache.
        **arguments: further arguments of generate.
    """
    device, watch = ids.device, Watch(tokens, warmup)
    given = {} if cache is None else {cache_parameter(type(model)): cache}
    before = resident_nbytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _watched(model, watch):
        begin = now(device)
        sequences = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(tokens), do_sample=False,
            logits_processor=LogitsProcessorList([watch]), **given, **arguments,
        )  # fmt: skip
        end = now(device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    last = len(tokens) - 1
    return Call(
        first_s=watch.clock[0] - begin, total_s=end - begin,
        ms=1e3 * (watch.clock[last] - watch.clock[warmup]) / max(last - warmup, 1),
        first=watch.first, logits=watch.logits, cache=watch.cache, sequences=sequences,
        recorded=watch.recorded, held_bytes=watch.held_bytes, peak_bytes=peak,
    )  # fmt: skip


@contextmanager
def _watched(model: Any, watch: Watch) -> Iterator[None]:
    """Show `watch` the cache that generate makes, so that its bytes are read while the call runs and graphs exist."""
    original, name = model.prepare_inputs_for_generation, cache_parameter(type(model))

    @functools.wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        watch.cache = kwargs.get(name, watch.cache)
        return original(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


@contextmanager
def attention(model: Any, variant: Variant) -> Iterator[None]:
    """Set the attention for a call with a given cache. Afterwards, undo everything that calls switched or compiled."""
    try:
        if variant.packed:
            model.set_attn_implementation(ATTENTION_NAME)
        yield
    finally:
        undo(model)


def undo(model: Any) -> None:
    """Restore the model's own attention, and drop compiled code."""
    restore_attention(model)
    if vars(model).pop("_compiled_call", None) is not None:
        torch.compiler.reset()


def now(device: torch.device) -> float:
    """The host's clock in seconds, read after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def all_nbytes(cache: Any) -> int:
    """Bytes that a cache holds, with the room allocated ahead."""
    return cache.nbytes + cache.spare_nbytes if hasattr(cache, "spare_nbytes") else held_nbytes(cache)


def random_prompt(batch: int, tokens: int, vocab: int, device: torch.device) -> torch.Tensor:
    """Random token ids [batch, tokens]; equal arguments give equal ids."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, vocab, (batch, tokens), generator=generator).to(device)


def answer(length: int, steps: int, presets: tuple[str, ...], vocab: int, device: torch.device) -> torch.Tensor:
    """At least `steps` token ids to generate behind a prompt of `length`.

    The last step encodes no tile. It can therefore be repeated over the same bytes.
    """
    sizes = [(preset.recent_window, preset.tile) for preset in map(load_preset, presets)]
    while any((length + steps - 1 - window) % tile == 0 for window, tile in sizes):
        steps += 1
    return random_prompt(1, steps, vocab, device)[0]
