"""The caches that the model level compares: how each is made and filled, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

import turboquant_hf
from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache, TurboQuantLayer
from turboquant_hf.evaluation.benchmark.data import Source, chunks, tile_nbytes
from turboquant_hf.evaluation.benchmark.settings import Group


@dataclass(frozen=True)
class Candidate:
    """One line of a comparison.

    Attributes:
        name: name of the cache.
        make: (config, tokens that it must hold) -> an empty cache.
        preset: preset of a packed cache, else None.
        attention: the attention implementation that reads the cache.
        compiled: whether steps run under torch.compile with CUDA graphs.
        approximate: whether the cache quantizes in its own way. No bound applies to its error.
    """

    name: str
    make: Callable[[Any, int], Any]
    preset: str | None = None
    attention: str = "sdpa"
    compiled: bool = False
    approximate: bool = False

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "eager"

    @property
    def reads_packed(self) -> bool:
        return self.attention == ATTENTION_NAME


def _quantized(backend: str, nbits: int | None, config, length: int):
    from transformers import QuantizedCache

    options = {} if nbits is None else {"nbits": nbits}
    if backend == "hqq":  # HQQ refuses the default, axis 0
        options |= {"axis_key": 1, "axis_value": 1}
    return QuantizedCache(backend=backend, config=config, **options)


RIVALS: dict[str, Candidate] = {
    "dynamic": Candidate("DynamicCache", lambda config, length: DynamicCache(config=config)),
    "static": Candidate("StaticCache", lambda config, length: StaticCache(config=config, max_cache_len=length)),
    "fp8": Candidate("QuantizedCache fp8", partial(_quantized, "fp8", None), approximate=True),
    **{
        f"{backend}-{bits}": Candidate(
            f"QuantizedCache {backend} {bits} bit", partial(_quantized, backend, bits), approximate=True
        )
        for backend in ("quanto", "hqq")
        for bits in (4, 2)
    },
}


def candidates(group: Group, cell: tuple[int, int]) -> Iterator[Candidate]:
    """The candidates of a cell. The 16-bit caches come first, because others are compared with them.

    Raises: ValueError for an unknown name of a cache.
    """
    for name in group.caches:
        if name not in RIVALS:
            raise ValueError(f"caches={name!r} is not supported; allowed: {', '.join(RIVALS)}")
    for name in sorted(group.caches, key=list(RIVALS).index):
        yield RIVALS[name]
    for preset in group.presets:
        yield Candidate("TurboQuantCache", partial(_turboquant, preset), preset, ATTENTION_NAME)
    if cell in group.static_cells:
        yield Candidate("StaticCache", RIVALS["static"].make, compiled=True)
        if hasattr(turboquant_hf, "TurboQuantStaticCache"):
            for preset in group.presets[:1]:
                make = partial(_turboquant_static, preset)
                yield Candidate("TurboQuantStaticCache", make, preset, ATTENTION_NAME, compiled=True)


def _turboquant(preset: str, config, length: int) -> TurboQuantCache:
    return TurboQuantCache(config, preset=preset)


def _turboquant_static(preset: str, config, length: int):
    return turboquant_hf.TurboQuantStaticCache(config, length, preset=preset)


def fill(cache, group: Group, batch: int, tokens: int, device: torch.device, attention: str = "sdpa") -> None:
    """Put the same random prompt into any cache, layer by layer, the way a prefill does.

    attention: the attention that the model uses. A packed layer that it reads takes the tokens in pieces and sees the
        queries. Every other layer takes all tokens at once.
    """
    shape = group.shape
    for index in range(group.layers):
        source = Source(batch, shape.kv_heads, shape.group, shape.head_dim, group.torch_dtype, device, seed=index)
        pieces = chunks(batch, tokens)
        if attention == ATTENTION_NAME:
            for count in pieces:
                handle, _ = cache.update(*source.keys_and_values(count), index)
                _store(handle, source.queries(count))
            continue
        sides = [
            torch.empty(batch, shape.kv_heads, tokens, shape.head_dim, dtype=group.torch_dtype, device=device)
            for _ in range(2)
        ]
        start = 0
        for count in pieces:
            for side, new in zip(sides, source.keys_and_values(count), strict=True):
                side[:, :, start : start + count] = new
            start += count
        cache.update(*sides, index)
        del sides  # free them before the next layer's are made: at long context they take gigabytes


def _store(handle, query: torch.Tensor) -> None:
    """Do what the registered attention does with a piece of a prompt, without attending."""
    handle.layer.observe(query)
    handle.layer.commit()


def held_nbytes(cache) -> int:
    """Bytes that a step reads: what packed layers hold, and every tensor of other layers."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, TurboQuantLayer):
            total += tile_nbytes(layer)
        elif hasattr(layer, "nbytes"):
            total += layer.nbytes
        else:
            total += sum(_tensor_nbytes(x) for x in vars(layer).values())
    return total


def _tensor_nbytes(x: Any) -> int:
    """Bytes of the plain tensors in an attribute, also inside tuples, mappings and tensor subclasses."""
    if isinstance(x, (tuple, list)):
        return sum(_tensor_nbytes(item) for item in x)
    if isinstance(x, dict):
        return sum(_tensor_nbytes(item) for item in x.values())
    if not isinstance(x, torch.Tensor):
        return 0
    if type(x) is not torch.Tensor and hasattr(x, "__tensor_flatten__"):
        return sum(_tensor_nbytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.itemsize


def resident_nbytes(device: torch.device) -> int:
    """Bytes of live tensors by the allocator's count; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
