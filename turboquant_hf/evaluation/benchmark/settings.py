"""The settings of a benchmark: shapes and groups of cells, read from a YAML file and narrowed by flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from turboquant_hf.evaluation.labels import LEVELS

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

WHATS = ("calls", "lengths", "chunks")
"""What the generate level measures: whole calls, calls with prompts of ten lengths, prompts read in pieces."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder: channels, query heads, KV heads, channels per head, MLP width, vocabulary.

    Attributes:
        family: the model type of the configuration in transformers.
        options: further fields of that configuration.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    family: str = "llama"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Group:
    """Cells (batch, tokens) that one level measures in the same way.

    Attributes:
        presets: presets of the packed caches.
        caches: names of rivals at the model level (`caches.RIVALS`), or of variants at the generate level
            (`calls.VARIANTS`).
        layers: layers of the model.
        static_cells: cells in which caches of fixed size are also measured under torch.compile. Our cache has the first
            preset there. Each cell takes a compilation of half a minute.
        what: what the generate level measures, one of `WHATS`.
        chunk: tokens per piece of a prompt, if `what` is "chunks".
    """

    shape: Shape
    cells: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    presets: tuple[str, ...] = ("k4v4",)
    caches: tuple[str, ...] = ("dynamic",)
    layers: int = 8
    static_cells: tuple[tuple[int, int], ...] = ()
    what: str = "calls"
    chunk: int = 8192

    def __post_init__(self) -> None:
        if self.what not in WHATS:
            raise ValueError(f"what={self.what!r} is not supported; allowed: {', '.join(WHATS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
        for name in ("cells", "static_cells"):
            cells = tuple(tuple(cell) for cell in getattr(self, name))
            for cell in cells:
                if len(cell) != 2 or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in cell):
                    raise ValueError(f"{name}={list(cell)!r} is not supported; allowed: [batch, tokens], both from 1")
            object.__setattr__(self, name, cells)
        for name in ("presets", "caches"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


OPTIONS = {"shape", "cells", "dtype", "presets", "caches", "layers", "static_cells", "what", "chunk"}


def read_groups(data: Mapping[str, Any], section: str, levels: Iterable[str] = LEVELS) -> dict[str, list[Group]]:
    """{level: its groups} of `data[section]`.

    Raises:
        ValueError: for an unknown section, shape or field, or an invalid cell.
    """
    shapes = read_shapes(data)
    if section not in data:
        raise ValueError(f"section={section!r} is not in the settings; allowed: {', '.join(sorted(set(data)))}")
    found: dict[str, list[Group]] = {}
    for level in levels:
        found[level] = []
        for entry in data[section].get(level) or ():
            for key in entry:
                if key not in OPTIONS:
                    raise ValueError(f"{section}.{level}: unknown field {key!r}; allowed: {', '.join(sorted(OPTIONS))}")
            found[level].append(Group(**{**entry, "shape": shape_of(shapes, entry.get("shape"))}))
    return found


def read_shapes(data: Mapping[str, Any]) -> dict[str, Shape]:
    """The named shapes of a settings file."""
    try:
        return {name: Shape(name, **sizes) for name, sizes in data["shapes"].items()}
    except (TypeError, KeyError) as error:
        raise ValueError(f"shapes: {error}; a shape has {', '.join(list(Shape.__annotations__)[1:])}") from None


def shape_of(shapes: Mapping[str, Shape], name: str | None) -> Shape:
    if name not in shapes:
        raise ValueError(f"shape={name!r} is not supported; allowed: {', '.join(shapes)}")
    return shapes[name]


def narrow(
    groups: Sequence[Group],
    shapes: Mapping[str, Shape],
    *,
    names: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    presets: Sequence[str] | None = None,
    dtype: str | None = None,
) -> list[Group]:
    """The groups, with the settings that flags replace. A shape without a group takes the first group's cells."""
    chosen = list(groups)
    if names:
        chosen = []
        for name in names:
            own = [group for group in groups if group.shape.name == name]
            chosen += own or [replace(group, shape=shape_of(shapes, name)) for group in groups[:1]]
    result: list[Group] = []
    for group in chosen:
        changes: dict[str, Any] = {}
        if batch or tokens:
            batches = batch or dict.fromkeys(b for b, _ in group.cells)
            lengths = tokens or dict.fromkeys(t for _, t in group.cells)
            cells = tuple((b, t) for b in batches for t in lengths)
            changes |= {"cells": cells, "static_cells": cells if group.static_cells else ()}
        if presets:
            changes["presets"] = tuple(presets)
        if dtype:
            changes["dtype"] = dtype
        group = replace(group, **changes)
        if group not in result:
            result.append(group)
    return result
