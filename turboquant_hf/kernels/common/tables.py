"""Codebooks as tables on a device, one per list of groups. `GroupSpec.table` says where a group's entries start."""

from __future__ import annotations

import torch

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.primitives.memo import once


@once(maxsize=256)
@torch.inference_mode(False)
def level_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The levels of all groups one after the other, float32."""
    return torch.cat([group.codebook.tensor() for group in groups]).to(device)


@once(maxsize=256)
@torch.inference_mode(False)
def threshold_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The thresholds of all groups in rows, each followed by +inf, so that offsets are those of the levels.

    A trellis has no thresholds of its own: zeros.
    """
    rows = []
    for group in groups:
        edges = (0.0,) * (len(group.codebook.levels) - 1) if group.in_words else group.codebook.thresholds
        rows.append(torch.tensor((*edges, float("inf")), dtype=torch.float32))
    return torch.cat(rows).to(device)


@once(maxsize=256)
@torch.inference_mode(False)
def cell_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The number i of each cell of a grid (`Trellis.cells`), uint8, one trellis after the other."""
    rows = [group.codebook.cells() for group in groups if group.in_words]
    return torch.cat([*rows, torch.zeros(0 if rows else 1, dtype=torch.uint8)]).to(device)


@once(maxsize=256)
@torch.inference_mode(False)
def pair_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """int32, offsets as in `level_table`: the level of each code and of the next, as two halves in the codebook's unit.

    Zeros where a codebook has no unit. The threshold lies midway between the two levels, so one load gives all three.
    For a trellis, entry i holds the levels i .. i + 3 in grid units plus 128: the level of subset s in byte s.
    """
    rows = []
    for group in groups:
        if group.in_words:
            levels = [round(level / group.codebook.grid) + 128 for level in group.codebook.levels]
            near = [sorted(range(i, i + 4), key=lambda number: number % 4) for i in range(len(levels) - 3)]
            octets = [[levels[number] for number in numbers] for numbers in near] + [[0] * 4] * 3
            rows.append(torch.tensor(octets, dtype=torch.uint8).view(torch.int32)[:, 0])
            continue
        steps = group.codebook.tensor() / (group.codebook.unit or torch.inf)
        rows.append(torch.stack([steps, steps.roll(-1)], dim=1).half().view(torch.int32)[:, 0])
    return torch.cat(rows).to(device)
